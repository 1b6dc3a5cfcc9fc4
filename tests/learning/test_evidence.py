"""The posterior against the sum over all paths of small trees."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_router.learning.evidence import SMALLEST_NOISE, SMALLEST_NONE_RIGHT, Choice, RunEvidence

OPTIONS = {"tool": 3, "size": 2}


@dataclass(frozen=True)
class Node:
    """A decision of a program, and the decisions that follow its options; None where the run ends."""

    field: str
    text: str
    policy: tuple[float, ...]
    children: "tuple[Node | None, ...]"


Path = tuple[tuple[Node, int], ...]


@dataclass
class Run:
    path: Path
    success: bool

    @property
    def steps(self) -> list[tuple[str, str, int]]:
        return [(node.field, node.text, option) for node, option in self.path]


@dataclass
class World:
    tree: Node
    runs: list[Run] = field(default_factory=list)


def paths_of(node: Node | None) -> list[Path]:
    if node is None:
        return [()]
    return [((node, option), *rest) for option, child in enumerate(node.children) for rest in paths_of(child)]


@st.composite
def nodes(draw: st.DrawFn, depth: int) -> Node:
    name = draw(st.sampled_from(sorted(OPTIONS)))
    parts = draw(st.lists(st.integers(1, 20), min_size=OPTIONS[name], max_size=OPTIONS[name]))
    children = [draw(st.none() | nodes(depth=depth - 1)) if depth else None for _ in parts]
    policy = tuple(part / sum(parts) for part in parts)
    return Node(name, draw(st.sampled_from(["near", "far"])), policy, tuple(children))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    tree = draw(nodes(depth=2))
    runs = draw(st.lists(st.builds(Run, st.sampled_from(paths_of(tree)), st.booleans()), max_size=6))
    return World(tree, runs)


def evidence_of(*worlds: World) -> RunEvidence[str]:
    evidence: RunEvidence[str] = RunEvidence(OPTIONS)
    for example, world in enumerate(worlds):
        for run in world.runs:
            evidence.observe(example, run.steps, success=run.success)
    return evidence


def nodes_seen(evidence: RunEvidence[str], worlds: tuple[World, ...]) -> dict[tuple[str, int], tuple[World, Path]]:
    """Each decision in the evidence, as the path that leads to it in its world's tree."""
    found = {}
    for example, world in enumerate(worlds):
        for run in world.runs:
            parent: Choice | None = None
            for depth, (name, text, option) in enumerate(run.steps):
                row = evidence.decision(example, name, text, parent)
                found[name, row] = (world, run.path[:depth])
                parent = Choice(name, row, option)
    return found


def node_after(world: World, before: Path) -> Node:
    node: Node | None = world.tree
    for _, option in before:
        assert node is not None
        node = node.children[option]
    assert node is not None
    return node


def enumerated(world: World, before: Path, noise: float, none_right: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Likelihood, probability and reach of a decision by its definition: a sum over the tree's paths, or none."""
    noise, none_right = max(noise, SMALLEST_NOISE), max(none_right, SMALLEST_NONE_RIGHT)
    prior, joint = np.zeros((2, OPTIONS[node_after(world, before).field]))
    total = 0.0
    for path in paths_of(world.tree):
        chance = float(np.prod([node.policy[option] for node, option in path]))
        balance = sum((1 if run.success else -1) for run in world.runs if run.path == path)
        likelihood = (1 - none_right) * ((1 - noise) / noise) ** balance
        total += chance * likelihood
        if path[: len(before)] == before:
            option = path[len(before)][1]
            prior[option] += chance
            joint[option] += chance * likelihood
    likelihood_of = joint / prior + (0 if before else none_right)
    return likelihood_of / likelihood_of.max(), joint / joint.sum(), joint.sum() / (total + none_right)


def check(noise: float, none_right: float, *worlds: World) -> None:
    evidence = evidence_of(*worlds)
    seen = nodes_seen(evidence, worlds)
    policies = {
        name: np.array([node_after(*seen[name, row]).policy for row in range(len(evidence.decisions[name]))]).reshape(
            -1, size
        )
        for name, size in OPTIONS.items()
    }
    found = evidence.posterior(policies, noise, none_right)
    assert sum(len(posterior.reach) for posterior in found.values()) == len(seen)
    for (name, row), (world, before) in seen.items():
        likelihood, probability, reach = enumerated(world, before, noise, none_right)
        np.testing.assert_allclose(found[name].likelihood[row], likelihood, atol=1e-4)
        np.testing.assert_allclose(found[name].probability[row], probability, atol=1e-4)
        np.testing.assert_allclose(found[name].reach[row], reach, atol=1e-4)


@pytest.mark.parametrize(("noise", "none_right"), [(0.0, 0.0), (0.0, 0.2), (0.1, 0.0), (0.1, 0.3), (0.4, 0.01)])
@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_the_posterior_is_the_sum_over_all_paths(noise: float, none_right: float, world: World) -> None:
    check(noise, none_right, world)


@settings(max_examples=30, deadline=None)
@given(first=worlds(), second=worlds())
def test_examples_say_nothing_of_each_other(first: World, second: World) -> None:
    check(0.1, 0.2, first, second)


def single(*outcomes: tuple[int, bool], noise: float = 0.0, policy: tuple[float, ...] = (0.5, 0.3, 0.2)) -> list[float]:
    """Probabilities of the options of one decision after outcomes of its options."""
    evidence: RunEvidence[str] = RunEvidence({"tool": 3})
    evidence.decision("example", "tool", "text")
    for option, success in outcomes:
        evidence.observe("example", [("tool", "text", option)], success=success)
    return evidence.posterior({"tool": np.array([policy])}, noise)["tool"].probability[0].tolist()


def test_nothing_tried_leaves_the_policy() -> None:
    assert single() == pytest.approx([0.5, 0.3, 0.2])


def test_a_success_settles_a_single_decision_and_a_failure_rules_an_option_out() -> None:
    assert single((2, True)) == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    assert single((0, False)) == pytest.approx([0.0, 0.6, 0.4], abs=1e-6)
    assert single((0, False), (1, False)) == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)


def test_with_noise_a_single_decision_follows_bayes() -> None:
    assert single((2, True), noise=0.25) == pytest.approx([0.5 / 1.4, 0.3 / 1.4, 0.6 / 1.4])
    assert single((2, True), (2, True), noise=0.25) == pytest.approx([0.5 / 2.6, 0.3 / 2.6, 1.8 / 2.6])


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_outcomes_that_contradict_each_other_cancel(noise: float) -> None:
    assert single((1, True), (1, False), noise=noise) == pytest.approx([0.5, 0.3, 0.2])
    assert single((0, False), (1, False), (2, False), noise=noise) == pytest.approx([0.5, 0.3, 0.2])
    assert single((0, True), (1, True), noise=0.0) == pytest.approx([0.625, 0.375, 0.0], abs=1e-6)


def two_decisions(first_policy: list[float], second_policy: list[float], *runs: tuple[int, int, bool]):
    evidence: RunEvidence[str] = RunEvidence({"tool": 3, "size": 2})
    for tool, size, success in runs:
        evidence.observe("example", [("tool", "text", tool), ("size", "text", size)], success=success)
    sizes = np.tile(second_policy, (len(evidence.decisions["size"]), 1))
    return evidence.posterior({"tool": np.array([first_policy]), "size": sizes})


def test_a_failed_run_blames_the_decision_that_was_less_sure() -> None:
    found = two_decisions([0.5, 0.3, 0.2], [0.9, 0.1], (0, 0, False))
    # What is left of tool 0 is its run with the unlikely size: 0.05 of 0.55.
    assert found["tool"].probability[0].tolist() == pytest.approx([0.05 / 0.55, 0.3 / 0.55, 0.2 / 0.55], abs=1e-6)
    assert found["size"].probability[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert found["size"].reach[0] == pytest.approx(0.05 / 0.55)


def test_a_first_option_is_ruled_out_once_all_that_can_follow_has_failed() -> None:
    found = two_decisions([0.5, 0.3, 0.2], [0.9, 0.1], (0, 0, False), (0, 1, False))
    assert found["tool"].probability[0].tolist() == pytest.approx([0.0, 0.6, 0.4], abs=1e-6)
    assert found["size"].reach[0] == pytest.approx(0.0, abs=1e-6)


def test_a_success_settles_every_decision_of_its_run() -> None:
    found = two_decisions([0.5, 0.3, 0.2], [0.9, 0.1], (2, 1, True), (0, 0, False))
    assert found["tool"].probability[0].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    assert found["size"].probability[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert found["size"].reach.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_a_program_that_goes_on_differently_after_one_choice_needs_all_that_follows_to_be_right() -> None:
    # After tool 0 a run ends, or reads "near", or reads "far". What is right is then one option at each decision: sums
    # over all such strategies; a run counts for those that agree with all its decisions.
    noise, tool, near, far = 0.1, [0.5, 0.3, 0.2], [0.6, 0.4], [0.7, 0.3]
    runs = [
        ([("tool", "text", 0), ("size", "near", 0)], True), ([("tool", "text", 0), ("size", "far", 0)], False),
        ([("tool", "text", 0), ("size", "far", 1)], False), ([("tool", "text", 0)], True),
        ([("tool", "text", 1)], True),
    ]  # fmt: skip
    evidence: RunEvidence[str] = RunEvidence(OPTIONS)
    for path, success in runs:
        evidence.observe("example", path, success=success)
    found = evidence.posterior({"tool": np.array([tool]), "size": np.array([near, far])}, noise)
    joint = np.zeros((3, 2, 2))
    for first, second, third in itertools.product(range(3), range(2), range(2)):
        taken = {"text": first, "near": second, "far": third}
        agreeing = [success for path, success in runs if all(taken[text] == option for _, text, option in path)]
        odds = ((1 - noise) / noise) ** sum(1 if success else -1 for success in agreeing)
        joint[first, second, third] = tool[first] * near[second] * far[third] * odds
    joint /= joint.sum()
    np.testing.assert_allclose(found["tool"].probability[0], joint.sum(axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["size"].probability[0], joint[0].sum(axis=1) / joint[0].sum(), rtol=1e-4)
    np.testing.assert_allclose(found["size"].probability[1], joint[0].sum(axis=0) / joint[0].sum(), rtol=1e-4)
    np.testing.assert_allclose(found["size"].reach, joint[0].sum(), rtol=1e-4)


def outcomes(examples: Sequence[Sequence[bool]], options: int = 3) -> RunEvidence[str]:
    """Examples with a single decision, whose options were tried in order with these outcomes."""
    evidence: RunEvidence[str] = RunEvidence({"tool": options})
    for example, tries in enumerate(examples):
        for option, success in enumerate(tries):
            evidence.observe(example, [("tool", "text", option)], success=success)
    return evidence


def none_right(examples: Sequence[Sequence[bool]], noise: float = 0.0, options: int = 3) -> float:
    return outcomes(examples, options).none_right({"tool": np.ones((len(examples), options), bool)}, noise)


def test_how_often_no_option_is_right_is_the_share_of_examples_on_which_all_failed() -> None:
    assert none_right([]) == pytest.approx(1 / 2)
    assert none_right([[True]] * 18) == pytest.approx(1 / 20, abs=1e-6)
    assert none_right([[True]] * 15 + [[False] * 3] * 3) == pytest.approx(4 / 20, abs=1e-6)
    assert none_right([[False] * 3] * 18) == pytest.approx(19 / 20, abs=1e-6)


def test_an_example_with_untried_options_hardly_says_whether_one_is_right() -> None:
    # Half the options failed: the rest has half a chance, so it is likelier than at first that none is right.
    assert 1 / 20 < none_right([[True]] * 18 + [[False]] * 6, options=2) < 2 / 20
    assert none_right([[True]] * 18 + [[False]] * 6, options=100) == pytest.approx(1 / 20, rel=0.01)


def test_options_that_could_not_be_chosen_leave_no_hope() -> None:
    evidence = outcomes([[True]] * 18 + [[False, False]] * 10)
    open_ = np.ones((28, 3), bool)
    open_[18:, 2] = False
    assert evidence.none_right({"tool": open_}) == pytest.approx(11 / 30, abs=1e-6)


def test_with_noise_a_failure_of_every_option_is_weaker_evidence() -> None:
    examples = [[True]] * 15 + [[False] * 3] * 3
    assert none_right(examples, 0.2) != pytest.approx(none_right(examples), abs=0.01)
    assert none_right([[False] * 3] * 100, 0.2) > 0.9 > 0.1 > none_right([[True]] * 100, 0.2)


def test_a_failed_option_keeps_the_likelihood_that_none_is_right_and_all_failed_say_nothing() -> None:
    found = outcomes([[False], [False, False], [False] * 3, [True]]).posterior(
        {"tool": np.tile([0.5, 0.3, 0.2], (4, 1))}, none_right=0.1
    )["tool"]
    expected = [[0.1, 1, 1], [0.1, 0.1, 1], [1, 1, 1], [1, 0, 0]]
    np.testing.assert_allclose(found.likelihood, expected, atol=1e-6)
    reach = [0.9 * 0.5 / (0.9 * 0.5 + 0.1), 0.9 * 0.2 / (0.9 * 0.2 + 0.1), 0.0, 1.0]
    np.testing.assert_allclose(found.reach, reach, atol=1e-6)


def test_many_outcomes_of_one_option_stay_finite() -> None:
    for success in (True, False):
        assert np.isfinite(single(*[(0, success)] * 500)).all()


def test_outcomes_are_counted_by_option_and_continued_choices_are_known() -> None:
    evidence: RunEvidence[str] = RunEvidence(OPTIONS)
    for size, success in itertools.product([0, 1], [True, True, False]):
        evidence.observe("example", [("tool", "text", 2), ("size", "text", size)], success=success)
    evidence.observe("example", [("tool", "text", 0)], success=False)
    successes, failures = evidence.outcomes("size")
    assert (successes.tolist(), failures.tolist()) == ([[2, 2]], [[1, 1]])
    assert [counts.tolist() for counts in evidence.outcomes("tool")] == [[[0, 0, 0]], [[1, 0, 0]]]
    assert evidence.continued("tool").tolist() == [[False, False, True]]
    assert not evidence.continued("size").any()
    assert evidence.path(Choice("size", 0, 1)) == [Choice("tool", 0, 2), Choice("size", 0, 1)]


def test_a_run_without_decisions_says_nothing() -> None:
    evidence: RunEvidence[str] = RunEvidence(OPTIONS)
    evidence.observe("example", [], success=True)
    found = evidence.posterior({name: np.zeros((0, size)) for name, size in OPTIONS.items()})
    assert [posterior.likelihood.shape for posterior in found.values()] == [(0, 3), (0, 2)]
