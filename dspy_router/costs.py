"""What LM calls cost, from litellm's price table."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspy_router.errors import RouteError
from dspy_router.tables import table

# The article's accounting: an LM-planned run plans, interprets the tool's result and answers; a routed run answers.
PLANNED_CALLS, ROUTED_CALLS = 3, 1
TOKENS_IN, TOKENS_OUT = 75, 75


@dataclass(frozen=True)
class RunCosts:
    """Dollars a run, planned by an LM and routed.

    Attributes:
        model: litellm's name of the model.
        planned: Dollars of a run with an LM planner.
        routed: Dollars of a run with a route.
    """

    model: str
    planned: float
    routed: float

    def __str__(self) -> str:
        rows = [
            ["LM planner", PLANNED_CALLS, PLANNED_CALLS * (TOKENS_IN + TOKENS_OUT), f"{1e3 * self.planned:.3f}"],
            ["route", ROUTED_CALLS, ROUTED_CALLS * (TOKENS_IN + TOKENS_OUT), f"{1e3 * self.routed:.3f}"],
            ["saved", PLANNED_CALLS - ROUTED_CALLS, "", f"{1 - self.routed / self.planned:.0%}"],
        ]
        headers = ["planner", "LM calls a run", "tokens a run", f"$ per 1,000 runs ({self.model})"]
        return table(rows, headers=headers, colalign=("left", "right", "right", "right"))


def run_costs(model: str = "gpt-4.1", *, tokens_in: int = TOKENS_IN, tokens_out: int = TOKENS_OUT) -> RunCosts:
    """The cost of a run with an LM planner (three LM calls) and with a route (one), by litellm's prices.

    Args:
        model: A name litellm knows the price of.
        tokens_in: Prompt tokens a call.
        tokens_out: Completion tokens a call.

    Raises:
        RouteError: If litellm has no price for the model.

    Example:
        >>> costs = run_costs("gpt-4.1")
        >>> round(costs.planned / costs.routed, 6)
        3.0
    """
    call = call_cost(model, tokens_in, tokens_out)
    if not call:
        raise RouteError(f"litellm has no price for model {model!r}. Give a model of its price table, e.g. gpt-4.1.")
    return RunCosts(model, PLANNED_CALLS * call, ROUTED_CALLS * call)


def call_cost(model: str, tokens_in: int, tokens_out: int) -> float | None:
    """Dollars of one LM call, or None if litellm has no price for the model."""
    # litellm would first try to fetch its table from the network, three times; it ships a copy.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    try:
        prompt, completion = litellm.cost_per_token(model=model, prompt_tokens=tokens_in, completion_tokens=tokens_out)
    except Exception:
        # litellm raises a bare Exception, or one of several of its own, for a model it does not know.
        return None
    return float(prompt + completion)


def usage_cost(usage: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, int]:
    """Dollars (None if any model has no known price) and tokens of usage by model, as `dspy.track_usage` gives it."""
    dollars: float | None = 0.0
    tokens = 0
    for model, counts in usage.items():
        prompt, completion = int(counts.get("prompt_tokens") or 0), int(counts.get("completion_tokens") or 0)
        tokens += prompt + completion
        price = call_cost(model, prompt, completion)
        dollars = None if dollars is None or price is None else dollars + price
    return dollars, tokens
