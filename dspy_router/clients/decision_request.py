"""One decision request of DSPy, from what it asks to what a route answers."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dspy_router.decision_types import (
    asked_signature,
    criteria_by_option,
    mean_level,
    possible,
    predictor_parameters,
    question_labels,
    selected,
    selecting,
)
from dspy_router.decisions import decide
from dspy_router.encoders.base import Encoder
from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField
from dspy_router.options import Option, encode_options
from dspy_router.route import DifferentiableRoute

if TYPE_CHECKING:
    from dspy_router.folded import FoldedHead

MODEL = "dspy_router"


@dataclass(frozen=True)
class RouteRequest:
    """A decision request as a route reads it.

    Attributes:
        route: Decides.
        text: What its encoder reads.
        heads: By output, the head that answers for it.
        request: The key of the answers in DSPy's cache.
        state: As DSPy sent it.
    """

    route: DifferentiableRoute
    text: str
    heads: "dict[str, FoldedHead]"
    request: dict[str, Any]
    state: Mapping[str, Any]

    @classmethod
    def read(
        cls,
        route: DifferentiableRoute | None,
        encoder: Encoder,
        state: Mapping[str, Any],
        questions: Mapping[str, Any],
    ) -> "RouteRequest":
        """Read a request for a route, or without one for a new route made of what is asked.

        Raises:
            RouteError: If the route does not decide what is asked.
        """
        inputs = state["inputs"]
        route = route or _zero_shot_route(encoder, _declared_inputs(state), json.dumps(questions))
        text = route.text({name: inputs.get(name) for name in route.signature.input_fields})
        heads = {name: _head(route, name, question) for name, question in questions.items()}
        request = {
            "provider": MODEL,
            "model": {
                "encoder": route.encoder.fingerprint.to_dict(),
                "heads": {name: head.digest for name, head in heads.items()},
            },
            "text": text,
            "questions": questions,
        }
        return cls(route, text, heads, request, state)

    def response(self, vector: Any) -> dict[str, Any]:
        """The policy's answers, before anything is decided from outside."""
        answers = {}
        for name, head in self.heads.items():
            field = self.route.field(name)
            answers[name] = _answer(field, dict(zip(field.option_names, head.policy(vector).tolist(), strict=True)))
        return {"model": MODEL, "usage": {}, "answers": answers}

    def decided(self, name: str, answer: dict[str, Any]) -> dict[str, Any]:
        """Make and announce the decision that the calling predictor takes from an answer."""
        field = self.route.field(name)
        probabilities = answer["probabilities"] if "probabilities" in answer else _of_true(answer["noul"])
        parameters = predictor_parameters(name)
        own = selected(field.kind, probabilities, parameters)
        options = possible(field.kind, field.option_names, parameters)
        decision = decide(self.route, name, probabilities, own, self.text, options)
        if decision.name == own:
            return answer
        return _answer(field, selecting(field.kind, field.option_names, decision.name, parameters))


def _answer(field: DecisionField, probabilities: dict[str, float]) -> dict[str, Any]:
    if field.kind == "noul":
        return {"noul": probabilities["True"]}
    confidence = max(probabilities.values())
    if field.kind == "score":
        return {"score": mean_level(probabilities), "confidence": confidence, "probabilities": probabilities}
    return {"choice": selected("choice", probabilities), "confidence": confidence, "probabilities": probabilities}


def _of_true(probability: float) -> dict[str, float]:
    return {"True": probability, "False": 1.0 - probability}


def _declared_inputs(state: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The inputs' names in the signature's order, and whether they are text; the call has another order, or fewer."""
    listed: dict[str, Any] = {}
    for number, name, kind in _LISTED_INPUT.findall(state.get("input_fields") or ""):
        if int(number) == len(listed) + 1:
            listed[name] = str if kind == "str" else Any
    return tuple((listed | {name: Any for name in state["inputs"] if name not in listed}).items())


_LISTED_INPUT = re.compile(r"^(\d+)\. `(\w+)` \((.*?)\)", re.MULTILINE)  # of DSPy's `get_field_description_string`


@lru_cache(maxsize=128)
def _zero_shot_route(encoder: Encoder, inputs: tuple[tuple[str, Any], ...], questions: str) -> DifferentiableRoute:
    return DifferentiableRoute(asked_signature(dict(inputs), json.loads(questions)), encoder=encoder)


def _head(route: DifferentiableRoute, name: str, question: Mapping[str, Any]) -> "FoldedHead":
    """The route's head for a question, with its options described as the question does."""
    field = next((field for field in route.fields if field.name == name), None)
    labels = question_labels(question)
    if field is None or field.kind != question["type"] or set(labels) != set(field.option_names):
        decided = {field.name: (field.kind, list(field.option_names)) for field in route.fields}
        raise RouteError(
            f"The predictor asks for {name!r}, {question['type']} among {list(labels)}; the route behind its client "
            f"decides {decided}. Make the route from the predictor's signature, or give it a DecisionClient() without "
            "a route."
        )
    head = route.learned.folded(name)
    options = described_options(field, criteria_by_option(field.kind, question.get("criteria")))
    if options == field.options:
        return head
    texts = tuple(option.texts for option in options)
    if route.encoder.trainable:  # its vectors change
        return _head_with_options.__wrapped__(head, route.encoder, texts)
    return _head_with_options(head, route.encoder, texts)


def described_options(field: DecisionField, criteria: Mapping[str, str]) -> tuple[Option, ...]:
    """A field's options with other descriptions, where the criteria are not those the field declares."""
    if field.kind == "noul" and not any(criteria.values()):  # described by the field's `desc`
        return field.options
    declared = {option.name: option.description for option in field.declared_options}
    changed = {name: text for name, text in criteria.items() if text != declared.get(name, "")}
    if not changed:
        return field.options
    return tuple(replace(option, description=changed.get(option.name, option.description)) for option in field.options)


@lru_cache(maxsize=16)
def _head_with_options(head: "FoldedHead", encoder: Encoder, texts: tuple[tuple[str, ...], ...]) -> "FoldedHead":
    return head.with_option_vectors(encode_options(texts, encoder.encode))
