import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import dspy
import pytest

from dspy_router import DifferentiableRoute, Feedback, RouteError, RouteFinetune, record_decisions
from dspy_router.evaluation import Comparison, compare
from dspy_router.feedback import write_feedback
from dspy_router.overrides import explore_decisions
from tests.conftest import bag_of_words
from tests.programs import FRUIT, Shop, fruit_requests, fruit_route

Policy = Callable[[str], Sequence[float]]


def at_random(wanted: str) -> list[float]:
    return [1 / 3, 1 / 3, 1 / 3]


def mostly_right(wanted: str) -> list[float]:
    return [0.8 if fruit == wanted else 0.1 for fruit in FRUIT]


def log(policy: Policy = at_random, count: int = 300, seed: int = 0, **changes: object) -> list[Feedback]:
    """Rows of a logging policy that may know what was wanted."""
    draw = random.Random(seed)
    rows = []
    for number, example in enumerate(fruit_requests(count, seed=seed + 1)):
        probabilities = policy(example.wanted)
        (chosen,) = draw.choices(FRUIT, probabilities)
        propensity, reward = probabilities[FRUIT.index(chosen)], float(chosen == example.wanted)
        row = Feedback(
            "log", str(number), "", "fruit", example.request, tuple(FRUIT), chosen, propensity, reward, id=f"{number}"
        )
        rows.append(replace(row, **changes))
    return rows


@pytest.fixture(scope="module")
def trained() -> DifferentiableRoute:
    return RouteFinetune().compile(fruit_route(), trainset=fruit_requests(60, seed=99, label=True))


@pytest.fixture(scope="module")
def wrong() -> DifferentiableRoute:
    """Trained on labels one off."""
    trainset = [
        dspy.Example(request=e.request, fruit=FRUIT[FRUIT.index(e.wanted) - 1]).with_inputs("request")
        for e in fruit_requests(60, seed=99)
    ]
    return RouteFinetune().compile(fruit_route(), trainset=trainset)


def first_line(comparison: Comparison) -> str:
    return str(comparison).splitlines()[0]


def test_a_better_route_is_to_be_switched_to(trained: DifferentiableRoute) -> None:
    comparison = compare(log(), trained)
    assert comparison.verdict == "switch"
    assert first_line(comparison).startswith("Switch: the candidate would have earned ")
    assert "95 % interval +0." in first_line(comparison)
    found = comparison.evaluation.estimates["doubly robust"]
    assert found.reward.low <= 1 <= found.reward.high + 0.01
    assert found.difference.low > 0.5
    assert comparison.changed == pytest.approx(2 / 3, abs=0.1)


def test_a_worse_route_is_not(wrong: DifferentiableRoute) -> None:
    comparison = compare(log(mostly_right, 900), wrong)
    assert comparison.verdict == "do not switch"
    assert comparison.evaluation.estimates["doubly robust"].difference.high < 0
    assert first_line(comparison).startswith("Do not switch: the candidate would have earned ")


def test_nor_one_that_shows_no_difference(trained: DifferentiableRoute) -> None:
    rows = log(lambda wanted: [1.0 if fruit == wanted else 0.0 for fruit in FRUIT])
    comparison = compare(rows, trained)
    assert comparison.verdict == "do not switch"
    assert first_line(comparison).startswith("Do not switch: no difference is shown; ")
    assert comparison.changed == 0


def test_a_stochastic_candidate_is_judged_by_its_probabilities() -> None:
    route = fruit_route()  # untrained, so unsure
    rows = log(count=600)
    taken, drawn = (compare(rows, route, stochastic=stochastic) for stochastic in (False, True))
    probabilities = [route(request=row.text).probabilities for row in rows]
    exact = sum(found[right] for found, right in zip(probabilities, FRUIT * 200, strict=True)) / 600
    found = drawn.evaluation.estimates["doubly robust"].reward
    assert found.low < exact < found.high
    assert found.value != taken.evaluation.estimates["doubly robust"].reward.value


def objections(rows: list[Feedback], candidate: dspy.Module) -> str:
    comparison = compare(rows, candidate)
    assert comparison.verdict == "no verdict"
    assert first_line(comparison) == f"No verdict: {'; '.join(comparison.objections)}."
    return first_line(comparison)


def test_a_log_that_never_took_an_option_gives_no_verdict(trained: DifferentiableRoute) -> None:
    rows = log(lambda wanted: [0.5, 0.5, 0.0])
    assert "33.3% of the candidate's decisions are options that the log never took" in objections(rows, trained)


def test_a_log_that_never_took_an_option_where_the_candidate_does_gives_no_verdict(
    trained: DifferentiableRoute,
) -> None:
    # Every option is taken, but apple never where it is wanted.
    rows = log(lambda wanted: [0.0, 0.5, 0.5] if wanted == "apple" else at_random(wanted), 600)
    assert "the importance weights average 0.6" in objections(rows, trained)


def test_a_log_without_exploration_gives_no_verdict(wrong: DifferentiableRoute) -> None:
    rows = log(lambda wanted: [1.0 if fruit == wanted or number == 0 else 0.0 for number, fruit in enumerate(FRUIT)])
    rows = [replace(row, propensity=1.0) for row in rows]
    assert "took no chances (every propensity is 1), and the candidate decides otherwise in" in objections(rows, wrong)


def test_a_short_log_gives_no_verdict(trained: DifferentiableRoute) -> None:
    message = objections(log(count=60), trained)
    assert "(effective sample size); at least 50 are needed, so about " in message
    assert "propensit" not in message


def test_a_log_that_explored_too_rarely_is_called_too_short_and_not_wrong(wrong: DifferentiableRoute) -> None:
    for seed in range(5):
        rows = log(lambda wanted: [0.98 if fruit == wanted else 0.01 for fruit in FRUIT], 200, seed)
        message = objections(rows, wrong)
        assert "the log is too short for how rarely it explored: " in message
        assert "its 200 rows say as much of these as" in message
        assert "propensities are wrong" not in message
    assert "at least 10 are needed, so " in message
    assert " rows like these, or more exploration" in message


def test_wrong_propensities_give_no_verdict(trained: DifferentiableRoute) -> None:
    for propensity in (0.9, 0.05):
        rows = [replace(row, propensity=propensity) for row in log(count=600)]
        assert "the propensities are wrong (right ones would" in objections(rows, trained)


def test_rewards_that_are_all_the_same_give_no_verdict(trained: DifferentiableRoute) -> None:
    rows = log(reward=1.0)
    assert "no row contradicts another about the difference (+0)" in objections(rows, trained)
    lines = str(compare(rows, trained)).splitlines()
    [line] = [line for line in lines if line.startswith("doubly robust")]
    assert line.split() == ["doubly", "robust", "1", "-", "+0", "-", "300"]
    assert "no interval: what the rows say of it does not vary" in str(compare(rows, trained))


@pytest.mark.parametrize(
    ("propensity", "reason"),
    [
        (None, "propensity unknown or NaN"),
        (float("nan"), "propensity unknown or NaN"),
        (0.0, "propensity 0 or less"),
        (1.5, "propensity above 1"),
    ],
)
def test_unusable_propensities_are_named_and_too_many_give_no_verdict(
    trained: DifferentiableRoute, propensity: float | None, reason: str
) -> None:
    rows = log(count=400)
    few = compare([replace(row, propensity=propensity) for row in rows[:50]] + rows[50:], trained)
    assert few.verdict == "switch"
    assert dict(few.evaluation.unusable) == {reason: 50}
    assert few.evaluation.estimates["doubly robust"].rows == 350
    assert reason in str(few)
    message = objections([replace(row, propensity=propensity) for row in rows[:120]] + rows[120:], trained)
    assert f"120 of 400 rows have no propensity to weigh with (120 {reason})" in message


def test_a_log_without_propensities_still_gives_the_direct_method(trained: DifferentiableRoute) -> None:
    comparison = compare(log(propensity=None), trained)
    assert comparison.verdict == "no verdict"
    assert comparison.evaluation.estimates["direct method"].reward.value > 0.8
    assert "direct method" in str(comparison)


def test_rows_that_say_nothing_of_the_candidate_are_counted_by_reason(trained: DifferentiableRoute) -> None:
    rows = log(count=400)
    strays = [
        replace(rows[0], candidates=("apple", "banana")),
        replace(rows[1], candidates=("apple", "banana", "cherry", "date")),
        replace(rows[2], sole=False),
        replace(rows[3], reward=None),
        replace(rows[4], reward=float("inf")),
        replace(rows[5], chosen="date"),
        replace(rows[6], field="size"),
        replace(rows[7], source="label"),
    ]
    comparison = compare([*strays, *rows], trained)
    assert dict(comparison.set_aside) == {
        "decided among other options": 2,
        "its reward is for all decisions of its run: reward single ones by id": 1,
        "no reward": 1,
        "reward not finite": 1,
        "took what is no option": 1,
        "of another route or field": 1,
        "source 'label' is no decision that was taken": 1,
    }
    assert comparison.evaluation == compare(rows, trained).evaluation
    assert "set aside: decided among other options" in str(comparison)


def test_options_are_matched_by_name_and_not_by_place(trained: DifferentiableRoute) -> None:
    rows = log()
    turned = [replace(row, candidates=tuple(reversed(row.candidates))) for row in rows]
    assert compare(turned, trained).evaluation == compare(rows, trained).evaluation


def test_if_no_row_can_be_used_there_is_no_verdict(trained: DifferentiableRoute) -> None:
    rows = log(count=9, reward=None) + log(count=3, sole=False)
    assert objections(rows, trained) == (
        "No verdict: no row of the log can be used: no reward (9 rows); its reward is for all decisions of its run: "
        "reward single ones by id (3 rows)."
    )
    assert "effective sample size" in objections(log(count=9, example="the same"), trained)


def test_rows_of_one_example_count_as_one(trained: DifferentiableRoute) -> None:
    rows = [replace(row, example=str(int(row.example) % 20)) for row in log()]
    assert "the log is worth 1" in objections(rows, trained)


def test_rows_of_one_run_count_as_one(trained: DifferentiableRoute) -> None:
    rows = [replace(row, run=f"run {int(row.example) % 20}") for row in log()]
    assert "the log is worth 1" in objections(rows, trained)


def test_a_path_gives_what_its_rows_give(trained: DifferentiableRoute, tmp_path: Path) -> None:
    rows = log()
    write_feedback(rows, tmp_path / "log.jsonl")
    assert compare(tmp_path / "log.jsonl", trained) == compare(rows, trained)
    assert compare(str(tmp_path / "log.jsonl"), trained).verdict == "switch"


def test_a_program_is_judged_by_the_route_in_it(trained: DifferentiableRoute) -> None:
    bare = compare(log(), trained)
    for name in ("", "self.clerk", "self"):  # logged without a program, by this one, and by the route alone
        assert compare(log(route=name), Shop(trained)).evaluation == bare.evaluation


class TwoClerks(dspy.Module):
    def __init__(self, first: DifferentiableRoute, second: DifferentiableRoute) -> None:
        super().__init__()
        self.first, self.second = first, second


def test_of_several_routes_the_one_the_rows_name_is_judged(
    trained: DifferentiableRoute, wrong: DifferentiableRoute
) -> None:
    program = TwoClerks(trained, wrong)
    assert compare(log(route="self.first"), program).verdict == "switch"
    assert compare(log(mostly_right, 900, route="self.second"), program).verdict == "do not switch"
    with pytest.raises(RouteError, match=r"about several of the candidate's decisions, .*'self.first'.*'self.second'"):
        compare(log(route="self.first") + log(route="self.second"), program)
    with pytest.raises(RouteError, match="about several of the candidate's decisions"):
        compare(log(), program)
    with pytest.raises(RouteError, match=r"several routes that decide 'fruit', \['self.first', 'self.second'\]"):
        compare(log(route="self.first") + log(route="self.second"), trained)


def test_of_several_fields_the_one_named_is_judged() -> None:
    route = DifferentiableRoute("request -> fruit, ripe: bool", tools=FRUIT, encoder=bag_of_words)
    ripe = [replace(row, field="ripe", candidates=("True", "False"), chosen="True") for row in log()]
    rows = log() + ripe
    assert compare(log(), route).field == "fruit"
    assert compare(rows, route, field="ripe").field == "ripe"
    assert compare(rows, route, field="ripe").set_aside == {"of another route or field": 300}
    with pytest.raises(RouteError, match=r"'fruit' of route 'self', 'ripe' of route 'self': name one with field="):
        compare(rows, route)


def test_a_log_of_something_else_is_refused(trained: DifferentiableRoute) -> None:
    with pytest.raises(RouteError, match=r"The log decides 'size' among \['a', 'b'\].*The candidate decides .*'fruit'"):
        compare(log(field="size", candidates=("a", "b")), trained)
    with pytest.raises(RouteError, match="The log decides nothing"):
        compare([], trained)
    with pytest.raises(RouteError, match="field='size'"):
        compare(log(), trained, field="size")
    with pytest.raises(RouteError, match="holds no DifferentiableRoute"):
        compare(log(), dspy.Predict("request -> fruit"))


def test_the_report_renders_as_text_and_html(trained: DifferentiableRoute) -> None:
    comparison = compare(log(), trained)
    for estimator in ("logged policy", "direct method", "IPS", "SNIPS", "doubly robust"):
        assert estimator in str(comparison)
        assert estimator in comparison._repr_html_()
    assert "effective sample size" in str(comparison)
    assert comparison._repr_html_().startswith("<p><b>Switch: ")
    escaped = replace(comparison, objections=("<script>",))._repr_html_()
    assert "<script>" not in escaped


def test_importing_the_package_loads_no_numerics() -> None:
    code = (
        "import dspy, sys; before = set(sys.modules); import dspy_router.evaluation as evaluation;"
        "assert not {'scipy', 'sklearn'} & (set(sys.modules) - before);"
        "import dspy_router.evaluation.comparison; assert callable(evaluation.compare)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_program_is_no_better_than_itself_though_its_exploring_log_earned_less() -> None:
    route = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(90, seed=1, label=True))
    rows = []
    for example in fruit_requests(300, seed=2):
        with record_decisions() as decisions, explore_decisions(1.0, seed=len(rows)):
            chosen = route(request=example.request).fruit
        [decision] = decisions
        reward = float(chosen == example.wanted)
        rows.append(
            Feedback(
                "log", decision.text, "", "fruit", decision.text, tuple(FRUIT), chosen, decision.propensity, reward,
                id=decision.id,
            )
        )  # fmt: skip
    assert compare(rows, route).verdict == "switch"
    itself = compare(rows, route, baseline=route)
    assert itself.verdict == "do not switch"
    assert itself.evaluation.estimates["doubly robust"].difference.value == 0
    assert "the baseline would have" in itself.sentence
    untrained = compare(rows, route, baseline=fruit_route())
    assert untrained.verdict == "switch"


def test_a_log_of_which_little_can_be_used_is_said_to_be_one(trained: DifferentiableRoute) -> None:
    comparison = compare(log(count=6) + log(count=30, sole=False), trained)
    assert first_line(comparison).startswith(
        "No verdict: only 6 rows of the log can be used: its reward is for all decisions of its run"
    )
