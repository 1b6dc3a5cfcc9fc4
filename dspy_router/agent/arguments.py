"""Where a tool's arguments come from: the cheapest source that will do."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import dspy

from dspy_router.agent.errors import AgentError
from dspy_router.agent.progress import Progress
from dspy_router.agent.tools import schema, sole_argument, takes_text
from dspy_router.errors import RouteError

REQUEST, LM = "request", "lm"
Source = str | Callable[[Progress], Mapping[str, Any] | None]


def argument_sources(
    tools: Mapping[str, dspy.Tool], declared: Mapping[str, Source], signature: type[dspy.Signature]
) -> dict[str, Source | None]:
    """Each tool's source of arguments: None for no arguments at all, else as `RoutedAgent` documents them.

    Raises:
        RouteError: If a declared source is of no tool, or cannot give the tool's arguments.
    """
    if strays := [name for name in declared if name not in tools]:
        raise RouteError(f"args names {strays}, which are no tools; the tools are {list(tools)}.")
    return {name: _checked(tool, declared[name], signature) if name in declared else _cheapest(tool)
            for name, tool in tools.items()}  # fmt: skip


def _cheapest(tool: dspy.Tool) -> Source | None:
    if not schema(tool)["required"]:
        return None
    argument = sole_argument(tool)
    return REQUEST if argument is not None and takes_text(tool, argument) else LM


def _checked(tool: dspy.Tool, source: Source, signature: type[dspy.Signature]) -> Source:
    if callable(source) or source == LM:
        return source
    inputs = list(signature.input_fields)
    if source not in (REQUEST, *inputs):
        raise RouteError(
            f"args[{tool.name!r}]={source!r} is no source of arguments: give {REQUEST!r}, the name of an input "
            f"({', '.join(inputs)}), a function of the run's Progress, or {LM!r}."
        )
    if sole_argument(tool) is None:
        raise RouteError(
            f"args[{tool.name!r}]={source!r} is one value, but the tool's required arguments are "
            f"{schema(tool)['required']}. Give a function that returns them by name, or {LM!r}."
        )
    return source


def ready_arguments(tool: dspy.Tool, source: Source | None, progress: Progress) -> Mapping[str, Any] | None:
    """The arguments that a tool would be called with now, where no LM is needed to say so; None if there are none yet.

    Raises:
        AgentError: If a function raises.
        RouteError: If it gives anything but a mapping or None.
    """
    if source is None:
        return {}
    if isinstance(source, str):
        return {str(sole_argument(tool)): progress.inputs.get(source, progress.request)}
    try:
        found = source(progress)
    except Exception as error:
        raise AgentError(
            f"args[{tool.name!r}] raised {error!r} after {len(progress.results)} results. It is called before every "
            "step, also before the first result: let it return None while the tool cannot be called.",
            progress.trajectory(),
        ) from error
    if found is not None and not isinstance(found, Mapping):
        raise RouteError(
            f"args[{tool.name!r}] gave {found!r}; expected the arguments by name, or None if there are none yet."
        )
    return found


def argument_predictor(tool: dspy.Tool, signature: type[dspy.Signature]) -> dspy.Predict:
    """Writes one tool's arguments from the request and the results; its prompt names no other tool."""
    told = f"Write the arguments of the next call of the tool `{tool.name}`"
    if tool.desc:
        told += f", which is described so: {' '.join(tool.desc.split())}"
    written = dspy.Signature(
        dict(signature.input_fields),
        f"{told}\nThey are one JSON object of this schema: {json.dumps(schema(tool), ensure_ascii=False)}",
    )
    return dspy.Predict(
        written.append("results", results_field(), type_=str).append(
            "next_tool_args", dspy.OutputField(), type_=dict[str, Any]
        )
    )


def results_field() -> Any:
    """The input in which an LM sees what the tools gave."""
    return dspy.InputField(desc="what the tools gave so far")
