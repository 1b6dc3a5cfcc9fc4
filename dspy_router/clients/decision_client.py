"""A route's head as the `lm` of a plain `dspy.Predict`.

DSPy sends a decision request to any client that says it supports them: the call's inputs and a question an output in,
probabilities out. DSPy marks this socket as experimental; the package meets it in this folder alone.
"""

import asyncio
import copy
import json
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dspy
from dspy.clients.base_lm import record_history
from dspy.utils.callback import with_callbacks

from dspy_router.clients.decision_request import MODEL, RouteRequest, described_options
from dspy_router.decision_types import criteria_by_option, criterion_text
from dspy_router.encoders.base import Encoder
from dspy_router.encoders.choose import as_encoder
from dspy_router.errors import RouteError
from dspy_router.route import DifferentiableRoute


class DecisionClient(dspy.BaseLM):
    """Answer the decisions of `dspy.Predict`s with a small head on frozen sentence embeddings: no LM, no price.

    Give it as `lm` to any `dspy.Predict` whose outputs are all `Literal`, `bool`, `Choice`, `Noul` or `Score`, or
    configure it for a whole program. Without a route it answers every such signature untrained, from the
    descriptions of the options. `RouteFinetune` finds it behind the predictors of a program, and trains a route for
    each; `dspy.experimental.ReAnchor` then tunes what a predictor makes of the probabilities.

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
        RouteError: If both a route and an encoder are given, or the route decides a list.

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
        if route is not None and (lists := [field.name for field in route.fields if field.several]):
            raise RouteError(
                f"{lists} take lists of options, which DSPy's decision requests cannot ask for. Call the route itself, "
                "or put it in the predictor's place with replace_predictor."
            )
        super().__init__(model=MODEL, cache=cache, callbacks=callbacks)
        self.route = route
        self._encoder = None if route is not None else as_encoder(encoder)
        _register(self)

    @property
    def encoder(self) -> Encoder:
        """What reads the requests."""
        return self.route.encoder if self.route is not None else self._encoder  # type: ignore[return-value]

    def with_route(self, predictor: dspy.Predict) -> "DecisionClient":
        """A client for one predictor, with an untrained route and, where that is trained, an encoder of its own.

        It answers as this client does.

        Raises:
            RouteError: If an output of the predictor is no decision.
        """
        signature = predictor.signature
        for name, config in predictor.fields.items():
            if config.get("instructions"):  # which are asked in place of the description
                signature = signature.with_updated_fields(name, desc=criterion_text(config["instructions"]))
        route = DifferentiableRoute(signature, encoder=copy.deepcopy(self.encoder))
        set_criteria = {name: config["criteria"] for name, config in predictor.fields.items() if "criteria" in config}
        criteria = {field.name: criteria_by_option(field.kind, set_criteria.get(field.name)) for field in route.fields}
        route.learned.fields = tuple(
            replace(field, options=described_options(field, criteria[field.name])) for field in route.fields
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

    def _asked(self, state: Mapping[str, Any], questions: Mapping[str, Any]) -> RouteRequest:
        return RouteRequest.read(self.route, self.encoder, state, questions)

    def _cached(self, asked: RouteRequest) -> dict[str, Any] | None:
        # The weights of a trainable encoder are no part of its fingerprint.
        return dspy.cache.get(asked.request) if self.cache and not self.encoder.trainable else None

    def _finish(self, asked: RouteRequest, response: dict[str, Any], cache_hit: bool = False) -> dict[str, Any]:
        if self.cache and not cache_hit and not self.encoder.trainable:
            dspy.cache.put(asked.request, response)
        answers = {name: asked.decided(name, answer) for name, answer in response["answers"].items()}
        if dspy.settings.disable_history:
            return copy.deepcopy(answers)
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
        """What a program saves of its predictors' clients: see `dspy_router.clients.client_state`."""
        from dspy_router.clients.client_state import client_state

        return client_state(self)

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> "DecisionClient":
        """A client from its saved state.

        The encoder is the one of a client in use where its fingerprint is the same, or else is made as the saved one
        was.

        Raises:
            RouteError: If the state is damaged, or no such encoder is at hand.
        """
        from dspy_router.clients.client_state import parse_client_state

        with _living_lock:
            clients = list(_living)
        return parse_client_state(state, {client.encoder for client in clients})

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecisionClient":
        """A copy with a head of its own and the same encoder."""
        copied = self.copy()
        memo[id(self)] = copied
        copied.route = copy.deepcopy(self.route, memo)
        return copied

    def copy(self, **changes: Any) -> "DecisionClient":
        """A copy with an empty history that shares the route; `changes` as for any LM of DSPy."""
        copied: DecisionClient = super().copy(**changes)
        _register(copied)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register(self)

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
_living_lock = threading.Lock()


def _register(client: DecisionClient) -> None:
    with _living_lock:
        _living.add(client)
