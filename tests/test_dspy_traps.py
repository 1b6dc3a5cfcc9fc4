"""One test for each trap of the host that a route must not fall into."""

import copy
import time
from pathlib import Path

import dspy
import pytest
import torch
from dspy.propose.utils import get_dspy_source_code

from dspy_router import DecisionClient, RouteError, RouteFinetune, record_decisions
from tests.conftest import bag_of_words
from tests.programs import PlannedShop, Shop, fruit_requests, fruit_route, right_fruit


class Mall(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shop = Shop()
        self.greeter = dspy.Predict("name -> greeting")


def trained() -> dspy.Module:
    return RouteFinetune().compile(fruit_route(), trainset=fruit_requests(90, seed=1, label=True))


def test_a_route_marked_compiled_stays_in_its_parents_state(tmp_path: Path) -> None:
    shop = Shop(trained())
    shop.clerk._compiled = True
    assert [name for name, _ in shop.named_parameters()] == ["clerk.learned"]
    shop.save(tmp_path / "shop.json")
    fresh = Shop()
    fresh.load(tmp_path / "shop.json")
    assert fresh(request="cider").fruit == "apple"


def test_a_compiled_program_can_be_nested_and_saved(tmp_path: Path) -> None:
    mall = Mall()
    mall.shop = RouteFinetune(right_fruit).compile(Shop(), trainset=fruit_requests(30))
    mall.save(tmp_path / "mall.json")
    fresh = Mall()
    fresh.load(tmp_path / "mall.json")
    request = fruit_requests(1)[0].request
    assert fresh.shop.clerk(request=request).probabilities == mall.shop.clerk(request=request).probabilities


def test_set_lm_and_get_lm_pass_a_route_by() -> None:
    mall = Mall()
    lm = dspy.LM("openai/any")
    mall.set_lm(lm)
    assert mall.get_lm() is lm
    assert not hasattr(mall.shop.clerk, "lm")


def test_a_failed_load_state_leaves_the_program_unchanged() -> None:
    mall = Mall()
    state = mall.dump_state()
    before = mall.shop.clerk(request="apple pie").probabilities
    state["greeter"]["signature"]["instructions"] = "Changed."
    state["shop.clerk.learned"]["tensors"] = state["shop.clerk.learned"]["tensors"][:-100]
    with pytest.raises(RouteError, match="damaged"):
        mall.load_state(state)
    assert mall.shop.clerk(request="apple pie").probabilities == before
    assert mall.greeter.signature.instructions != "Changed."


def test_reset_copy_keeps_a_trained_head() -> None:
    shop = Shop(trained())
    request = "cider now"
    assert shop.reset_copy().clerk(request=request).probabilities == shop.clerk(request=request).probabilities


def test_reset_copy_drops_the_lm_of_every_predictor_a_decision_client_included() -> None:
    # DSPy does so with any LM; the README says to set it again. It is the route itself that keeps its head.
    shop = PlannedShop()
    shop.clerk.lm = DecisionClient(encoder=bag_of_words)
    assert shop.reset_copy().clerk.lm is None
    assert shop.clerk.lm is not None


def test_deepcopy_is_cheap_and_shares_the_encoder() -> None:
    shop = Shop(trained())
    copied = shop.deepcopy()
    assert copied.clerk.encoder is shop.clerk.encoder
    assert copied.clerk.head is not shop.clerk.head
    times = []
    for _ in range(20):
        started = time.perf_counter()
        copy.deepcopy(shop)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.002


def test_a_copy_learns_by_itself() -> None:
    shop = Shop()
    copied = shop.deepcopy()
    with torch.no_grad():
        copied.clerk.head["fruit"].bias[2] = 100.0
    assert copied(request="apple").fruit == "cherry"
    assert shop(request="apple").fruit == "apple"


def test_the_trace_holds_no_step_of_a_route() -> None:
    with dspy.context(trace=[]), record_decisions() as decisions:
        Shop()(request="apple")
        assert dspy.settings.trace == []
    assert len(decisions) == 1


def test_the_source_code_of_a_program_with_a_route_can_be_read() -> None:
    shop = Shop(trained())
    shop.helper = dspy.Predict("a -> b")
    assert "class Shop" in get_dspy_source_code(shop)


def test_predictors_inside_a_route_stay_visible() -> None:
    shop = Shop()
    shop.clerk.fallback = PlannedShop()
    assert [name for name, _ in shop.named_predictors()] == ["clerk.fallback.clerk"]


def test_evaluate_shares_a_route_between_threads() -> None:
    devset = fruit_requests(60)
    scores = {
        dspy.Evaluate(devset=devset, metric=right_fruit, num_threads=threads)(Shop(trained())).score
        for threads in (1, 16)
    }
    assert scores == {100.0}


def test_a_route_is_seen_by_callbacks() -> None:
    seen = []

    class Watch(dspy.utils.BaseCallback):
        def on_module_start(self, call_id: str, instance: object, inputs: dict) -> None:
            seen.append(("start", type(instance).__name__))

        def on_module_end(self, call_id: str, outputs: object, exception: Exception | None) -> None:
            seen.append(("end", outputs.fruit))

    with dspy.context(callbacks=[Watch()]):
        fruit_route()(request="apple")
    assert seen == [("start", "DifferentiableRoute"), ("end", "apple")]
