"""What a decision of a route has lost, by whoever can tell in production, where nobody knows the right answer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import dspy

from dspy_router.deciding import Call
from dspy_router.errors import RouteError
from dspy_router.optimizers.rollouts import reward_of
from dspy_router.optimizers.settings import check_metric, verdict

if TYPE_CHECKING:
    from dspy_router.route import DifferentiableRoute

Judge = str | Callable[..., Any]
REWARDS, FALLBACK = "rewards", "fallback"


def check_judge(route: "DifferentiableRoute", judge: Any) -> None:
    """Refuse what cannot judge a route's decisions.

    Raises:
        RouteError: If it is no judge, or the route has not what it takes.
    """
    if judge not in (FALLBACK, REWARDS) and not callable(judge):
        raise RouteError(f"judge={judge!r}: give {FALLBACK!r}, {REWARDS!r} or a metric(example, prediction).")
    if callable(judge):
        check_metric(judge)
    if judge == FALLBACK and route.fallback is None:
        raise RouteError(
            f"judge={FALLBACK!r}, but {route!r} has no fallback. Give the route one, or judge={REWARDS!r} and tell "
            "them by observe(...), or a metric that needs no label."
        )
    if judge == REWARDS and "decisions" in route.signature.output_fields:
        raise RouteError("A route with an output named 'decisions' shows no decision ids: rename it for an audit.")


def judge_name(judge: Judge) -> str:
    """As reports call it."""
    return judge if isinstance(judge, str) else str(getattr(judge, "__name__", type(judge).__name__))


def judged_loss(judge: Judge, route: "DifferentiableRoute", call: Call, prediction: dspy.Prediction) -> float:
    """What a call lost, in [0, 1], by a metric or the route's fallback.

    Raises:
        RouteError: If the metric is not in [0, 1], or the fallback gives no such field; and what they raise.
    """
    # What a judge calls is no part of the program's run: neither its trace nor its record of decisions.
    with dspy.context(trace=[], _route_recorders=()):
        if callable(judge):
            return loss_of(verdict(judge, dspy.Example(**call.inputs).with_inputs(*call.inputs), prediction))
        assert route.fallback is not None
        return _disagreement(route, prediction, route.fallback(**call.inputs))


def loss_of(reward: Any) -> float:
    """1 minus a reward.

    Raises:
        RouteError: If it is not in [0, 1].

    Example:
        >>> loss_of(True), loss_of(0.75)
        (0.0, 0.25)
    """
    number = reward_of(reward)
    if not 0 <= number <= 1:
        raise RouteError(f"The reward is {number!r}: an audit needs rewards in [0, 1]. Scale it.")
    return 1.0 - number


def _disagreement(route: "DifferentiableRoute", prediction: dspy.Prediction, answer: dspy.Prediction) -> float:
    """1 if the fallback decides a field otherwise, else 0."""
    for field in route.decision_fields:
        if field.output not in answer:
            raise RouteError(f"The fallback gave {list(answer.keys())}, without the field {field.output!r}.")
        if field.index_of(prediction[field.output]) != field.index_of(answer[field.output]):
            return 1.0
    return 0.0
