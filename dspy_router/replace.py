"""Put a route where a program has an LM planner."""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.predict.parameter import Parameter
from pydantic.fields import FieldInfo

from dspy_router.errors import RouteError
from dspy_router.fields import declared_field
from dspy_router.options import Tools
from dspy_router.route import DifferentiableRoute
from dspy_router.split import RoutedPredict

logger = logging.getLogger(__name__)

REASONING = "reasoning"
CONFIDENCE = "confidence"


def replace_predictor(
    program: dspy.Module,
    path: str,
    tools: Tools | None = None,
    *,
    keep_lm: bool | Collection[str] = False,
    **route_kwargs: Any,
) -> dspy.Module:
    """A copy of a program in which the predictor at `path` is a route with the same signature.

    A `ChainOfThought` is replaced as a whole, under its own name or that of the predictor in it; without `keep_lm`
    there is no `reasoning` any more. A predictor that stands in several places is replaced in all of them. A float
    output `confidence` beside a single decision is the route's own from now on.

    In a `dspy.ReAct`, `replace_predictor(agent, "react", agent.tools.values(), keep_lm=True)` gives the choice of tools
    to a route and leaves thoughts and arguments to the LM. Such a route also has to learn when to `finish`: train it,
    and mind that the default encoder reads the first 256 word pieces of request and trajectory.

    Args:
        program: Left as it was.
        path: The predictor's name, as `named_predictors()` gives it; `"self"` if the program is the predictor.
        tools: As for `DifferentiableRoute`; for a field that lists its options they describe them.
        keep_lm: The outputs that an LM goes on writing, in a `RoutedPredict` at `path` that keeps the predictor's
            demos, config and LM; the LM is told the decisions. True: whatever a route cannot decide, plain `str`
            and `reasoning` included.
        **route_kwargs: Passed to `DifferentiableRoute`.

    Raises:
        RouteError: If there is no predictor at `path`, its other outputs are not all decisions, or none is.

    Example:
        >>> import dspy
        >>> from typing import Literal
        >>> class Assistant(dspy.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.planner = dspy.Predict("question -> tool: Literal['search', 'calculator']")
        ...     def forward(self, question):
        ...         return self.planner(question=question)
        >>> routed = replace_predictor(Assistant(), "planner", tools={"search": "Look up facts on the web.",
        ...                                                           "calculator": "Do arithmetic."})
        >>> routed(question="what is 3 times 17?").tool
        'calculator'

        A planner that also writes the tool's argument:

        >>> planner = dspy.ChainOfThought("question -> tool: Literal['search', 'calculator'], query: str")
        >>> replace_predictor(planner, "self", keep_lm=["query"]).predict.signature.signature
        'question, tool -> query'
    """
    places = _places_of(program, path)
    steps = places[0].steps
    program = program.deepcopy()
    replacement = _replacement(_at(program, steps), path, tools, keep_lm, route_kwargs)
    for place in places:
        _unmark(program, place.steps, path)
        program = _put(program, place.steps, replacement)
    return program


def _replacement(
    target: Any, path: str, tools: Tools | None, keep_lm: bool | Collection[str], route_kwargs: dict[str, Any]
) -> dspy.Module:
    """What takes the place of a `Predict` or `ChainOfThought`: a route, or a route and an LM for the rest."""
    reasons = isinstance(target, dspy.ChainOfThought)
    predictor: dspy.Predict = target.predict if reasons else target
    kept = _kept(predictor.signature, keep_lm, path)
    declared = predictor.signature
    if reasons and REASONING in declared.output_fields and REASONING not in kept:
        declared = declared.delete(REASONING)
        logger.warning(
            "The ChainOfThought at %r is replaced by a route, which gives no %r: code that reads it must do without, "
            "or keep_lm=[%r] has the LM go on writing it.", path, REASONING, REASONING,
        )  # fmt: skip
    if _is_own_confidence(declared, [name for name in declared.output_fields if name not in kept]):
        declared = declared.delete(CONFIDENCE)
    asked = declared
    for name in kept:
        asked = asked.delete(name)
    try:
        route = DifferentiableRoute(asked, tools, **route_kwargs)
    except RouteError as error:
        raise RouteError(
            f"The predictor at {path!r} cannot be replaced by a route: {error} {_way_out(asked, tools, kept)}".rstrip()
        ) from error
    if predictor.demos:
        logger.log(
            logging.INFO if kept else logging.WARNING,
            "A route reads no demos: the %d of the predictor at %r %s. They can teach it: "
            "RouteFinetune().compile(route, trainset=[dspy.Example(**demo).with_inputs(%s) for demo in demos]).",
            len(predictor.demos), path, "stay with the LM" if kept else "are left out",
            ", ".join(map(repr, asked.input_fields)),
        )  # fmt: skip
    if not kept:
        return route
    predictor.signature = declared
    return RoutedPredict(route, predictor)


def _kept(signature: type[dspy.Signature], keep_lm: bool | Collection[str], path: str) -> list[str]:
    """The outputs that stay with the LM, in the signature's order."""
    outputs = list(signature.output_fields)
    if isinstance(keep_lm, str):
        raise RouteError(f"keep_lm={keep_lm!r} is one string; give a list of output fields: [{keep_lm!r}].")
    if not keep_lm:
        return []
    if keep_lm is True:
        free = _undecidable(signature)
        own = _is_own_confidence(signature, [name for name in outputs if name not in free or name == CONFIDENCE])
        return [name for name in free if not (own and name == CONFIDENCE)]
    if unknown := [name for name in keep_lm if name not in outputs]:
        raise RouteError(f"keep_lm names {unknown}; the outputs of the predictor at {path!r} are {outputs}.")
    return [name for name in outputs if name in keep_lm]


def _is_own_confidence(signature: type[dspy.Signature], decided: list[str]) -> bool:
    """Whether `decided` is one decision and a float `confidence`, which a route with one decision gives by itself."""
    return len(decided) == 2 and CONFIDENCE in decided and signature.output_fields[CONFIDENCE].annotation is float


def _undecidable(signature: type[dspy.Signature]) -> list[str]:
    """The outputs that are no decision by their type."""
    return [name for name, info in signature.output_fields.items() if not _lists_options(name, info)]


def _lists_options(name: str, info: FieldInfo) -> bool:
    try:
        return bool(declared_field(name, info).declared_options)
    except RouteError:  # a collection of something else
        return False


def _way_out(asked: type[dspy.Signature], tools: Tools | None, kept: list[str]) -> str:
    """What to do about a signature that no route was made for."""
    outputs = asked.output_fields
    if not outputs:
        return (
            f"keep_lm leaves {kept} to the LM, and so nothing to decide: name those that it shall write, and no more."
        )
    free = [name for name in _undecidable(asked) if tools is None or outputs[name].annotation not in (str, list[str])]
    if len(free) == len(outputs):
        return (
            "None of its outputs is a decision: declare what is chosen as Literal[...] (of a dspy.ToolCalls, the "
            "tool's name), and what is written for it as other fields, which keep_lm=True leaves to the LM."
        )
    if free:
        return f"Or keep the LM for what a route cannot decide: keep_lm={[*kept, *free]}."
    open_ = [name for name in _undecidable(asked) if outputs[name].annotation in (str, list[str])]
    return f"Or keep the LM for all of them but one: keep_lm={[*kept, *open_[1:]]}, say." if len(open_) > 1 else ""


@dataclass(frozen=True)
class _Place:
    name: str
    steps: tuple[Any, ...]  # attributes, keys and indices, from the program to the module
    module: dspy.Module


def _places_of(program: dspy.Module, path: str) -> list[_Place]:
    """Where the predictor named `path` stands, or the `ChainOfThought` around it; the same object in all places."""
    places = list(_walk(program, "", (), ()))
    named = {place.name: place.module for place in places}
    predictors = [place.name for place in places if isinstance(place.module, dspy.Predict)]
    target = named.get(path)
    if target is None:
        raise RouteError(f"The program has no predictor at {path!r}; its predictors are {predictors}.")
    if not isinstance(target, (dspy.Predict, dspy.ChainOfThought)):
        inside = [name for name in predictors if path == "self" or name.startswith((f"{path}.", f"{path}["))]
        raise RouteError(
            f"{path!r} names the module {type(target).__name__}, not a predictor. Name one of those in it: {inside}."
        )
    around = (place.module for place in places if isinstance(place.module, dspy.ChainOfThought))
    target = next((module for module in around if module.predict is target), target)
    return [place for place in places if place.module is target]


def _walk(module: Any, name: str, steps: tuple[Any, ...], outer: tuple[int, ...]) -> Iterator[_Place]:
    """Every module by every way to it, under the names of `named_parameters`, which omits those marked compiled."""
    if not isinstance(module, dspy.Module) or id(module) in outer:
        return
    yield _Place(name or "self", steps, module)
    if isinstance(module, Parameter):
        return
    outer = (*outer, id(module))
    for attribute, value in vars(module).items():
        inner = f"{name}.{attribute}" if name else attribute
        if isinstance(value, (list, tuple)):
            for index, entry in enumerate(value):
                yield from _walk(entry, f"{inner}[{index}]", (*steps, attribute, index), outer)
        elif isinstance(value, dict):
            for key, entry in value.items():
                yield from _walk(entry, f"{inner}['{key}']", (*steps, attribute, key), outer)
        else:
            yield from _walk(value, inner, (*steps, attribute), outer)


def _at(owner: Any, steps: tuple[Any, ...]) -> Any:
    for step in steps:
        owner = getattr(owner, step) if isinstance(owner, dspy.Module) else owner[step]
    return owner


def _put(owner: Any, steps: tuple[Any, ...], value: Any) -> Any:
    """`owner` with `value` at `steps`: itself, but for a tuple, which is made anew."""
    if not steps:
        return value
    step = steps[0]
    changed = _put(_at(owner, (step,)), steps[1:], value)
    if isinstance(owner, tuple):
        return (*owner[:step], changed, *owner[step + 1 :])
    if isinstance(owner, dspy.Module):
        setattr(owner, step, changed)
    else:
        owner[step] = changed
    return owner


def _unmark(program: dspy.Module, steps: tuple[Any, ...], path: str) -> None:
    """Take the mark of a compiled module off those around a new route: DSPy would not save the route in them."""
    for length in range(len(steps)):
        owner = _at(program, steps[:length])
        if isinstance(owner, dspy.Module) and owner._compiled:
            owner._compiled = False
            if length:
                logger.warning(
                    "The %s around %r is no longer marked compiled, since DSPy saves nothing of such a module: "
                    "optimizers see its other predictors again.", type(owner).__name__, path,
                )  # fmt: skip
