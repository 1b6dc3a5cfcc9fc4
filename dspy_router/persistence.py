"""The saved form of a route, and the only code that knows it.

A route's state is a JSON object: a format name, its version and the release that wrote it, the fields with their
options, the encoder's fingerprint, the tensors as base64 of safetensors bytes, and a SHA-256 of all that. It holds
no pickle and no weights of a frozen encoder; the weights of a `TokenEncoder` are part of what was trained and are in
it. Tensors that are all zero, as in a head that has learned nothing yet, are left out. What the route remembers of its
training, and what it promises, stand beside them. Version 3 named the head of a promise by the last bits of a product,
which differ between processors, so a promise in it counts as one for another head. Version 2 had neither record nor
promise, version 1 no checksum, no release and left nothing out; all are still read.

Reading trusts nothing that a state says. The checksum tells a damaged state from a sound one; it is no signature, so
a state that somebody made on purpose passes the same checks of types, names, shapes and values. Nothing in a state
is executed. Memory is bounded by what there already is: at most three times the length of the state for its
checksum, and ten times the bytes of the route's own tensors. The tensors' text is measured against the route's own
shapes before it is decoded, and the shapes it claims are compared with them before anything is made from it.

All of it is about one route. DSPy reads the file around it, before any route is touched: see `load_state` of
`dspy_router.parameter.RouteParameter`.
"""

import base64
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialize

import dspy_router
from dspy_router.encoders.base import Encoder, Fingerprint, shortened
from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField
from dspy_router.folded import FoldedHead
from dspy_router.folded_lists import folded_form
from dspy_router.guarding.guard_report import GuardReport
from dspy_router.sealing import AFTER_DAMAGE, require_intact, sealed
from dspy_router.training_record import TrainingRecord

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_told_of_form: set[tuple[Fingerprint, Fingerprint]] = set()

FORMAT = "dspy_router.route"
VERSION = 4
KEYS = {
    1: {"format", "version", "fields", "encoder", "tensors"},
    2: {"format", "version", "release", "fields", "encoder", "tensors", "sha256"},
    3: {"format", "version", "release", "fields", "encoder", "tensors", "training", "guard", "sha256"},
}
KEYS[4] = KEYS[3]
ENCODER = "encoder."  # before the names of a trainable encoder's tensors; a field's have its name and a "/" before
_GUARD = TypeAdapter(GuardReport)
HEADER_BYTES_A_TENSOR = 256  # of safetensors: dtype, up to five dimensions and two offsets of 20 digits


@dataclass(frozen=True)
class SavedRoute:
    """What a state describes: heads by field, the encoder's trained weights if any, the record and the guard."""

    heads: dict[str, FoldedHead]
    network: dict[str, np.ndarray]
    record: TrainingRecord | None
    guard: GuardReport | None


def route_state(
    fields: Sequence[DecisionField],
    heads: Mapping[str, FoldedHead],
    encoder: Encoder,
    record: TrainingRecord | None,
    guard: GuardReport | None,
) -> dict[str, Any]:
    """A route's state as a JSON-compatible object; tensors are kept bit for bit.

    Raises:
        RouteError: If the head or a name is such that the state could not be loaded again.
    """
    tensors = _named_tensors({name: head.parameters for name, head in heads.items()}, encoder)
    for name, tensor in tensors.items():
        finite = bool(np.isfinite(tensor).all())
        if tensor.dtype != np.float32 or not finite:
            raise RouteError(
                f"The tensor {name!r} is {tensor.dtype} and {'finite' if finite else 'not finite'}; only finite "
                "float32 could be loaded again, so nothing is saved. Call route.head.float() or train again."
            )
    for name, head in heads.items():
        _require_decidable(name, head)
    learned = {name: tensor for name, tensor in tensors.items() if _any_bit(tensor)}
    return sealed(
        {
            "format": FORMAT,
            "version": VERSION,
            "release": dspy_router.__version__,
            "fields": [
                {
                    "name": field.name,
                    "options": [{"name": option.name, "text": option.text} for option in field.options],
                    **({"list": True} if field.several else {}),
                }
                for field in fields
            ],
            "encoder": encoder.fingerprint.to_dict(),
            "tensors": base64.b64encode(serialize(learned)).decode("ascii"),
            "training": None if record is None else record.to_state(),
            "guard": None if guard is None else guard.to_dict(),
        }
    )


def parse_route_state(state: Any, fields: Sequence[DecisionField], encoder: Encoder) -> SavedRoute:
    """What a state describes.

    Nothing is changed in the caller's objects: a route loads only what came through here whole.

    Raises:
        RouteError: If the state is damaged, of an unknown version, or describes other fields, options or another
            encoder, or if this program's encoder cannot be loaded.
    """
    version = _require_version(state)
    if version > 1:
        require_intact(state)
    _require_same_options(state["fields"], fields)
    require_same_encoder(_parse_fingerprint(state["encoder"]), encoder)
    untrained = {
        field.name: folded_form(field).untrained(np.zeros((len(field.options), encoder.dimension), np.float32))
        for field in fields
    }
    expected = _named_tensors({name: head.parameters for name, head in untrained.items()}, encoder)
    tensors = _read_tensors(state["tensors"], expected)
    if version == 1 and (missing := sorted(set(expected) - set(tensors))):
        raise RouteError(f"The saved tensors are damaged: {missing} are missing. Save the program again.")
    whole = {name: tensors.get(name, np.zeros(tensor.shape, np.float32)) for name, tensor in expected.items()}
    heads = {}
    for field, head in untrained.items():
        heads[field] = type(head)({name: whole[f"{field}/{name}"] for name in head.parameters})
        _require_decidable(field, heads[field])
    network = {name: whole[f"{ENCODER}{name}"] for name in network_state(encoder)}
    record, guard = None, None
    if state.get("training") is not None:
        options = {field.name: field.option_names for field in fields}
        record = TrainingRecord.from_state(state["training"], options, encoder.dimension)
    if state.get("guard") is not None:
        guard = _parse_guard(state["guard"])
    return SavedRoute(heads, network, record, guard)


def _parse_guard(saved: Any) -> GuardReport:
    try:
        return _GUARD.validate_json(json.dumps(saved), strict=True)
    except ValidationError as error:
        raise RouteError(f"The saved guard is damaged: {shortened(str(error), 200)}. {AFTER_DAMAGE}") from error


def network_state(encoder: Encoder) -> "dict[str, torch.Tensor]":
    """The trainable weights of an encoder by name; empty for a frozen one."""
    network: torch.nn.Module | None = getattr(encoder, "network", None) if encoder.trainable else None
    return dict(network.state_dict()) if network is not None else {}


def require_same_encoder(saved: Fingerprint, encoder: Encoder) -> None:
    """Refuse an encoder that is not the one a head was saved with.

    Raises:
        RouteError: If it is another one, or cannot be loaded; the message names both.
    """
    try:
        own = encoder.fingerprint
    except Exception as error:  # what a model's loader raises is not ours to know
        raise RouteError(
            f"The route was saved with the encoder {saved}; this program's encoder, {encoder!r}, cannot be loaded: "
            f"{error}\nMake the model available to this process, or build the route with the encoder it was saved "
            "with, and load again. Nothing was loaded."
        ) from error
    if saved == own:
        return
    if encoder.serves(saved):
        if (saved, own) in _told_of_form:  # DSPy loads everything twice, on a copy at first
            return
        _told_of_form.add((saved, own))
        logger.warning(
            "The route was saved with the encoder %s and is used with %s: the same model in another form. A few "
            "decisions in a thousand differ, and a guard promises nothing until guard() is called again.", saved, own,
        )  # fmt: skip
        return
    advice = (
        "The weights behind the name have changed: get the ones it was saved with"
        if (saved.name, saved.dimension) == (own.name, own.dimension)
        else f"Build the route with the encoder {shortened(saved.name, 200)!r}"
    )
    raise RouteError(
        f"The route was saved with the encoder {saved}, but this program uses {own}. Vectors of another encoder mean "
        f"something else to the head. {advice}, or compile the program again with this one."
    )


def _require_version(state: Any) -> int:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RouteError(f"This is no state of a route: expected a JSON object with format {FORMAT!r}.")
    version = state.get("version")
    if type(version) is not int or not 1 <= version <= 1_000_000:
        raise RouteError(f"The saved state is damaged: its format version is no count. {AFTER_DAMAGE}")
    if version > VERSION:
        release = state.get("release")
        writer = f"dspy-router {shortened(release)}" if isinstance(release, str) else "a later dspy-router"
        raise RouteError(
            f"The saved route has format version {version} and was written by {writer}; this release, "
            f"{dspy_router.__version__}, reads versions 1 to {VERSION}. Load it with the release that wrote it, or a "
            "later one."
        )
    keys = KEYS[version]
    if set(state) != keys:
        raise RouteError(
            f"The saved state is damaged: {sorted(keys - set(state))} are missing and {len(set(state) - keys)} unknown "
            f"entries are in it. {AFTER_DAMAGE}"
        )
    return version


def _require_same_options(saved: Any, fields: Sequence[DecisionField]) -> None:
    names, expected = _names(saved), [field.name for field in fields]
    advice = "Build the program with the same signature and tools, in the same order, as when it was saved."
    if names != expected:
        raise RouteError(
            f"The saved route decides the fields {shortened(repr(names), 200)}, this one {expected}. {advice}"
        )
    for field, entry in zip(fields, saved, strict=True):
        if (entry.get("list") is True) != field.several:
            kinds = ("a list of options", "one option")
            was, here = kinds if entry.get("list") is True else kinds[::-1]
            raise RouteError(f"The saved route decides {field.name!r} as {was}, this one as {here}. {advice}")
        found, own = _names(entry.get("options")), list(field.option_names)
        if found == own:
            continue
        place = next((n for n, pair in enumerate(zip(found, own, strict=False)) if len(set(pair)) > 1), None)
        place = min(len(found), len(own)) if place is None else place
        said, here = (repr(shortened(names[place])) if place < len(names) else "nothing" for names in (found, own))
        raise RouteError(
            f"The saved route decides {field.name!r} among {len(found)} options, this one among {len(own)}: option "
            f"{place + 1} was {said}, here it is {here}. {advice} Tools that were added or removed after it was built "
            "have to be so again before load(...), or left to the tools= it is built with."
        )


def _names(entries: Any) -> list[str]:
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries
    ):
        raise RouteError(f"The saved list of fields and options is damaged. {AFTER_DAMAGE}")
    return [entry["name"] for entry in entries]


def _parse_fingerprint(saved: Any) -> Fingerprint:
    types = {"name": str, "revision": str, "weights": str, "dimension": int, "normalized": bool}
    if not isinstance(saved, dict) or {name: type(value) for name, value in saved.items()} != types:
        raise RouteError(f"The saved encoder fingerprint is damaged: expected {list(types)}. {AFTER_DAMAGE}")
    return Fingerprint(**saved)


def _named_tensors(heads: Mapping[str, Mapping[str, np.ndarray]], encoder: Encoder) -> dict[str, np.ndarray]:
    tensors = {f"{field}/{name}": value for field, parameters in heads.items() for name, value in parameters.items()}
    return tensors | {f"{ENCODER}{name}": tensor.cpu().numpy() for name, tensor in network_state(encoder).items()}


def _any_bit(tensor: np.ndarray) -> bool:
    return bool(tensor.view(np.int32).any())  # -0.0 is kept


def _read_tensors(encoded: Any, expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an encoded text, each of an expected name and of the shape expected of it."""
    longest = sum(4 * tensor.size + len(json.dumps(name)) for name, tensor in expected.items())
    longest = 4 * math.ceil((longest + HEADER_BYTES_A_TENSOR * (len(expected) + 1)) / 3)
    if not isinstance(encoded, str) or len(encoded) > longest:
        said = f"{len(encoded)} characters" if isinstance(encoded, str) else type(encoded).__name__
        raise RouteError(
            f"The saved tensors are damaged: expected at most {longest} characters of base64, found {said}. "
            f"{AFTER_DAMAGE}"
        )
    try:
        entries = deserialize(base64.b64decode(encoded, validate=True))
    except (ValueError, SafetensorError) as error:
        raise RouteError(f"The saved tensors are damaged: {shortened(str(error), 200)}. {AFTER_DAMAGE}") from error
    tensors = {}
    for name, entry in entries:
        own = expected[name].shape if name in expected else None
        if tuple(entry["shape"]) != own or entry["dtype"] != "F32":
            raise RouteError(
                f"The saved tensor {shortened(name)!r} is {entry['dtype']} of shape {tuple(entry['shape'])}; "
                + (f"expected F32 of {own}." if own is not None else f"expected only {sorted(expected)}.")
            )
        values = np.frombuffer(entry["data"], dtype="<f4").reshape(own)
        if not np.isfinite(values).all():
            raise RouteError(f"The saved tensor {name!r} holds values that are not finite. {AFTER_DAMAGE}")
        tensors[name] = values
    return tensors


def _require_decidable(field: str, head: FoldedHead) -> None:
    """Refuse a head whose probabilities are not numbers for some unit vector."""
    scale, temperature = (float(head.parameters[name]) for name in ("scale", "temperature"))
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(head.weights).sum(axis=1) + np.abs(head.biases)
    if scale <= 0 or temperature <= 0 or not np.isfinite(largest).all():
        raise RouteError(
            f"The head of field {field!r} cannot decide: its scale {scale:g} or its temperature {temperature:g} is not "
            "positive, or its logits are not finite."
        )
