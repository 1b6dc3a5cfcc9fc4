"""What a route remembers of its training beside the head: what its options look like, and which texts it has seen.

A guard must not be set on texts that were trained on, so their keys are kept; what the options look like tells whether
a request is like them. The size is bounded: see `dspy_router.learning.reference`, and `MOST_KEYS` keys of 8 bytes.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as serialize_tensors

from dspy_router.errors import RouteError
from dspy_router.learning.description_transfer import DescriptionTransfer
from dspy_router.learning.reference import Reference

MOST_KEYS = 200_000
KEY_BYTES = 8
HEADER_BYTES = 4096  # of safetensors, for the six tensors of a reference


@dataclass(frozen=True)
class TrainingRecord:
    """What a route was trained on, as far as it is remembered.

    Attributes:
        references: By output field, what its options look like.
        transfers: By output field, how new options compare with the trained ones.
        keys: Of the texts trained on, as `text_keys` makes them.
    """

    references: Mapping[str, Reference] = field(default_factory=dict)
    transfers: Mapping[str, DescriptionTransfer] = field(default_factory=dict)
    keys: frozenset[bytes] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainingRecord":
        return self  # never changed

    def with_texts(self, texts: Iterable[str]) -> "TrainingRecord":
        """The record with further texts; of more than `MOST_KEYS` the smallest stay, a fair sample."""
        return replace(self, keys=frozenset(sorted(self.keys | text_keys(texts))[:MOST_KEYS]))

    def holds(self, text: str) -> bool:
        """Whether a text was trained on."""
        return not self.keys.isdisjoint(text_keys([text]))

    def to_state(self) -> dict[str, Any]:
        """JSON-compatible; `from_state` reads it."""
        references = {}
        for name, reference in self.references.items():
            tensors, metadata = reference.to_state()
            references[name] = {"metadata": metadata, "tensors": _text(serialize_tensors(tensors))}
        transfers = {
            name: {"center": _text(found.center.astype("<f4").tobytes()), "scale": found.scale, "offset": found.offset}
            for name, found in self.transfers.items()
        }
        return {"references": references, "transfers": transfers, "keys": _text(b"".join(sorted(self.keys)))}

    @classmethod
    def from_state(cls, state: Any, options: Mapping[str, tuple[str, ...]], dimension: int) -> "TrainingRecord":
        """The record that a state describes, for a route with these options by field.

        Raises:
            RouteError: If the state is damaged or about something else.
        """
        try:
            saved = dict(state["references"])
            keys = base64.b64decode(state["keys"], validate=True)
            if (
                set(state) != {"references", "transfers", "keys"}
                or len(keys) % KEY_BYTES
                or len(keys) > MOST_KEYS * KEY_BYTES
            ):
                raise ValueError("unknown or missing entries")
            references = {name: _reference(entry, options[name], dimension) for name, entry in saved.items()}
            transfers = {name: _transfer(entry, dimension) for name, entry in dict(state["transfers"]).items()}
            if not set(transfers) <= set(options):
                raise ValueError(f"transfers for {sorted(transfers)}")
        except (TypeError, KeyError, ValueError, AttributeError, binascii.Error, SafetensorError) as error:
            raise RouteError(
                f"The saved record of the training is damaged ({error!r}). Save the program again."
            ) from error
        return cls(
            references,
            transfers,
            frozenset(keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)),
        )


def text_keys(texts: Iterable[str]) -> frozenset[bytes]:
    """Short keys that stand for texts; case and outer space do not count."""
    return frozenset(
        hashlib.blake2b(text.strip().lower().encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()
        for text in texts
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _transfer(entry: Any, dimension: int) -> DescriptionTransfer:
    center = np.frombuffer(base64.b64decode(entry["center"], validate=True), "<f4")
    if set(entry) != {"center", "scale", "offset"} or center.shape != (dimension,):
        raise ValueError(f"a transfer with a center of shape {center.shape}")
    return DescriptionTransfer(center, float(entry["scale"]), float(entry["offset"]))


def _reference(entry: Any, options: tuple[str, ...], dimension: int) -> Reference:
    metadata, encoded = entry["metadata"], entry["tensors"]
    expected = Reference.expected_tensors(metadata, dimension)
    if tuple(metadata["options"]) != options:
        raise ValueError(f"a reference for the options {metadata['options']}")
    size = sum(int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize for kind, shape in expected.values())
    if len(encoded) > 2 * (size + HEADER_BYTES):
        raise ValueError(f"{len(encoded)} characters of tensors")
    return Reference.from_state(parse_tensors(base64.b64decode(encoded, validate=True)), metadata)
