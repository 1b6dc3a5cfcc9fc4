import random
from collections import Counter
from typing import Any

import dspy
import numpy as np
import pytest

from dspy_router import RouteFinetune
from dspy_router.decisions import choosing, recording
from dspy_router.optimizers.override import RunOverride, Site, route_names
from dspy_router.optimizers.rollouts import Job, RolloutRunner, keyed
from dspy_router.optimizers.runs import find_routes
from dspy_router.overrides import EVEN_SHARE, force_decisions
from tests.programs import (
    AsyncBasket,
    Basket,
    Market,
    Shop,
    ThreadedBasket,
    fruit_requests,
    fruit_route,
    order_route,
    right_fruit,
)

BASKETS = [Basket, ThreadedBasket, AsyncBasket]


def run(
    program: dspy.Module, forced: dict[Site, str] | None = None, seed: int | None = None
) -> tuple[dspy.Prediction, RunOverride]:
    names = {id(route): name for name, route in find_routes(program).items()}
    draws = None if seed is None else random.Random(seed)
    override = RunOverride(names, list((forced or {}).items()), draws)
    with choosing(override), recording(override):
        return program(request="a pie please"), override


def test_every_route_of_a_program_is_forced_wherever_it_is_held() -> None:
    forced = {
        Site("self.stalls[0]", "fruit", 0): "apple",
        Site("self.stalls[1]", "fruit", 0): "banana",
        Site("self.carts[east]", "fruit", 0): "cherry",
        Site("self.shop.clerk", "fruit", 0): "banana",
        Site("self.orders", "fruit", 0): "cherry",
        Site("self.orders", "size", 0): "large",
    }
    prediction, override = run(Market(), forced)
    assert prediction.fruits == list(forced.values())[:4]
    assert prediction.order == ("cherry", "large")
    assert {decision.site: decision.chosen for decision in override.decisions} == forced
    assert all(decision.propensity == 1.0 for decision in override.decisions)


def test_what_is_not_forced_is_the_policys_likeliest() -> None:
    program = Market()
    plain = program(request="a pie please")
    prediction, override = run(program, {Site("self.stalls[1]", "fruit", 0): "cherry"})
    assert prediction.fruits == [plain.fruits[0], "cherry", *plain.fruits[2:]]
    assert prediction.order == plain.order
    assert len(override.decisions) == 6


def test_fields_of_one_call_are_forced_one_by_one() -> None:
    program = order_route()
    for size in ("small", "large"):
        prediction, override = run(program, {Site("self", "size", 0): size})
        assert prediction.size == size
        assert [decision.site.field for decision in override.decisions] == ["fruit", "size"]


def test_the_calls_of_a_loop_are_forced_each_for_itself() -> None:
    wanted = ["cherry", "apple", "banana", "apple"]
    sites = [Site("self.clerk", "fruit", number) for number in range(4)]
    prediction, override = run(Basket(), dict(zip(sites, wanted, strict=True)))
    assert prediction.fruits == wanted
    assert [decision.site for decision in override.decisions] == sites
    assert [decision.text.split()[-1] for decision in override.decisions] == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize("basket", BASKETS)
def test_calls_side_by_side_are_each_forced_once_and_recorded_with_what_they_read(basket: type[Basket]) -> None:
    wanted = ["cherry", "apple", "banana", "apple"]
    forced = {Site("self.clerk", "fruit", number): fruit for number, fruit in enumerate(wanted)}
    for _ in range(20):
        program = basket()
        prediction, override = run(program, forced)
        assert {decision.site: decision.chosen for decision in override.decisions} == forced
        taken = {decision.text: decision.chosen for decision in override.decisions}
        assert [taken[text] for text in program.texts("a pie please")] == prediction.fruits
        assert sorted(prediction.fruits) == sorted(wanted)


@pytest.mark.parametrize("basket", BASKETS)
def test_calls_side_by_side_are_drawn_with_the_propensities_recorded(basket: type[Basket]) -> None:
    program = basket()
    prediction, override = run(program, {Site("self.clerk", "fruit", 2): "banana"}, seed=1)
    found = {decision.text: decision for decision in override.decisions}
    assert [found[text].chosen for text in program.texts("a pie please")] == prediction.fruits
    for text, decision in found.items():
        if decision.site.occurrence == 2:
            assert (decision.chosen, decision.propensity) == ("banana", 1.0)
        else:
            policy = program.clerk(request=text).probabilities[decision.chosen]
            assert decision.propensity == pytest.approx((1 - EVEN_SHARE) * policy + EVEN_SHARE / 3)


def test_draws_come_as_often_as_their_propensities_say() -> None:
    program, count = Shop(), 4000
    seen: Counter[str] = Counter()
    propensities: dict[str, set[float]] = {}
    draws = random.Random(0)
    names = {id(route): name for name, route in find_routes(program).items()}
    for _ in range(count):
        override = RunOverride(names, draws=draws)
        with choosing(override), recording(override):
            prediction = program(request="banana banana please now")
        [decision] = override.decisions
        assert decision.chosen == prediction.fruit
        seen[decision.chosen] += 1
        propensities.setdefault(decision.chosen, set()).add(decision.propensity)
    assert all(len(values) == 1 for values in propensities.values())
    expected = {name: values.pop() for name, values in propensities.items()}
    assert sum(expected.values()) == pytest.approx(1.0)
    assert max(expected.values()) > 2 * min(expected.values())
    for name, propensity in expected.items():
        error = np.sqrt(propensity * (1 - propensity) / count)
        assert seen[name] / count == pytest.approx(propensity, abs=4 * error)


def test_the_impossible_is_drawn_now_and_then() -> None:
    route = object()
    override = RunOverride({id(route): "self"}, draws=random.Random(0))
    drawn = [override.choose(route, "fruit", {"sure": 1.0, "never": 0.0}, "sure") for _ in range(500)]
    assert Counter(drawn)[1, EVEN_SHARE / 2] == pytest.approx(50, abs=28)


def drawn_rollouts(seed: int, threads: int, look: int = 0) -> list[list[tuple[str, float]]]:
    program = Market()
    runner = RolloutRunner(
        program, find_routes(program), None, num_threads=threads, failure_score=0.0, max_errors=5, seed=seed
    )
    jobs = [Job(index, look=look, sampled=True) for index in range(8)]
    rollouts = runner.run(jobs, keyed(fruit_requests(8)), phase="train")
    return [[(decision.chosen, decision.propensity) for decision in rollout.decisions] for rollout in rollouts]


def test_a_seed_draws_the_same_in_one_thread_and_in_many() -> None:
    assert drawn_rollouts(seed=3, threads=1) == drawn_rollouts(seed=3, threads=4)
    assert drawn_rollouts(seed=3, threads=1) != drawn_rollouts(seed=4, threads=1)
    assert drawn_rollouts(seed=3, threads=1) != drawn_rollouts(seed=3, threads=1, look=1)


def test_rollouts_side_by_side_do_not_hear_each_other() -> None:
    program = ThreadedBasket()
    runner = RolloutRunner(program, find_routes(program), right_fruit, num_threads=4, failure_score=0.0, max_errors=99)
    fruits = ["apple", "banana", "cherry"]
    jobs = [
        Job(index, tuple((Site("self.clerk", "fruit", number), fruits[index % 3]) for number in range(4)))
        for index in range(12)
    ]
    for index, rollout in enumerate(runner.run(jobs, keyed(fruit_requests(12)), phase="train")):
        assert [decision.chosen for decision in rollout.decisions] == [fruits[index % 3]] * 4
        assert sorted(decision.site.occurrence for decision in rollout.decisions) == [0, 1, 2, 3]


def test_an_override_of_the_program_itself_decides_and_is_recorded() -> None:
    class Insisting(Basket):
        def forward(self, request: str) -> dspy.Prediction:
            first = self.clerk(request=request).fruit
            with force_decisions({"fruit": "cherry"}):
                rest = super().forward(request).fruits
            return dspy.Prediction(fruits=[first, *rest, self.clerk(request=request).fruit])

    forced = {Site("self.clerk", "fruit", number): "banana" for number in range(6)}
    prediction, override = run(Insisting(), forced)
    assert prediction.fruits == ["banana", *["cherry"] * 4, "banana"]
    assert [decision.chosen for decision in override.decisions] == prediction.fruits
    assert [decision.site for decision in override.decisions] == list(forced)


def test_routes_of_other_programs_are_left_alone() -> None:
    stranger = Shop()
    override = RunOverride({}, [(Site("self.clerk", "fruit", 0), "cherry")], random.Random(0))
    with choosing(override), recording(override):
        assert stranger(request="apple apple").fruit == "apple"
    assert override.decisions == []


def test_a_route_copied_by_the_program_while_it_runs_is_still_forced(scripted_lm: Any) -> None:
    server = scripted_lm(lambda text: "")
    program = Shop()
    program.talk = dspy.Predict("request -> reply")  # BestOfN asks for the program's LM
    best = dspy.BestOfN(module=program, N=2, reward_fn=lambda arguments, prediction: 0.0, threshold=1.0)
    run = RunOverride(route_names({"self.clerk": program.clerk}), ((Site("self.clerk", "fruit", 0), "cherry"),))
    with dspy.context(lm=server.lm), recording(run), choosing(run):
        best(request="pie please")
    assert run.decisions[0].chosen == "cherry"
    assert {decision.site.route for decision in run.decisions} == {"self.clerk"}


def test_what_a_call_could_not_choose_is_neither_tried_nor_learned_from() -> None:
    class Stall(dspy.Module):
        """A stall that has run out of cherries."""

        def __init__(self) -> None:
            super().__init__()
            self.clerk = fruit_route()

        def forward(self, request: str) -> dspy.Prediction:
            return dspy.Prediction(fruit=self.clerk(request=request, candidates=["apple", "banana"]).fruit)

    optimizer = RouteFinetune(metric=lambda *_: False, max_metric_calls=60, metric_noise=0.0)
    optimizer.compile(Stall(), trainset=fruit_requests(6))
    assert {row.candidates for row in optimizer.feedback} == {("apple", "banana")}
    assert {row.chosen for row in optimizer.feedback} == {"apple", "banana"}
    assert len(optimizer.feedback) == 12  # nothing has succeeded yet, so where one of two failed the other is tried too
