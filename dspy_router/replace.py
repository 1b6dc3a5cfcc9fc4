"""Put a route where a program has an LM planner."""

import logging
from typing import Any

import dspy
from dspy.utils import magicattr

from dspy_router.errors import RouteError
from dspy_router.options import Tools
from dspy_router.route import DifferentiableRoute

logger = logging.getLogger(__name__)

REASONING = "reasoning"


def replace_predictor(program: dspy.Module, path: str, tools: Tools | None = None, **route_kwargs: Any) -> dspy.Module:
    """A copy of a program in which the predictor at `path` is a route with the same signature.

    A `ChainOfThought` is replaced as a whole, under its own name or that of the predictor in it; the route
    gives no `reasoning`.

    Args:
        program: Left as it was.
        path: The predictor's name, as `named_predictors()` gives it; `"self"` if the program is the predictor.
        tools: As for `DifferentiableRoute`; for a field that lists its options they describe them.
        **route_kwargs: Passed to `DifferentiableRoute`.

    Raises:
        RouteError: If there is no predictor at `path`, or its outputs are not all decisions.

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
    """
    program = program.deepcopy()
    predictors = dict(program.named_predictors())
    owner = path.removesuffix(".predict") if path != "predict" else "self"
    target = program if owner == "self" else _get(program, owner)
    if isinstance(target, dspy.ChainOfThought):
        path, predictor = owner, target.predict
    elif path in predictors:
        predictor = predictors[path]
    else:
        raise RouteError(
            f"The program has no predictor at {path!r}; its predictors are {list(predictors)}. A module such as "
            "dspy.ReAct plans inside itself: name one of its predictors, or route before it."
        )
    signature = predictor.signature
    if isinstance(target, dspy.ChainOfThought) and REASONING in signature.output_fields:
        signature = signature.delete(REASONING)
        logger.warning(
            "The ChainOfThought at %r is replaced by a route, which gives no %r: code that reads it must do without.",
            path, REASONING,
        )  # fmt: skip
    try:
        route = DifferentiableRoute(signature, tools, **route_kwargs)
    except RouteError as error:
        raise RouteError(
            f"The predictor at {path!r} cannot be replaced by a route: {error} To keep its other outputs, split the "
            "signature: a route for the decisions, a dspy.Predict for the rest."
        ) from error
    if target is program or path == "self":
        return route
    magicattr.set(program, path, route)
    return program


def _get(program: dspy.Module, path: str) -> Any:
    try:
        return magicattr.get(program, path)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, SyntaxError):
        return None
