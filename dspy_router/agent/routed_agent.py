"""`RoutedAgent`: an agent loop in which a route chooses the tools, and an LM writes the answer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import dspy
from dspy.signatures.signature import ensure_signature

from dspy_router.agent.arguments import LM, Source, argument_predictor, argument_sources, ready_arguments, results_field
from dspy_router.agent.driving import ModuleCall, Steps, adrive, drive
from dspy_router.agent.errors import AgentError
from dspy_router.agent.planner import Plan, planned
from dspy_router.agent.progress import Progress, ToolResult, as_text
from dspy_router.agent.tool_calls import ToolCall
from dspy_router.agent.tools import FINISH, read_tools, refusal, require_sync
from dspy_router.encoders.base import Encoder
from dspy_router.encoders.step import StepEncoder
from dspy_router.errors import RouteError
from dspy_router.route import DifferentiableRoute

FINISH_DESCRIPTION = "Nothing more is to be found out: answer the request from the results."
RESERVED = ("results", "trajectory", "next_tool_args", "max_iters")  # names that the agent or its planner adds


class RoutedAgent(dspy.Module):
    """Answer with the help of tools: a route chooses each next tool or to finish, an LM writes the answer.

    Called as a `dspy.ReAct`, whose arguments it takes: the signature's inputs in, its outputs and `trajectory` back.
    The LM is called once, for the answer, and sees the inputs and the tools' results only. It is called more often
    where a tool's arguments have to be written, or where the route declines a step.

    Arguments come from the cheapest source that will do. By default a tool that requires none gets none, one that
    requires exactly one string gets the request, and for any other a `dspy.Predict` writes them, which sees that
    tool's schema, the inputs and the results. The request, word for word, is right for a first search; it is wrong for
    a calculator after it, or for a tool that wants the number of an order. `args` declares another source, by the
    tool's name.

    - `"request"`: the only input, or several as `name: value` lines, for the one argument that the tool requires.
    - an input's name: that input, likewise.
    - a function of the run's `dspy_router.agent.Progress`: the arguments by name, such as
      `lambda progress: {"query": progress.results[-1].text if progress.results else progress.request}`, or None while
      the tool cannot be called. It is called before every step, the first included, so it should be quick and change
      nothing. If it raises, the run ends with an `AgentError` that names it.
    - `"lm"`: what the predictor `arguments[tool]` writes.

    In a run, a call that gave a result is not made again, and one that raised or gave nothing in time is made at most
    twice: a tool with no other arguments is then no candidate of a step. Where an LM writes them again, the fallback is
    told so, or without one the tool is no candidate until another has been called. To finish is always possible.
    `RouteFinetune` trains the route, `step`, from the metric, from a `dspy.ReAct` as teacher or from recorded
    trajectories (`dspy_router.agent.imitation`). Untrained, it goes by descriptions: it calls the tools that are nearer
    to the state than "finish" is, each once with the same arguments, which may well be all of them.

    A tool that raises, or gives nothing in time, gives an observation that says so. Arguments that cannot be read, or
    that a schema refuses, are written once more, by the fallback or else by the predictor that wrote them; then they
    too are an observation. Where the route had chosen the tool, it is no candidate until another has been called, since
    the same results would be asked for the same arguments. The run ends at the latest after `max_iters` steps, with an
    answer from what is known by then.

    With `step.guard(examples, metric=..., risk=..., program=agent)` the route declines steps below a threshold, and
    the promise is about runs in which it declined none. Such steps go to `fallback`; without one the run ends there
    (with `step.on_abstain = "raise"` in an `AbstainError`).

    Args:
        signature: Inputs and outputs; none may be named `results`, `trajectory`, `next_tool_args` or `max_iters`.
        tools: `dspy.Tool`s (MCP's and LangChain's by their conversions) and callables, under different names, none
            of them `finish`. Asynchronous ones need `acall`, or DSPy's `allow_tool_async_sync_conversion`.
        max_iters: Most steps; a call's own `max_iters` comes before it.
        fallback: Plans the steps that the route declines: a module that takes the inputs and `trajectory`, and gives
            `next_tool_name` and, if it likes, `next_tool_args` and `next_thought`, as `dspy.ReAct(...).react` does.
        args: Sources of arguments by tool.
        encoder: A `dspy_router.encoders.step.StepEncoder`, or the base of one: what `DifferentiableRoute` takes as
            `encoder`, if it is frozen.
        answer: Makes the module that writes the answer from its signature: `dspy.Predict`, `dspy.ChainOfThought`, ...
        timeout: Seconds a call of a tool may take, for all or by tool; see `dspy_router.agent.tool_calls.ToolCall`.
        result_limit: Characters of a result that LMs get to read. The trajectory holds what the tool returned.
        callbacks: DSPy callbacks of this module.

    Raises:
        RouteError: If the tools, their sources of arguments or the signature's names are unusable.

    Example:
        >>> import dspy
        >>> from dspy.utils import DummyLM
        >>> from dspy_router import RoutedAgent
        >>> def search(query: str):
        ...     "Look up how many people live in a city."
        ...     return "Ostrel has 48200 inhabitants."
        >>> agent = RoutedAgent("question -> answer", tools=[search])
        >>> with dspy.context(lm=DummyLM([{"answer": "48200"}])):
        ...     prediction = agent(question="How many people live in Ostrel?")
        >>> prediction.answer, prediction.trajectory["tool_name_0"], prediction.trajectory["tool_args_0"]
        ('48200', 'search', {'query': 'How many people live in Ostrel?'})
    """

    def __init__(
        self,
        signature: str | type[dspy.Signature],
        tools: Iterable[dspy.Tool | Callable[..., Any]],
        max_iters: int = 20,
        fallback: dspy.Module | None = None,
        *,
        args: Mapping[str, Source] | None = None,
        encoder: Encoder | str | Callable[[list[str]], Any] | None = None,
        answer: Callable[[type[dspy.Signature]], dspy.Module] = dspy.Predict,
        timeout: float | Mapping[str, float] | None = None,
        result_limit: int = 4_000,
        callbacks: list[Any] | None = None,
    ) -> None:
        super().__init__(callbacks=callbacks)
        self.signature = _without_clashes(ensure_signature(signature))
        self.tools = read_tools(tools)
        self.max_iters = max_iters
        self.fallback = fallback
        self.sources = argument_sources(self.tools, args or {}, self.signature)
        self.timeouts = _timeouts(self.tools, timeout)
        self.result_limit = result_limit
        self.step = DifferentiableRoute(
            "state -> next_tool",
            tools=[*self.tools.values(), (FINISH, FINISH_DESCRIPTION)],
            encoder=encoder if isinstance(encoder, StepEncoder) else StepEncoder(encoder, list(self.tools)),
        )
        self.arguments = {
            name: argument_predictor(self.tools[name], self.signature)
            for name, source in self.sources.items()
            if source == LM
        }
        self.answer = answer(self.signature.append("results", results_field(), type_=str))

    # It holds a route, which DSPy would leave out of its parent's state: see `DifferentiableRoute`.
    _compiled = property(lambda self: False, lambda self, value: None)

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Answer one request; call the agent itself, so that callbacks see it.

        Args:
            **inputs: The signature's, and `max_iters` for this run alone.

        Returns:
            The declared outputs and `trajectory`, in the keys of `dspy.ReAct`: `tool_name_0`, `tool_args_0`,
            `observation_0` (what the tool returned), ..., and `thought_0`, ... where the fallback planned.

        Raises:
            AgentError: If an LM call raises, or a function of `args`; it holds the trajectory.
            RouteError: If inputs are missing or unknown, or a tool is asynchronous and DSPy may not wait for it.
        """
        require_sync(self.tools, "call the agent with await agent.acall(...)")
        return drive(self._run(inputs))

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """`forward` for async code: a tool that is not asynchronous runs in a thread, so the event loop stays free."""
        return await adrive(self._run(inputs))

    def _run(self, inputs: dict[str, Any]) -> Steps[dspy.Prediction]:
        steps = inputs.pop("max_iters", self.max_iters)
        progress = Progress.start(self.signature, inputs)
        finished, exhausted = False, set[str]()
        try:
            for _ in range(steps):
                plan, refused = yield from self._next(progress, exhausted)
                if plan is None or (finished := plan.tool == FINISH):
                    break
                if refused is None and progress.has_settled(plan.tool, plan.arguments):
                    exhausted.add(plan.tool)
                    continue
                progress = progress.after((yield from self._called(plan, refused)))
                if refused is None:  # else there is nothing new to write other arguments from
                    exhausted.clear()
            answer = yield ModuleCall(self.answer, {**inputs, "results": progress.results_text()})
        except RouteError:
            raise
        except Exception as error:
            raise AgentError(
                f"The run stopped after {len(progress.results)} results, which are in this error's trajectory: "
                f"{type(error).__name__}: {error}",
                progress.trajectory(finished=finished),
            ) from error
        return dspy.Prediction(trajectory=progress.trajectory(finished=finished), **answer)

    def _next(self, progress: Progress, exhausted: set[str]) -> Steps[tuple[Plan | None, str | None]]:
        """The next step with its arguments, and why they are refused if they still are; no plan ends the run."""
        ready = {
            name: ready_arguments(tool, self.sources[name], progress)
            for name, tool in self.tools.items()
            if name not in self.arguments
        }
        candidates = [
            name
            for name in self.tools
            if name not in exhausted and (name in self.arguments or _can_call(progress, name, ready[name]))
        ]
        if not candidates:
            return Plan(FINISH), None
        decided = yield ModuleCall(self.step, {"state": progress.state.to_text(), "candidates": [*candidates, FINISH]})
        plan: Plan | None = Plan(decided.next_tool)
        declined = decided.decisions["next_tool"].abstained
        if declined:
            plan = None if self.fallback is None else (yield from planned(self.fallback, progress))
        if plan is None:
            return None, None
        plan = yield from self._with_arguments(plan, ready, progress)
        refused = self._refusal(plan, progress)
        if refused is None:
            return plan, None
        if not declined:
            exhausted.add(plan.tool)
        seen = progress.after(self._failed(plan, refused))
        second = None
        if self.fallback is not None:
            second = yield from planned(self.fallback, seen)
        elif plan.tool in self.arguments:
            second = Plan(plan.tool)
        if second is None:
            return plan, refused
        second = yield from self._with_arguments(second, ready, seen)
        return second, self._refusal(second, progress)

    def _with_arguments(
        self, plan: Plan, ready: Mapping[str, Mapping[str, Any] | None], progress: Progress
    ) -> Steps[Plan]:
        """The plan with arguments from the tool's source, if it came without; still none if an LM's are unreadable."""
        if plan.arguments is not None:
            return plan
        if plan.tool not in self.arguments:
            return replace(plan, arguments=ready.get(plan.tool))
        inputs = {**progress.inputs, "results": progress.results_text()}
        try:
            written = yield ModuleCall(self.arguments[plan.tool], inputs)
        except dspy.AdapterParseError:
            return plan
        return replace(plan, arguments=written.next_tool_args)

    def _called(self, plan: Plan, refused: str | None) -> Steps[ToolResult]:
        """The result of the call, which is what went wrong if it fails."""
        if refused is not None:
            return self._failed(plan, refused)
        try:
            value = yield ToolCall(self.tools[plan.tool], plan.arguments, self.timeouts.get(plan.tool))
            text = as_text(value, self.result_limit)
        except Exception as error:
            return self._failed(plan, f"{type(error).__name__}: {error}")
        return ToolResult(plan.tool, plan.arguments, value, text, thought=plan.thought)

    def _failed(self, plan: Plan, why: str) -> ToolResult:
        arguments = plan.arguments if isinstance(plan.arguments, Mapping) else {}
        told = f"Execution error in {plan.tool}: {why}"
        return ToolResult(plan.tool, arguments, told, as_text(told, self.result_limit), True, plan.thought)

    def _refusal(self, plan: Plan, progress: Progress) -> str | None:
        if plan.tool == FINISH:
            return None
        if plan.tool not in self.tools:
            return f"there is no such tool; the tools are {list(self.tools)}"
        if plan.arguments is None:
            written = plan.tool in self.arguments
            return "its arguments could not be read; write one JSON object" if written else "it has no arguments yet"
        refused = refusal(self.tools[plan.tool], plan.arguments)
        if refused is None and self.fallback is not None and progress.has_settled(plan.tool, plan.arguments):
            return "it was called with the same arguments before"
        return refused

    def __repr__(self) -> str:
        return f"RoutedAgent({self.signature.signature}, tools={list(self.tools)})"


def _can_call(progress: Progress, tool: str, arguments: Mapping[str, Any] | None) -> bool:
    return arguments is not None and not progress.has_settled(tool, arguments)


def _without_clashes(signature: type[dspy.Signature]) -> type[dspy.Signature]:
    if clashes := [name for name in signature.fields if name in RESERVED]:
        raise RouteError(
            f"The signature has fields named {clashes}, which an agent uses itself ({', '.join(RESERVED)}). Rename "
            "them."
        )
    return signature


def _timeouts(tools: Mapping[str, dspy.Tool], timeout: float | Mapping[str, float] | None) -> dict[str, float]:
    if timeout is None:
        return {}
    by_tool = dict(timeout) if isinstance(timeout, Mapping) else dict.fromkeys(tools, timeout)
    if strays := [name for name in by_tool if name not in tools]:
        raise RouteError(f"timeout names {strays}, which are no tools; the tools are {list(tools)}.")
    if wrong := {name: seconds for name, seconds in by_tool.items() if not seconds > 0}:
        raise RouteError(f"timeout={wrong}: give seconds above 0, or leave the tool out to wait.")
    return by_tool
