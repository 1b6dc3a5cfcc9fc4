import litellm
import pytest

from dspy_router import RouteError
from dspy_router.costs import call_cost, run_costs, usage_cost


def test_costs_come_from_litellms_table() -> None:
    price = litellm.model_cost["gpt-4.1"]
    call = 75 * price["input_cost_per_token"] + 75 * price["output_cost_per_token"]
    costs = run_costs("gpt-4.1")
    assert costs.planned == pytest.approx(3 * call)
    assert costs.routed == pytest.approx(call)
    assert f"{3e3 * call:.3f}" in str(costs)
    assert "67%" in str(costs)


def test_an_unknown_model_is_named() -> None:
    assert call_cost("no-such-model", 1, 1) is None
    with pytest.raises(RouteError, match="no price for model 'no-such-model'"):
        run_costs("no-such-model")


def test_usage_without_a_price_counts_tokens() -> None:
    usage = {"gpt-4.1": {"prompt_tokens": 10, "completion_tokens": 5}}
    assert usage_cost(usage) == (pytest.approx(call_cost("gpt-4.1", 10, 5)), 15)
    assert usage_cost(usage | {"no-such-model": {"prompt_tokens": 7, "completion_tokens": None}}) == (None, 22)
    assert usage_cost({}) == (0.0, 0)
