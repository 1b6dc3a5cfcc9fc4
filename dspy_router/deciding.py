"""From one call's inputs to what a route decides, declines or hands to its fallback: sync and async share this."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dspy

from dspy_router.decision_types import selected
from dspy_router.decisions import Decision, announce, decide
from dspy_router.errors import AbstainError, RouteError
from dspy_router.fields import DecisionField
from dspy_router.probabilities import by_name

if TYPE_CHECKING:
    import numpy as np

    from dspy_router.route import DifferentiableRoute

logger = logging.getLogger(__name__)

CANDIDATES = "candidates"  # the argument of a call that is no input, unless an input has that name
_told_of_change: set[str] = set()
_told_of_fallback: set[str] = set()


@dataclass(frozen=True)
class Call:
    """One call of a route.

    Attributes:
        inputs: The signature's.
        text: What the encoder reads.
        candidates: By field, bool [k]: the options that can be chosen. Fields that are not in it have them all.
    """

    inputs: Mapping[str, Any]
    text: str
    candidates: "Mapping[str, np.ndarray]"


@dataclass(frozen=True)
class Policies:
    """What a route thinks of a call, before anything is decided.

    Attributes:
        call: The call.
        probabilities: By field, those of the candidates.
        score: What the guard holds against its threshold; None where nobody asks.
        declined: Whether the guard declines.
    """

    call: Call
    probabilities: Mapping[str, Mapping[str, float]]
    score: float | None
    declined: bool


def read_call(route: "DifferentiableRoute", inputs: Mapping[str, Any]) -> Call:
    """A call's inputs and candidates.

    Raises:
        RouteError: If inputs are missing or unknown, or candidates are.
    """
    inputs, given = dict(inputs), None
    if CANDIDATES in inputs and CANDIDATES not in route.signature.input_fields:
        given = inputs.pop(CANDIDATES)
    return Call(inputs, route.text(inputs), candidate_masks(route, given))


def candidate_masks(route: "DifferentiableRoute", given: Any) -> "dict[str, np.ndarray]":
    """By field, bool [k], which options can be chosen; fields that are not in it have them all, as with None.

    Raises:
        RouteError: If candidates are unknown, or there are none; or they are for no field in particular of several.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(route.fields) > 1:
            raise RouteError(
                f"candidates={given!r}: this route decides {[field.name for field in route.fields]}; give a dict from "
                "a field to its candidates."
            )
        given = {route.fields[0].name: given}
    return {name: _mask(route.field(name), names) for name, names in given.items()}


def policies(route: "DifferentiableRoute", call: Call, vector: "np.ndarray") -> Policies:
    """The policy of every field for a call's vector, and whether the guard lets the route decide by it.

    Raises:
        RouteError: If a head's parameters are such that it cannot decide.
    """
    found, learned = {}, route.learned
    for field in learned.fields:
        mask = call.candidates.get(field.name)
        policy = learned.folded(field.name).policy(vector, mask)
        if not math.isfinite(policy.sum()):
            raise RouteError(
                f"The head of field {field.name!r} gives probabilities that are no numbers, as its parameters are not "
                "finite or too large: its training diverged. Load a saved state, or train again in smaller steps."
            )
        found[field.name] = by_name(field.option_names, field.positions, policy, mask)
    guard, scoring = learned.guard, dspy.settings.get("_route_scoring", False)
    if guard is None and not scoring:
        return Policies(call, found, None, False)
    from dspy_router.guarding.scoring import route_scores

    score = float(route_scores(route, vector[None], call.candidates)[0])
    if guard is None or scoring:
        return Policies(call, found, score, False)
    if guard.heads != learned.digest and guard.heads not in _told_of_change:
        _told_of_change.add(guard.heads)
        logger.warning(
            "The head or the options of %r have changed since its guard was set: it goes on declining below %s, but "
            "promises nothing. Call guard() again.", route, guard.threshold,
        )  # fmt: skip
    if (
        guard.fallback
        and route.fallback is None
        and route.on_abstain == "none"
        and guard.heads not in _told_of_fallback
    ):
        _told_of_fallback.add(guard.heads)
        logger.warning(
            "The guard of %r was set with a fallback, and here there is none: what it declines is None. "
            "Build the route as it was saved, with fallback=..., or with on_abstain='raise'.", route,
        )  # fmt: skip
    return Policies(call, found, score, guard.threshold is None or score < guard.threshold)


def settled(route: "DifferentiableRoute", thought: Policies, answer: Any = None) -> dspy.Prediction:
    """Make and announce the decisions of a call, and answer it.

    Args:
        route: Decides.
        thought: Of the call.
        answer: The fallback's, where the route declines and has one.

    Raises:
        AbstainError: If the route declines, has no fallback and is to raise then.
    """
    text, fields, outputs = thought.call.text, route.fields, {}
    decisions: dict[str, Decision] = {}
    for field in fields:
        made = []
        for single, probabilities in field.single(thought.probabilities[field.name]):
            own = selected(single.kind, probabilities)
            if thought.declined:
                decision = _declined(single, thought, probabilities, own, answer)
                announce(route, decision)
            else:
                decision = decide(route, single.name, probabilities, own, text, score=thought.score)
            made.append(decision)
            decisions[single.name] = decision
        if not thought.declined:
            chosen = {decision.field: decision.name for decision in made}
            outputs[field.name] = field.value_of(chosen, thought.probabilities[field.name])
        else:
            outputs[field.name] = None if answer is None else answer[field.name]
    if thought.declined and answer is None and route.on_abstain == "raise":
        guard = route.learned.guard
        raise AbstainError(
            f"The route declines to decide {list(outputs)} for {text!r}: its score {thought.score:.4g} is below "
            f"{guard.threshold if guard else None}. Give the route a fallback, or on_abstain='none'.",
            decisions,
        )
    if answer is not None:
        outputs = {**dict(answer.items()), **outputs}
    evidence: dict[str, Any] = {"decisions": decisions}
    if len(fields) == 1:
        if field.name in decisions:  # a list has a decision for each option
            evidence["decision"] = decision
        evidence["probabilities"] = thought.probabilities[field.name]
        evidence["confidence"] = field.confidence([decision.confidence for decision in made])
    return dspy.Prediction(**outputs, **{name: value for name, value in evidence.items() if name not in outputs})


def _declined(
    field: DecisionField, thought: Policies, probabilities: Mapping[str, float], own: str, answer: Any
) -> Decision:
    """The decision that was not made, with the fallback's choice for its name where it is an option."""
    name = own
    if answer is not None:
        if field.output not in answer:
            raise RouteError(
                f"The fallback gave {list(answer.keys())}, without the field {field.output!r}. Its signature must have "
                "the route's outputs."
            )
        index = field.index_of(answer[field.output])
        name = own if index is None else field.option_names[index]
    return Decision(
        field=field.name,
        name=name,
        probabilities=probabilities,
        confidence=probabilities.get(name, 0.0),
        propensity=1.0,
        text=thought.call.text,
        empty_input=not thought.call.text.strip(),
        abstained=True,
        score=thought.score,
    )


def _mask(field: DecisionField, names: Any) -> "np.ndarray":
    names = [names] if isinstance(names, str) else list(names)
    if field.kind != "choice":
        raise RouteError(f"candidates for {field.name!r}, which is no choice among options: leave them out.")
    if not names or (unknown := [name for name in names if name not in field.positions]):
        raise RouteError(
            f"candidates={names!r} for {field.name!r}: "
            + (f"{unknown} are no options; " if names else "there is none to choose; ")
            + f"its options are {list(field.option_names)}."
        )
    import numpy as np

    mask = np.zeros(len(field.options), dtype=bool)
    mask[[field.positions[name] for name in names]] = True
    return mask
