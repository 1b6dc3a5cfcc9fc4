import numpy as np

from dspy_router.learning.evidence import Choice, RunEvidence
from dspy_router.learning.returns import tree_returns


def test_a_decision_is_not_blamed_for_what_went_wrong_after_it() -> None:
    # One right run and three that began rightly and went wrong: the mean of the first choice's runs is only 0.25.
    evidence = RunEvidence({"tool": 4})
    first = evidence.decision("a", "tool", "start")
    then = evidence.decision("a", "tool", "on", Choice("tool", first, 0))
    ends = [
        (Choice("tool", first, 1), 0.5),
        *((Choice("tool", then, option), float(option == 2)) for option in range(4)),
    ]
    found = tree_returns(evidence, ends, {"tool": np.array([[0.25] * 4, [0.01, 0.01, 0.97, 0.01]])})["tool"]
    np.testing.assert_allclose(found.mean, [[0.97, 0.5, np.nan, np.nan], [0, 0, 1, 0]])
    assert found.looks.tolist() == [[4, 1, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_allclose(found.reach, [1, 0.25])


def test_runs_that_end_where_others_go_on_count_as_one_each() -> None:
    evidence = RunEvidence({"tool": 2, "size": 2})
    first = evidence.decision("a", "tool", "start")
    then = evidence.decision("a", "size", "on", Choice("tool", first, 0))
    ends = [(Choice("tool", first, 0), 0.0), (Choice("size", then, 0), 1.0), (Choice("size", then, 0), 0.5)]
    found = tree_returns(evidence, ends, {"tool": np.array([[1.0, 0.0]]), "size": np.array([[0.0, 1.0]])})
    np.testing.assert_allclose(found["tool"].mean, [[0.5, np.nan]])
    np.testing.assert_allclose(found["size"].mean, [[0.75, np.nan]])  # though the policy has ruled the option out
    assert found["size"].reach.tolist() == [1.0]


def test_of_runs_that_decide_once_the_return_is_the_mean_reward() -> None:
    evidence = RunEvidence({"tool": 2})
    rows = [evidence.decision(example, "tool", "start") for example in "ab"]
    ends = [(Choice("tool", rows[0], 1), 0.2), (Choice("tool", rows[0], 1), 0.4), (Choice("tool", rows[1], 0), 0.9)]
    found = tree_returns(evidence, ends, {"tool": np.full((2, 2), 0.5)})["tool"]
    np.testing.assert_allclose(found.mean, [[np.nan, 0.3], [0.9, np.nan]])
