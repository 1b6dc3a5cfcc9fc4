"""The saved form of a route, and the only code that knows it.

A route's state is a JSON object: a format name and version, the fields with their options, the encoder's
fingerprint, and the tensors as base64 of safetensors bytes. It holds no pickle and no weights of a frozen
encoder; the weights of a `TokenEncoder` are part of what was trained and are in it.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from dspy_router.encoders.base import Encoder, Fingerprint
from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField
from dspy_router.heads import OptionHead, RouteHead

FORMAT = "dspy_router.route"
VERSION = 1
ENCODER_PREFIX = "encoder."


def route_state(fields: Sequence[DecisionField], head: RouteHead, encoder: Encoder) -> dict[str, Any]:
    """A route's state as a JSON-compatible object; tensors are kept bit for bit."""
    tensors = {
        f"{field.name}/{name}": tensor for field in fields for name, tensor in head[field.name].state_dict().items()
    }
    tensors |= {f"{ENCODER_PREFIX}{name}": tensor for name, tensor in network_state(encoder).items()}
    data = serialize_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return {
        "format": FORMAT,
        "version": VERSION,
        "fields": [
            {
                "name": field.name,
                "options": [{"name": option.name, "text": option.text} for option in field.options],
            }
            for field in fields
        ],
        "encoder": encoder.fingerprint.to_dict(),
        "tensors": base64.b64encode(data).decode("ascii"),
    }


def parse_route_state(
    state: Any, fields: Sequence[DecisionField], encoder: Encoder
) -> tuple[RouteHead, dict[str, Tensor]]:
    """The head that a state describes, and the encoder's trained weights if it holds any.

    Nothing is changed in the caller's objects: a route loads only what came through here whole.

    Raises:
        RouteError: If the state is damaged, of another version, or describes other fields, options or
            another encoder.
    """
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RouteError(f"This is no state of a route: expected a JSON object with format {FORMAT!r}.")
    if state.get("version") != VERSION:
        raise RouteError(
            f"The saved route has format version {state.get('version')!r}; this release reads {VERSION}. "
            "Load it with the release that wrote it."
        )
    _require_same_options(state.get("fields"), fields)
    _require_same_encoder(state.get("encoder"), encoder.fingerprint)
    tensors = _read_tensors(state.get("tensors"))
    heads = []
    for field in fields:
        template = OptionHead(torch.zeros(len(field.options), encoder.dimension))
        found = {
            name.removeprefix(f"{field.name}/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{field.name}/")
        }
        _require_same_shapes(f"field {field.name!r}", found, template.state_dict())
        template.load_state_dict(found)
        if not (float(template.temperature) > 0 and float(template.scale) > 0):
            raise RouteError(f"The saved scale or temperature of field {field.name!r} is not positive.")
        heads.append(template)
    network = {
        name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(ENCODER_PREFIX)
    }
    _require_same_shapes("the encoder", network, network_state(encoder))
    return RouteHead([field.name for field in fields], heads), network


def network_state(encoder: Encoder) -> dict[str, Tensor]:
    """The trainable weights of an encoder by name; empty for a frozen one."""
    network: torch.nn.Module | None = getattr(encoder, "network", None) if encoder.trainable else None
    return dict(network.state_dict()) if network is not None else {}


def _require_same_options(saved: Any, fields: Sequence[DecisionField]) -> None:
    try:
        names = {entry["name"]: [option["name"] for option in entry["options"]] for entry in saved}
    except (TypeError, KeyError) as error:
        raise RouteError(f"The saved list of fields is damaged ({error!r}). Save the program again.") from error
    expected = {field.name: list(field.option_names) for field in fields}
    if names != expected:
        raise RouteError(
            f"The saved route decides {names}, this one {expected}. Build the program with the same signature and "
            "tools, in the same order, as when it was saved."
        )


def _require_same_encoder(saved: Any, own: Fingerprint) -> None:
    try:
        fingerprint = Fingerprint(**saved)
    except TypeError as error:
        raise RouteError(f"The saved encoder fingerprint is damaged: {saved!r}. Save the program again.") from error
    if fingerprint != own:
        raise RouteError(
            f"The route was saved with the encoder {fingerprint}, but this program uses {own}. Vectors of another "
            "encoder mean something else to the head: load with the same encoder, or compile again."
        )


def _read_tensors(encoded: Any) -> dict[str, Tensor]:
    if not isinstance(encoded, str):
        raise RouteError(f"The saved tensors are damaged: expected base64 text, found {type(encoded).__name__}.")
    try:
        tensors = parse_tensors(base64.b64decode(encoded, validate=True))
    except (binascii.Error, SafetensorError, ValueError, KeyError) as error:
        raise RouteError(f"The saved tensors are damaged: {error}. Save the program again.") from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise RouteError(f"The saved tensor {name!r} holds values that are not finite, or not float32.")
    return tensors


def _require_same_shapes(owner: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if shapes != wanted:
        raise RouteError(f"The saved tensors of {owner} have shapes {shapes}; expected {wanted}.")
