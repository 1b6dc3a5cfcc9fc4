import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune
from dspy_router.feedback import Feedback
from dspy_router.optimizers.frontier import frontier
from dspy_router.optimizers.graded import graded_targets
from dspy_router.optimizers.learner import field_rows, fit_routes
from dspy_router.optimizers.outcomes import RewardReading
from tests.conftest import bag_of_words
from tests.programs import FRUIT, Shop, Wrapping, fruit_requests, fruit_route, orders, right_order

HARD, EASY = ["prove", "derive"], ["greet", "thank"]


class Helpdesk(dspy.Module):
    """A route chooses between one LM call and two; what is hard is answered rightly only after a draft."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = DifferentiableRoute("request -> effort: Literal['once', 'twice']", encoder=bag_of_words)
        self.draft = dspy.Predict("request -> draft")
        self.answer = dspy.Predict("request, draft -> reply")

    def forward(self, request: str) -> dspy.Prediction:
        effort = self.choose(request=request).effort
        draft = self.draft(request=request).draft if effort == "twice" else "none"
        return dspy.Prediction(effort=effort, reply=self.answer(request=request, draft=draft).reply)


def scripted_answer(text: str) -> str:
    if "starting with the field `[[ ## draft ## ]]`" in text:
        return "[[ ## draft ## ]]\nthought through\n\n[[ ## completed ## ]]"
    hard = any(word in text.split() for word in HARD)
    reply = "unsure" if hard and "thought through" not in text else "right"
    return f"[[ ## reply ## ]]\n{reply}\n\n[[ ## completed ## ]]"


def helpdesk_requests(count: int, *, seed: int = 0) -> list[dspy.Example]:
    random_ = random.Random(seed)
    return [
        dspy.Example(
            request=f"{random_.choice(HARD if number % 2 else EASY)} {' '.join(random_.sample('abcdefg', 3))}",
            wanted="twice" if number % 2 else "once",
        ).with_inputs("request")
        for number in range(count)
    ]


def replied_rightly(example: dspy.Example, prediction: dspy.Prediction) -> bool:
    return prediction.reply == "right"


def efforts(program: dspy.Module) -> tuple[float, float]:
    """Share of easy and of hard requests that get two calls."""
    found = [
        (example.wanted, program.choose(request=example.request).effort) for example in helpdesk_requests(60, seed=9)
    ]
    easy, hard = ([effort == "twice" for wanted, effort in found if wanted == kind] for kind in ("once", "twice"))
    return float(np.mean(easy)), float(np.mean(hard))


def compiled(server: Any, optimizer: RouteFinetune, count: int = 60) -> dspy.Module:
    with dspy.context(lm=server.lm):
        return optimizer.compile(Helpdesk(), trainset=helpdesk_requests(count, seed=1))


def test_a_weight_on_tokens_makes_a_route_take_the_cheaper_of_two_right_options(
    scripted_lm: Callable[..., Any], tmp_path: Path
) -> None:
    server = scripted_lm(scripted_answer)
    optimizer = RouteFinetune(replied_rightly, max_metric_calls=120, cost_weight=0.01, cost_unit="tokens")
    program = compiled(server, optimizer)
    easy, hard = efforts(program)
    assert easy < 0.1
    assert hard > 0.9

    report = optimizer.report
    assert report.tokens == 25 * len(server.requests)
    # Right answers everywhere for 25 tokens an easy request and 50 a hard one is the best there is.
    points = report.frontier
    [asked] = [point for point in points if point.cost_weight == pytest.approx(0.01)]
    assert asked.reward > 0.9
    assert asked.cost == pytest.approx(37.5, abs=3)
    assert all(first.cost_weight < second.cost_weight for first, second in pairwise(points))
    assert points[-1].cost <= asked.cost + 1
    assert points[-1].cost < points[0].cost

    assert "tokens a run" in str(report)
    assert f"{asked.cost:.4g}" in str(report)
    html = report._repr_html_()
    assert "tokens a run" in html
    assert "<svg" in html
    picture = report.save_frontier(tmp_path / "frontier.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [entry["cost"] for entry in report.to_dict()["frontier"]] == [point.cost for point in points]


def test_so_dear_a_token_buys_no_right_answer(scripted_lm: Callable[..., Any]) -> None:
    optimizer = RouteFinetune(replied_rightly, max_metric_calls=80, cost_weight=0.1, cost_unit="tokens")
    easy, hard = efforts(compiled(scripted_lm(scripted_answer), optimizer, count=40))
    assert easy < 0.1
    assert hard < 0.1


def test_a_weight_on_dollars_of_a_model_without_a_price_is_an_error(scripted_lm: Callable[..., Any]) -> None:
    optimizer = RouteFinetune(replied_rightly, max_metric_calls=8, cost_weight=10.0)
    with pytest.raises(RouteError, match=r"a run of \d+ tokens has no known price.*Give cost_unit='tokens'"):
        compiled(scripted_lm(scripted_answer), optimizer, count=8)


def test_without_a_weight_on_it_the_frontier_is_shown_all_the_same(scripted_lm: Callable[..., Any]) -> None:
    optimizer = RouteFinetune(replied_rightly, max_metric_calls=40, cost_unit="tokens")
    compiled(scripted_lm(scripted_answer), optimizer, count=20)
    assert {point.cost_weight for point in optimizer.report.frontier} > {0.0}


SCORES = {
    "between nothing and the best": (0.7, 0.2),
    "below nothing": (-0.2, -0.8),
    "a hundred times as large": (70.0, 20.0),
}


@pytest.mark.parametrize(("right", "wrong"), SCORES.values(), ids=SCORES.keys())
def test_a_graded_metric_teaches_the_better_option(right: float, wrong: float) -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction) -> float:
        return right if prediction.fruit == example.wanted else wrong

    best = 100.0 if right > 1 else 1.0
    optimizer = RouteFinetune(metric, max_metric_calls=270, best_reward=best)
    program = optimizer.compile(Shop(), trainset=fruit_requests(90, seed=1))
    test = fruit_requests(90, seed=9)
    assert np.mean([program(request=example.request).fruit == example.wanted for example in test]) > 0.9
    assert {row.reward for row in optimizer.feedback} == {right, wrong}


def test_a_graded_judge_that_wavers_teaches_the_better_option() -> None:
    generator = np.random.default_rng(0)

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> float:
        return (0.6 if prediction.fruit == example.wanted else 0.4) + 0.1 * generator.standard_normal()

    optimizer = RouteFinetune(metric, max_metric_calls=600, num_threads=1)
    program = optimizer.compile(Shop(), trainset=fruit_requests(150, seed=1))
    test = fruit_requests(90, seed=9)
    assert np.mean([program(request=example.request).fruit == example.wanted for example in test]) > 0.85


def test_several_decisions_a_run_learn_from_one_graded_reward() -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction) -> float:
        return 0.6 * (prediction.fruit == example.wanted) + 0.3 * (prediction.size == example.wanted_size)

    optimizer = RouteFinetune(metric, max_metric_calls=900)
    program = optimizer.compile(Wrapping(), trainset=orders(150, seed=1))
    test = orders(90, seed=9)
    assert np.mean([right_order(example, program(request=example.request)) for example in test]) > 0.8


def rollout(text: str, chosen: str, reward: float, **more: Any) -> Feedback:
    return Feedback("rollout", text, "self", "fruit", text, tuple(FRUIT), chosen, 1.0, reward, **more)


def test_targets_are_net_rewards_scaled_to_between_0_and_1() -> None:
    rows = [
        rollout("a", "apple", 3.0, tokens=100), rollout("a", "banana", 1.0, tokens=0),
        rollout("b", "apple", 0.0, tokens=0), rollout("b", "cherry", 5.0, tokens=100),
    ]  # fmt: skip
    reading = RewardReading(best_reward=5.0, cost_weight=0.01, cost_unit="tokens")
    found = graded_targets({"self": fruit_route()}, rows, reading)["self", "fruit"]
    targets = {name[:2]: target for name, (_, target, _) in found.items()}
    np.testing.assert_allclose(targets["a", "a"][:2], [0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(targets["b", "b"][[0, 2]], [0.0, 1.0], rtol=1e-6)


def test_runs_that_all_earned_the_same_teach_nothing() -> None:
    rows = [rollout("a", "apple", 0.5), rollout("b", "banana", 0.5)]
    assert field_rows({"self": fruit_route()}, rows) == []


def test_what_counts_as_graded() -> None:
    def graded(*rewards: float, error: str | None = None, **reading: float) -> bool:
        rows = [rollout("a", "apple", reward, error=error) for reward in rewards]
        return RewardReading(**reading).graded(rows)

    assert not graded(0.0, 1.0)
    assert not graded(-1.0, 1.0)
    assert not graded(0.0, 2.0)  # better than the best is the best
    assert not graded(0.3, error="the score of a run that raised")
    assert graded(0.5)
    assert graded(-0.3, -0.7)
    assert graded(-1.0, 0.0, 1.0)
    assert graded(3.0, 5.0, best_reward=5.0)
    assert graded(1.0, cost_weight=0.1)


def test_the_frontier_does_not_depend_on_the_order_of_the_log() -> None:
    # Odd rows want apple, even rows banana: halves by position would each miss what the other half needs.
    rows = []
    for number, example in enumerate(fruit_requests(120, seed=1)):
        request, wanted = (f"pie {example.request}", "apple") if number % 2 else (f"split {example.request}", "banana")
        for chosen in FRUIT[:2]:
            rows.append(rollout(request, chosen, float(chosen == wanted), tokens=10 if chosen == "apple" else 5))
    [free, *_] = frontier({"self": fruit_route()}, rows, RewardReading(cost_unit="tokens"))
    assert free.reward > 0.9


def test_there_is_no_frontier_of_runs_that_cost_the_same_or_share_their_reward() -> None:
    routes = {"self": fruit_route()}
    reading = RewardReading(cost_unit="tokens")
    rows = [rollout(text, fruit, float(fruit == "apple"), tokens=7) for text in "abcd" for fruit in FRUIT]
    assert frontier(routes, rows, reading) == ()
    shared = [rollout(text, "apple", 1.0, tokens=number, sole=False, run=text) for number, text in enumerate("abcd")]
    assert frontier(routes, shared, reading) == ()


def test_rows_fit_the_heads_to_what_earns_most() -> None:
    routes = {"self": fruit_route()}
    rows = [
        rollout(example.request, fruit, 0.9 if fruit == example.wanted else 0.1)
        for example in fruit_requests(60, seed=1)
        for fruit in FRUIT
    ]
    [entry] = found = field_rows(routes, rows)
    before = entry.agreement()
    fit_routes(found)
    assert entry.agreement() > 0.95 > before


def test_a_best_reward_that_is_added_up_from_parts_is_the_best() -> None:
    whole = 0.3 + 0.6 + 0.1
    assert whole < 1
    row = Feedback("rollout", "example 1", "self", "fruit", "a fig", ("fig", "date"), "fig", 1.0, whole)
    assert RewardReading().success(row)
    assert not RewardReading().success(replace(row, reward=0.999))
    assert not RewardReading().graded([row, replace(row, reward=0.0)])


def test_scores_above_the_best_reward_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    def percent(example: dspy.Example, prediction: dspy.Prediction) -> float:
        return 30.0 + 70.0 * (prediction.fruit == example.wanted)

    trainset = [
        dspy.Example(**example.inputs(), wanted=FRUIT[number % len(FRUIT)]).with_inputs("request")
        for number, example in enumerate(fruit_requests(9))
    ]
    optimizer = RouteFinetune(percent)
    optimizer.compile(fruit_route(), trainset=trainset)
    assert "more than best_reward=1: from there on every score counts as the best" in caplog.text
    assert "more than best_reward=1" in str(optimizer.report)
    caplog.clear()
    RouteFinetune(percent, best_reward=100).compile(fruit_route(), trainset=trainset)
    assert "best_reward" not in caplog.text
