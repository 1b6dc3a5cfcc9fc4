"""An LM as planner, for comparisons with a route: how to reach it, and what each of its answers took."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import dspy
from dspy import lm15
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

from dspy_router.costs import call_cost
from dspy_router.errors import RouteError

AdapterName = Literal["chat", "json", "schema"]
SCHEMA_PROVIDER = "schema-server"
MAX_TOKENS, TIMEOUT = 200, 600  # seconds: a local model on a busy machine is slow


@dataclass(frozen=True)
class PlannerAnswer:
    """What an LM planner answered, and what that took.

    Attributes:
        prediction: None if the answer could not be parsed, or the prompt was too long for the LM.
        seconds: Wall-clock time, with every retry that the adapter made.
        calls: LM calls; more than one where the adapter asked again in another format.
        prompt_tokens: Over all calls, as the server counts them.
        completion_tokens: Over all calls.
    """

    prediction: dspy.Prediction | None
    seconds: float
    calls: int
    prompt_tokens: int
    completion_tokens: int


def planner_lm(
    model: str, *, adapter: AdapterName = "json", api_base: str | None = None, api_key: str | None = None
) -> AbstractContextManager[Any]:
    """A context in which every `dspy.Predict` asks this LM, at temperature 0 and without DSPy's cache.

    Args:
        model: litellm's name, such as `openai/gpt-4.1`.
        adapter: `"chat"` and `"json"` are DSPy's adapters. `"schema"` is the JSON adapter for a server of your own
            that holds answers to a schema (llama.cpp, vLLM): DSPy does not ask a model it does not know to do so.
        api_base: Address of an OpenAI-compatible server; none of the key is needed there.
        api_key: Where the LM needs one that the environment does not hold.

    Raises:
        RouteError: If `"schema"` is asked of no server in particular.
    """
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS, "timeout": TIMEOUT, "cache": False}
    if adapter == "chat":
        settings["stop"] = ["[[ ## completed ## ]]"]
    if adapter == "schema":
        if api_base is None:
            raise RouteError(
                "adapter='schema' declares what a server of your own can do: give its api_base, or take 'json', "
                "with which DSPy sends the schema to every hosted model that is known to keep to one."
            )
        _declare_schema_server(api_base)
        model = f"{SCHEMA_PROVIDER}/{model.rpartition('/')[2]}"
    if api_base is not None:
        settings |= {"api_base": api_base, "api_key": api_key or "none"}
    elif api_key is not None:
        settings["api_key"] = api_key
    return dspy.context(
        lm=dspy.LM(model, **settings), adapter=dspy.ChatAdapter() if adapter == "chat" else dspy.JSONAdapter()
    )


def ask(planner: dspy.Module, **inputs: Any) -> PlannerAnswer:
    """Run a planner once. An answer that cannot be read is an answer; an LM that cannot be reached is an error."""
    with dspy.track_usage() as usage:
        started = time.perf_counter()
        try:
            prediction = planner(**inputs)
        except (AdapterParseError, ContextWindowExceededError):
            prediction = None
        seconds = time.perf_counter() - started
    calls = [call for of_model in usage.usage_data.values() for call in of_model]
    return PlannerAnswer(
        prediction=prediction,
        seconds=seconds,
        calls=len(calls),
        prompt_tokens=sum(call.get("prompt_tokens") or 0 for call in calls),
        completion_tokens=sum(call.get("completion_tokens") or 0 for call in calls),
    )


def how_to_read(model: str) -> str:
    """What must be said beside any figures of a model, by whether litellm knows its price.

    Example:
        >>> how_to_read("openai/gpt-4.1-mini")
        "The seconds of openai/gpt-4.1-mini include the network's. Dollars are litellm's list prices, without ..."
    """
    if call_cost(model, 1, 1):
        return f"The seconds of {model} include the network's. Dollars are litellm's list prices, without discounts."
    return (
        f"litellm has no price for {model}: its dollars are unknown, its tokens are given. A small local model on a "
        "CPU is not a hosted one: its seconds and its errors say nothing about a larger model's."
    )


def _declare_schema_server(api_base: str) -> None:
    access = lm15.AccessPolicy(
        provider=SCHEMA_PROVIDER, supports=lm15.EndpointSupport(complete=True, stream=True), base_url=api_base
    )
    server = lm15.ProviderDefinition.chat(access, compat=lm15.OpenAIChatCompat.preset("vllm"), placeholder_key="none")
    lm15.register_provider(server, supports=lm15.ModelSupport(response_schema=True), replace=True)
