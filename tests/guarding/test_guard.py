"""A guard's threshold holds its promise on the program's metric, and what it declines goes where the user says."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, deciding, record_decisions, replace_predictor
from dspy_router.errors import AbstainError
from dspy_router.feedback import read_feedback
from dspy_router.overrides import explore_decisions
from tests.conftest import bag_of_words
from tests.programs import FRUIT, HINTS, OTHER, PlannedShop, Shop, fruit_requests, fruit_route, right_fruit
from tests.tutorial_programs import writes

STRANGE = ["weather", "taxi", "poem", "invoice", "bridge", "violin", "comet", "sock"]


def mixed(count: int, *, seed: int) -> list[dspy.Example]:
    """Requests for a fruit, and every fifth for something that no option serves: whatever is chosen there is wrong."""
    draws = random.Random(seed)
    examples = []
    for number in range(count):
        fruit = draws.choice(FRUIT)
        strange = number % 5 == 0
        said = draws.sample(STRANGE, 3) if strange else [*draws.sample(HINTS[fruit], 1), *draws.sample(OTHER, 3)]
        draws.shuffle(said)
        request = " ".join([*said, f"{seed}x{number}"])  # never seen before
        examples.append(dspy.Example(request=request, wanted="nothing" if strange else fruit).with_inputs("request"))
    return examples


@pytest.fixture(scope="module")
def trained() -> DifferentiableRoute:
    return RouteFinetune().compile(fruit_route(), trainset=fruit_requests(600, label=True))  # type: ignore[return-value]


def guarded(trained: DifferentiableRoute, **settings: Any) -> DifferentiableRoute:
    route: DifferentiableRoute = trained.deepcopy()
    for name, value in settings.items():
        setattr(route, name, value)
    route.guard(mixed(600, seed=1), metric=right_fruit, risk=0.05, delta=0.05)
    return route


def kept_loss(route: DifferentiableRoute, examples: list[dspy.Example]) -> tuple[float, float]:
    """Mean loss of what is kept, and the share kept."""
    kept = [
        (example, prediction)
        for example, prediction in zip(examples, route.batch(examples), strict=True)
        if not prediction.decision.abstained
    ]
    return 1 - float(np.mean([right_fruit(*pair) for pair in kept])), len(kept) / len(examples)


def test_what_is_kept_loses_no_more_than_promised(trained: DifferentiableRoute) -> None:
    route = guarded(trained)
    loss, coverage = kept_loss(route, mixed(1000, seed=2))
    assert loss <= 0.05
    assert coverage > 0.6
    report = route.promise
    assert report is not None
    assert (report.risk, report.delta, report.rows, report.field, report.metric) == (
        0.05, 0.05, 600, "fruit", "right_fruit",
    )  # fmt: skip
    assert "at most 0.05 on average" in str(report)
    assert "<b>" in report._repr_html_()


def test_without_a_guard_every_request_is_decided(trained: DifferentiableRoute) -> None:
    prediction = trained(request="weather taxi poem")
    assert prediction.decision.abstained is False
    assert prediction.decision.score is None
    assert trained.promise is None


def test_what_is_declined_is_none_and_its_probabilities_are_there(trained: DifferentiableRoute) -> None:
    prediction = guarded(trained)(request="weather taxi poem")
    assert prediction.fruit is None
    assert prediction.decision.abstained
    assert sum(prediction.probabilities.values()) == pytest.approx(1)
    assert prediction.decision.score < guarded(trained).promise.threshold


def test_declining_can_be_an_error(trained: DifferentiableRoute) -> None:
    route = guarded(trained, on_abstain="raise")
    with pytest.raises(AbstainError, match="'weather taxi poem'") as raised:
        route(request="weather taxi poem")
    assert raised.value.decisions["fruit"].abstained
    assert route(request="pie please now a").fruit == "apple"


class Planner(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.think = dspy.Predict("request -> fruit")
        self.asked: list[str] = []

    def forward(self, request: str) -> dspy.Prediction:
        self.asked.append(request)
        return dspy.Prediction(fruit="cherry", why="guessed")

    async def aforward(self, request: str) -> dspy.Prediction:
        return self.forward(request)


CALLS: dict[str, Callable[..., Any]] = {
    "sync": lambda route, **inputs: route(**inputs),
    "async": lambda route, **inputs: asyncio.run(route.acall(**inputs)),
    "batch": lambda route, **inputs: route.batch([inputs])[0],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_declined_goes_to_the_fallback(trained: DifferentiableRoute, call: Callable[..., Any]) -> None:
    route = guarded(trained, fallback=Planner())
    with record_decisions() as decisions:
        declined = call(route, request="weather taxi poem")
        kept = call(route, request="pie please now a")
    assert (declined.fruit, declined.why, declined.decision.name) == ("cherry", "guessed", "cherry")
    assert (kept.fruit, kept.decision.abstained) == ("apple", False)
    assert route.fallback.asked == ["weather taxi poem"]
    assert [decision.abstained for decision in decisions] == [True, False]


def test_the_fallback_is_part_of_the_program(trained: DifferentiableRoute, tmp_path: Path) -> None:
    shop = Shop(guarded(trained, fallback=Planner()))
    assert [name for name, _ in shop.named_predictors()] == ["clerk.fallback.think"]
    shop.clerk.fallback.think.demos = [dspy.Example(request="pie", fruit="apple")]
    shop.save(tmp_path / "shop.json")
    fresh = Shop(DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=bag_of_words, fallback=Planner()))
    fresh.load(tmp_path / "shop.json")
    assert fresh.clerk.promise == shop.clerk.promise
    assert len(fresh.clerk.fallback.think.demos) == 1
    assert fresh(request="weather taxi poem").fruit == "cherry"


def test_a_fallback_that_raises_or_answers_something_else_is_told(trained: DifferentiableRoute) -> None:
    class Broken(dspy.Module):
        def forward(self, request: str) -> dspy.Prediction:
            if "poem" in request:
                raise ZeroDivisionError("the planner is down")
            return dspy.Prediction(answer="?")

    route = guarded(trained, fallback=Broken())
    with pytest.raises(ZeroDivisionError, match="the planner is down"):
        route(request="weather taxi poem")
    with pytest.raises(RouteError, match="without the field 'fruit'"):
        route(request="weather taxi sock")


def test_nobody_learns_from_what_was_declined(trained: DifferentiableRoute, tmp_path: Path) -> None:
    shop = Shop(guarded(trained))
    with record_decisions(tmp_path / "log.jsonl", program=shop) as run, explore_decisions(1.0, seed=0):
        shop(request="weather taxi poem")
        shop(request="pie please now a")
    run.reward(1.0)
    assert [row.text for row in read_feedback(tmp_path / "log.jsonl")] == ["pie please now a"]


def test_a_guard_set_with_a_fallback_says_so_where_there_is_none(
    trained: DifferentiableRoute, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(trained, fallback=Planner()).save(tmp_path / "route.json")
    deciding._told_of_fallback.clear()  # each route's guard is told of once in a process, and tests share theirs
    for settings, told in [({"fallback": Planner()}, 0), ({"on_abstain": "raise"}, 0), ({}, 1)]:
        fresh = fruit_route(**settings)
        fresh.load(tmp_path / "route.json")
        for request in ("pie please now a", "cider please now a"):
            fresh(request=request)
        said = [record for record in caplog.records if "was set with a fallback" in record.getMessage()]
        assert len(said) == told, settings
    own = guarded(trained)  # set without
    caplog.clear()
    own(request="weather taxi poem")
    assert not caplog.records


def test_the_old_planner_as_fallback_answers_what_is_declined(scripted_lm: Any) -> None:
    program = PlannedShop()
    routed = replace_predictor(program, "clerk", fallback=program.clerk, encoder=bag_of_words)
    routed = RouteFinetune().compile(routed, trainset=fruit_requests(600, label=True))
    routed.clerk.guard(mixed(600, seed=1), metric=right_fruit, risk=0.05, program=routed)
    server = scripted_lm(writes({"fruit": "cherry"}))
    with dspy.context(lm=server.lm):
        assert routed(request="pie please now a").fruit == "apple"
        assert not server.requests
        assert routed(request="weather taxi poem").fruit == "cherry"
    assert len(server.requests) == 1


def test_copies_of_rows_are_not_taken_for_independent_ones(
    trained: DifferentiableRoute, caplog: pytest.LogCaptureFixture
) -> None:
    route: DifferentiableRoute = trained.deepcopy()
    report = route.guard(mixed(60, seed=1) * 10, metric=right_fruit, risk=0.05)
    [record] = caplog.records
    assert "The 600 calibration rows hold 60 different texts" in record.getMessage()
    assert "60 different texts" in str(report)
    caplog.clear()
    assert "different texts" not in str(route.guard(mixed(600, seed=1), metric=right_fruit, risk=0.05))
    assert not caplog.records


def test_no_threshold_declines_everything(trained: DifferentiableRoute) -> None:
    route: DifferentiableRoute = trained.deepcopy()
    report = route.guard(mixed(600, seed=1), metric=lambda example, prediction: 0.0, risk=0.02)
    assert report.threshold is None
    assert "No threshold" in str(report)
    assert route(request="pie please now a").fruit is None


def test_the_promise_can_be_about_the_whole_program(trained: DifferentiableRoute) -> None:
    shop = Shop(trained.deepcopy())
    report = shop.clerk.guard(mixed(600, seed=1), metric=right_fruit, risk=0.05, program=shop)
    assert report == guarded(trained).promise


def test_a_guard_ends_with_the_next_training_and_promises_nothing_of_another_head(
    trained: DifferentiableRoute, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    route = guarded(trained)
    with torch.no_grad():
        route.head["fruit"].bias += 0.01
    assert route.promise is None
    assert route(request="weather taxi poem").fruit is None  # it goes on declining
    assert "promises nothing" in caplog.text
    again = RouteFinetune().compile(route, trainset=fruit_requests(60, label=True))
    assert again.learned.guard is None
    assert route.learned.guard is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": mixed(30, seed=1)}, r"30 calibration rows .* are needed"),
        (
            {"examples": [*mixed(500, seed=1), *fruit_requests(100, seed=0)]},
            r"trained on 100 of the 600 calibration examples, such as ('[\w ]+'(, |: )){3}.*not in training\.$",
        ),
        ({"metric": lambda example, prediction: 7}, r"metric gave 7.0 .* in \[0, 1\]"),
        ({"examples": []}, "nothing in the calibration examples"),
        ({"risk": 0.0}, "risk=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"program": dspy.Predict("request -> fruit")}, "No LM is loaded"),
        (
            {"metric": lambda example, prediction: prediction.answer == example.wanted},
            r"own prediction, whose fields are \['fruit', 'decisions', .*no attribute 'answer'.*program=program",
        ),
    ],
    ids=["few", "trained", "metric", "none", "risk", "delta", "program", "answer"],
)
def test_what_no_promise_can_be_made_from_is_refused(
    trained: DifferentiableRoute, settings: dict[str, Any], message: str
) -> None:
    route: DifferentiableRoute = trained.deepcopy()
    given = {"examples": mixed(600, seed=1), "metric": right_fruit, "risk": 0.05, **settings}
    with pytest.raises(ValueError, match=message):
        route.guard(given.pop("examples"), **given)
    assert route.promise is None


def test_a_calibration_run_that_raises_is_named_with_its_example(trained: DifferentiableRoute) -> None:
    def judge(example: dspy.Example, prediction: dspy.Prediction) -> float:
        raise ConnectionError("the judge is down")

    with pytest.raises(RouteError, match=r"calibration run of \{'request': .*the judge is down.*reward of 0") as raised:
        trained.deepcopy().guard(mixed(600, seed=1), metric=judge, risk=0.05)
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_a_program_that_does_not_call_the_route_is_named(trained: DifferentiableRoute) -> None:
    class Other(dspy.Module):
        def forward(self, request: str) -> dspy.Prediction:
            return dspy.Prediction(fruit="apple")

    with pytest.raises(RouteError, match="decided nothing in 600 runs"):
        trained.deepcopy().guard(mixed(600, seed=1), metric=right_fruit, program=Other())


def test_which_inputs_were_trained_on_is_known_after_loading(trained: DifferentiableRoute, tmp_path: Path) -> None:
    trained.save(tmp_path / "route.json")
    fresh = fruit_route()
    fresh.load(tmp_path / "route.json")
    assert fresh.trained_on(request=fruit_requests(1)[0].request)
    assert not fresh.trained_on(request="weather taxi poem")
    assert np.array_equal(fresh.score(["weather taxi poem"]), trained.score(["weather taxi poem"]))


def test_an_unsound_setting_is_refused() -> None:
    with pytest.raises(RouteError, match="on_abstain='shrug'"):
        fruit_route(on_abstain="shrug")


# Candidates


def test_candidates_of_a_call_are_all_that_can_be_chosen(trained: DifferentiableRoute) -> None:
    free = trained(request="pie please now a")
    masked = trained(request="pie please now a", candidates=["cherry", "banana"])
    assert list(masked.probabilities) == ["banana", "cherry"]  # the declared order
    assert masked.fruit in ("banana", "cherry")
    ratio = masked.probabilities["banana"] / masked.probabilities["cherry"]
    assert ratio == pytest.approx(free.probabilities["banana"] / free.probabilities["cherry"])
    assert sum(masked.probabilities.values()) == pytest.approx(1)
    assert trained(request="pie", candidates="cherry").confidence == 1
    with explore_decisions(1.0, seed=0):
        assert {trained(request="pie", candidates=["cherry", "banana"]).fruit for _ in range(40)} == {
            "banana",
            "cherry",
        }


def test_candidates_count_in_the_score_as_in_a_call(trained: DifferentiableRoute) -> None:
    requests, masked = [example.request for example in mixed(20, seed=4)], ["cherry", "banana"]
    route = guarded(trained)
    scores = route.score(requests, candidates=masked)
    in_calls = [route(request=request, candidates=masked).decision.score for request in requests]
    np.testing.assert_allclose(scores, in_calls, atol=1e-4)
    assert not np.allclose(scores, route.score(requests))
    np.testing.assert_array_equal(route.score(requests, candidates={"fruit": masked}), scores)
    with pytest.raises(RouteError, match=r"\['fig'\] are no options"):
        route.score(requests, candidates=["fig"])


@pytest.mark.parametrize(
    ("candidates", "message"),
    [([], "none to choose"), (["fig"], r"\['fig'\] are no options"), ({"size": ["x"]}, "'size'")],
)
def test_candidates_that_are_none_are_named(trained: DifferentiableRoute, candidates: Any, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        trained(request="pie", candidates=candidates)


def test_an_input_named_candidates_stays_an_input() -> None:
    route = DifferentiableRoute("candidates -> fruit", tools=FRUIT, encoder=bag_of_words)
    assert route(candidates="a banana").fruit == "banana"
