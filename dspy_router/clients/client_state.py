"""The saved form of a `DecisionClient`, and the only code that knows it.

A predictor's own state does not tell how the client behind it was made, so this one says it: the inputs and options of
the route, how to make the encoder, and the route's state of `dspy_router.persistence`. It is plain JSON.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from dspy.clients.base_lm import LM_CLASS_STATE_KEY
from pydantic import BaseModel, ConfigDict, ValidationError

from dspy_router.clients.decision_client import DecisionClient
from dspy_router.decision_types import DecisionKind, asked_signature
from dspy_router.encoders.base import Encoder
from dspy_router.encoders.choose import encoder_from_settings, encoder_settings
from dspy_router.encoders.function import FunctionEncoder
from dspy_router.errors import RouteError
from dspy_router.options import Option
from dspy_router.route import DifferentiableRoute
from dspy_router.sealing import require_intact, sealed

FORMAT = "dspy_router.client"
VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Input(_Strict):
    name: str
    text: bool  # declared as str, which DSPy writes differently where a list is given


class _Option(_Strict):
    name: str
    description: str
    arguments: list[str]
    argument_descriptions: list[str] = []
    value: str | int | bool | None
    spoken: str | None


class _Field(_Strict):
    name: str
    kind: DecisionKind
    options: list[_Option]


class _Route(_Strict):
    inputs: list[_Input]
    fields: list[_Field]
    state: dict[str, Any]


class _Client(_Strict):
    format: Literal["dspy_router.client"]
    version: Literal[1]
    model: str
    cache: bool
    encoder: dict[str, Any] | None
    fingerprint: dict[str, Any]
    route: _Route | None
    sha256: str


def client_state(client: DecisionClient) -> dict[str, Any]:
    """A client's state as a JSON-compatible object, with the class name by which DSPy finds its reader."""
    kind = type(client)
    state = {
        "format": FORMAT,
        "version": VERSION,
        "model": client.model,
        "cache": client.cache,
        "encoder": encoder_settings(client.encoder),
        "fingerprint": client.encoder.fingerprint.to_dict(),
        "route": None if client.route is None else _route_state(client.route),
    }
    return {LM_CLASS_STATE_KEY: f"{kind.__module__}.{kind.__qualname__}", **sealed(state)}


def parse_client_state(state: dict[str, Any], encoders: Iterable[Encoder]) -> DecisionClient:
    """The client that a state describes.

    Args:
        state: As `client_state` gave it, with or without the class name.
        encoders: Encoders in use; one with the saved fingerprint is taken before another is made.

    Raises:
        RouteError: If the state is damaged or of another version, or the encoder cannot be made.
    """
    state = {name: value for name, value in state.items() if name != LM_CLASS_STATE_KEY}
    if state.get("format") == FORMAT and state.get("version") != VERSION:
        raise RouteError(
            f"The saved client has format version {state.get('version')!r}; this release reads {VERSION}. Load it with "
            "the release that wrote it."
        )
    require_intact(state)
    try:
        saved = _Client.model_validate(state)
    except ValidationError as error:
        raise RouteError(f"The saved state of a DecisionClient is damaged: {error}. Save the program again.") from error
    encoder = _encoder(saved, encoders)
    if saved.route is None:
        return DecisionClient(encoder=encoder, cache=saved.cache)
    return _parse_route(saved.route, encoder).as_lm(cache=saved.cache)


def _encoder(saved: _Client, encoders: Iterable[Encoder]) -> Encoder:
    for encoder in encoders:
        # A trainable one is made anew: its weights are the route's.
        if encoder.trainable or not _could_be(encoder, saved):
            continue
        if encoder.fingerprint.to_dict() == saved.fingerprint:
            return encoder
    if saved.encoder is None:
        raise RouteError(
            f"The saved client reads requests with {saved.fingerprint.get('name')!r}, a callable that no file can "
            "hold. Give the predictor a DecisionClient(encoder=...) with it, then load the program again."
        )
    encoder = encoder_from_settings(saved.encoder)
    if encoder.fingerprint.to_dict() != saved.fingerprint:
        raise RouteError(
            f"The client was saved with the encoder {saved.fingerprint}, but {encoder!r} is {encoder.fingerprint}. "
            "Install the weights it was saved with, or compile again."
        )
    return encoder


def _could_be(encoder: Encoder, saved: _Client) -> bool:
    """Whether an encoder is worth its fingerprint, which loads a model or calls somebody's function."""
    if isinstance(encoder, FunctionEncoder):
        return encoder.name == saved.fingerprint.get("name")
    return encoder_settings(encoder) == saved.encoder


def _route_state(route: DifferentiableRoute) -> dict[str, Any]:
    return _Route(
        inputs=[_Input(name=name, text=info.annotation is str) for name, info in route.signature.input_fields.items()],
        fields=[
            _Field(name=field.name, kind=field.kind, options=[_option_state(option) for option in field.options])
            for field in route.fields
        ],
        state=route.learned.dump_state(),
    ).model_dump()


def _option_state(option: Option) -> _Option:
    # An enum's member is no JSON; DSPy's decision requests know none either.
    value = option.value if isinstance(option.value, (str, int, bool, type(None))) else option.name
    return _Option(
        name=option.name,
        description=option.description,
        arguments=list(option.arguments),
        argument_descriptions=list(option.argument_descriptions),
        value=value,
        spoken=option.spoken,
    )


def _parse_route(saved: _Route, encoder: Encoder) -> DifferentiableRoute:
    questions = {field.name: _question(field) for field in saved.fields}
    try:
        signature = asked_signature({entry.name: str if entry.text else Any for entry in saved.inputs}, questions)
        route = DifferentiableRoute(signature, encoder=encoder)
    except ValueError as error:  # DSPy's too, of options that make no type
        raise RouteError(f"The saved state of a DecisionClient is damaged: {error} Save the program again.") from error
    options = {
        field.name: tuple(
            Option(
                option.name,
                option.description,
                tuple(option.arguments),
                option.value,
                option.spoken,
                tuple(option.argument_descriptions),
            )
            for option in field.options
        )
        for field in saved.fields
    }
    route.learned.fields = tuple(
        dataclasses.replace(field, options=options[field.name]) for field in route.learned.fields
    )
    route.learned.load_state(saved.state)
    return route


def _question(field: _Field) -> dict[str, Any]:
    criteria: Any = {option.name: None for option in field.options}
    if field.kind == "score":
        criteria = [option.description for option in field.options]
    return {"type": field.kind, "criteria": None if field.kind == "noul" else criteria}
