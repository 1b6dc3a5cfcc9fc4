"""A route's head as the `lm` of a plain `dspy.Predict`.

DSPy sends a decision request to any client that says it supports them: the call's inputs and a question an output in,
probabilities out. DSPy marks this socket as experimental; the package meets it here and, for what is saved, in
`dspy_router.client_state`.
"""

import asyncio
import copy
import json
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import dspy
from dspy.clients.base_lm import record_history
from dspy.utils.callback import with_callbacks

from dspy_router.decision_types import (
    asked_signature,
    criteria_by_option,
    mean_level,
    predictor_parameters,
    question_labels,
    selected,
)
from dspy_router.decisions import decide
from dspy_router.encoders.base import Encoder
from dspy_router.encoders.choose import as_encoder
from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField
from dspy_router.options import Option
from dspy_router.route import DifferentiableRoute

if TYPE_CHECKING:
    from dspy_router.heads import OptionHead

MODEL = "dspy_router"


class DecisionClient(dspy.BaseLM):
    """Answer the decisions of `dspy.Predict`s with a small head on frozen sentence embeddings: no LM, no price.

    Give it as `lm` to any `dspy.Predict` whose outputs are all `Literal`, `bool`, `Choice`, `Noul` or `Score`, or
    configure it for a whole program. Without a route it answers every such signature untrained, from the
    descriptions of the options. `RouteFinetune` finds it behind the predictors of a program, and trains a route for
    each; `dspy.ReAnchor` then tunes what a predictor makes of the probabilities.

    As for every decision client of DSPy, each output field needs a `desc`. Demos are not read, and a trained head
    does not read instructions; criteria that a predictor sets take the place of the options' descriptions.

    A program that holds one saves it with its predictors. DSPy loads the state of such a client only from files you
    trust: `program.load(path, allow_unsafe_lm_state=True)`.

    Args:
        route: Answers with this route's head; its fields must be the predictor's outputs. `route.as_lm()` is the
            same.
        encoder: Without a route: as for `DifferentiableRoute`.
        cache: Whether answers are kept in DSPy's cache; they are found there while head and encoder are the same.
        callbacks: DSPy callbacks of this client.

    Raises:
        RouteError: If both a route and an encoder are given.

    Example:
        >>> import dspy
        >>> from typing import Literal
        >>> from dspy_router import DecisionClient
        >>> class Plan(dspy.Signature):
        ...     request: str = dspy.InputField()
        ...     tool: Literal["get_weather", "play_music"] = dspy.OutputField(desc="the tool that serves the request")
        >>> planner = dspy.Predict(Plan)
        >>> planner.lm = DecisionClient()
        >>> planner(request="will it rain in Oslo tomorrow?").tool
        'get_weather'
    """

    supports_decision_requests = True

    def __init__(
        self,
        route: DifferentiableRoute | None = None,
        *,
        encoder: Any = None,
        cache: bool = True,
        callbacks: list[Any] | None = None,
    ) -> None:
        if route is not None and encoder is not None:
            raise RouteError(f"encoder={encoder!r} and a route are two encoders: the route brings its own.")
        super().__init__(model=MODEL, cache=cache, callbacks=callbacks)
        self.route = route
        self._encoder = None if route is not None else as_encoder(encoder)
        _living.add(self)

    @property
    def encoder(self) -> Encoder:
        """What reads the requests."""
        return self.route.encoder if self.route is not None else self._encoder  # type: ignore[return-value]

    def with_route(self, predictor: dspy.Predict) -> "DecisionClient":
        """A client for one predictor, with an untrained route of its own that answers as this client does.

        Raises:
            RouteError: If an output of the predictor is no decision.
        """
        route = DifferentiableRoute(predictor.signature, encoder=self.encoder)
        set_criteria = {name: config["criteria"] for name, config in predictor.fields.items() if "criteria" in config}
        route.learned.fields = tuple(
            replace(field, options=_described(field, criteria_by_option(field.kind, set_criteria.get(field.name))))
            for field in route.fields
        )
        return route.as_lm(cache=self.cache, callbacks=self.callbacks)

    @with_callbacks
    def __call__(self, state: Mapping[str, Any], questions: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one decision request of DSPy.

        Args:
            state: `inputs` by name; `input_fields`, which lists them in the signature's order. The rest is not read.
            questions: By output name: `type`, `criteria`, `instructions`.

        Returns:
            By output name `{"noul": p}`, or `probabilities` by label and `confidence`. Where the decision is made
            from outside (see `dspy_router.explore_decisions`), all the mass is on the option taken.

        Raises:
            RouteError: If the route does not decide what is asked.
        """
        asked = self._asked(state, questions)
        response = self._cached(asked)
        if response is not None:
            return self._finish(asked, response, cache_hit=True)
        return self._finish(asked, asked.response(self.encoder.encode_one(asked.text)))

    @with_callbacks
    async def acall(self, state: Mapping[str, Any], questions: Mapping[str, Any]) -> dict[str, Any]:
        """`__call__` for async code."""
        asked = await asyncio.to_thread(self._asked, state, questions)  # the first time, this loads the model
        response = self._cached(asked)
        if response is not None:
            return self._finish(asked, response, cache_hit=True)
        return self._finish(asked, asked.response(await self.encoder.aencode_one(asked.text)))

    def _asked(self, state: Mapping[str, Any], questions: Mapping[str, Any]) -> "_Asked":
        inputs = _in_order(state)
        route = self.route or _zero_shot_route(self.encoder, tuple(inputs), json.dumps(questions))
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
        return _Asked(route, text, heads, request, state)

    def _cached(self, asked: "_Asked") -> dict[str, Any] | None:
        # The weights of a trainable encoder are no part of its fingerprint.
        return dspy.cache.get(asked.request) if self.cache and not self.encoder.trainable else None

    def _finish(self, asked: "_Asked", response: dict[str, Any], cache_hit: bool = False) -> dict[str, Any]:
        if self.cache and not cache_hit and not self.encoder.trainable:
            dspy.cache.put(asked.request, response)
        answers = {name: asked.decided(name, answer) for name, answer in response["answers"].items()}
        asked_of = {"state": asked.state, "questions": asked.request["questions"]}
        record_history(
            self,
            {
                "request": copy.deepcopy(asked.request),
                "response": copy.deepcopy(response | {"answers": answers}),
                "usage": {},
                "cost": 0.0,
                "cache_hit": cache_hit,
                "messages": None,
                "prompt": json.dumps(asked_of, default=str),
                "outputs": [json.dumps(answers)],
                "model": self.model,
            },
        )
        return copy.deepcopy(answers)

    def dump_state(self) -> dict[str, Any]:
        """What a program saves of its predictors' clients: see `dspy_router.client_state`."""
        from dspy_router.client_state import client_state

        return client_state(self)

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> "DecisionClient":
        """A client from its saved state.

        The encoder is the one of a client in use where its fingerprint is the same, or else is made as the saved one
        was.

        Raises:
            RouteError: If the state is damaged, or no such encoder is at hand.
        """
        from dspy_router.client_state import parse_client_state

        return parse_client_state(state, {client.encoder for client in list(_living)})

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecisionClient":
        """A copy with a head of its own and the same encoder."""
        copied = self.copy()
        memo[id(self)] = copied
        copied.route = copy.deepcopy(self.route, memo)
        return copied

    def copy(self, **changes: Any) -> "DecisionClient":
        """A copy with an empty history that shares the route; `changes` as for any LM of DSPy."""
        copied: DecisionClient = super().copy(**changes)
        _living.add(copied)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _living.add(self)

    def __repr__(self) -> str:
        return f"DecisionClient({self.route or self.encoder!r})"


def named_routes(program: dspy.Module) -> dict[str, DifferentiableRoute]:
    """Every route in a program by the name `named_sub_modules` gives it; a bare route is `self`.

    A route behind the client of a predictor has the predictor's name, so that either face knows the other's logs; one
    that several names lead to has the first.
    """
    found = list(program.named_sub_modules(type_=DifferentiableRoute))
    for name, predictor in program.named_sub_modules(type_=dspy.Predict):
        if isinstance(predictor.lm, DecisionClient) and predictor.lm.route is not None:
            found.append((name, predictor.lm.route))
    first = {id(route): name for name, route in reversed(found)}
    return {name: route for name, route in found if first[id(route)] == name}


# Clients in use, by which a loaded one finds an encoder that cannot be made from its name.
_living: "weakref.WeakSet[DecisionClient]" = weakref.WeakSet()


@dataclass(frozen=True)
class _Asked:
    """A request as the route reads it."""

    route: DifferentiableRoute
    text: str
    heads: "dict[str, OptionHead]"
    request: dict[str, Any]
    state: Mapping[str, Any]

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
        own = selected(field.kind, probabilities, predictor_parameters(name))
        decision = decide(self.route, name, probabilities, own, self.text)
        if decision.name == own:
            return answer
        return _answer(field, {option: float(option == decision.name) for option in field.option_names})


def _answer(field: DecisionField, probabilities: dict[str, float]) -> dict[str, Any]:
    if field.kind == "noul":
        return {"noul": probabilities["True"]}
    confidence = max(probabilities.values())
    if field.kind == "score":
        return {"score": mean_level(probabilities), "confidence": confidence, "probabilities": probabilities}
    return {"choice": selected("choice", probabilities), "confidence": confidence, "probabilities": probabilities}


def _of_true(probability: float) -> dict[str, float]:
    return {"True": probability, "False": 1.0 - probability}


def _in_order(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs in the signature's order; DSPy sends them in the call's."""
    listing = state.get("input_fields") or ""
    return dict(sorted(state["inputs"].items(), key=lambda entry: listing.find(f"`{entry[0]}`")))


@lru_cache(maxsize=128)
def _zero_shot_route(encoder: Encoder, inputs: tuple[str, ...], questions: str) -> DifferentiableRoute:
    return DifferentiableRoute(asked_signature(inputs, json.loads(questions)), encoder=encoder)


def _head(route: DifferentiableRoute, name: str, question: Mapping[str, Any]) -> "OptionHead":
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
    options = _described(field, criteria_by_option(field.kind, question.get("criteria")))
    texts = tuple(option.text for option in options)
    if texts == tuple(option.text for option in field.options):
        return route.head[name]
    return _head_with_options(route.head[name], route.encoder, texts)


def _described(field: DecisionField, criteria: Mapping[str, str]) -> tuple[Option, ...]:
    """A field's options with other descriptions, where the criteria are not those the field declares."""
    given = {name: text for name, text in criteria.items() if text}
    if not given:
        return field.options
    declared = {option.name: option.description for option in field.declared_options}
    changed = {name: text for name, text in given.items() if text != declared.get(name)}
    return tuple(replace(option, description=changed.get(option.name, option.description)) for option in field.options)


@lru_cache(maxsize=16)
def _head_with_options(head: "OptionHead", encoder: Encoder, texts: Iterable[str]) -> "OptionHead":
    import torch

    return head.with_options(torch.from_numpy(encoder.encode(list(texts))))
