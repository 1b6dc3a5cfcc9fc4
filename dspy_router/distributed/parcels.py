"""What a worker process gets: programs and DSPy's settings as bytes, frozen encoders by name.

An encoder is pickled without its weights, so a new copy would load them again. It goes to a worker once, under a
name; whatever comes later names it and finds it there.

A pickled LM holds its API key. Nothing here writes bytes anywhere; see `RayExecutor` for the way they take.
"""

import io
import pickle
from pydoc import locate
from typing import Any

import cloudpickle
import dspy

from dspy_router.encoders.base import Encoder
from dspy_router.errors import RouteError

# Settings that belong to the process and the call that made them: listeners, streams, records.
_OWN_SETTINGS = {
    "callbacks", "caller_modules", "caller_predict", "send_stream", "stream_listeners", "trace", "usage_tracker",
    "_route_chooser", "_route_recorders",
}  # fmt: skip


class Parcels:
    """Makes parcels, for workers to open with an `Opener`.

    Attributes:
        encoders: By name, those that the parcels so far speak of.
    """

    def __init__(self) -> None:
        self.encoders: dict[str, Encoder] = {}

    def pack(self, **parts: Any) -> bytes:
        """One pickle of all parts, so that what they share stays shared.

        Raises:
            RouteError: Naming the part that cannot be pickled.
        """
        try:
            return self._pickled(parts)
        except Exception as error:
            for name, part in parts.items():
                try:
                    self._pickled(part)
                except Exception as own:
                    raise RouteError(
                        f"The {name} cannot be sent to a worker process: {type(own).__name__}: {own}. What goes there "
                        "must be picklable by cloudpickle: make locks, connections, open files and the like where they "
                        "are used, or leave them out in __getstate__."
                    ) from own
            raise RouteError(f"{list(parts)} cannot be sent to a worker process: {error}") from error

    def encoders_beside(self, known: set[str]) -> tuple[bytes, set[str]]:
        """The encoders whose names are not known yet, as bytes, and their names."""
        new = {name: encoder for name, encoder in self.encoders.items() if name not in known}
        try:
            return cloudpickle.dumps(new), set(new)
        except Exception as error:
            raise RouteError(
                f"An encoder of {list(new.values())} cannot be sent to a worker process: {type(error).__name__}: "
                f"{error}. Give an encoder that can be pickled, such as a SentenceEncoder or a function of a module."
            ) from error

    def _pickled(self, value: Any) -> bytes:
        buffer = io.BytesIO()
        _Pickler(buffer, self.encoders).dump(value)
        return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, encoders: dict[str, Encoder]) -> None:
        super().__init__(file)
        self._encoders = encoders

    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, Encoder) or value.trainable:  # what is trained is part of the program
            return None
        name = str(id(value))  # not given away while the encoder is held here
        self._encoders[name] = value
        return name

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, dspy.BaseLM):
            return super().reducer_override(value)
        make, arguments, state, *rest = value.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return make, arguments, {**state, "history": []}, *rest  # without the record of all its calls


class Opener:
    """Opens parcels in a worker process."""

    def __init__(self) -> None:
        self._encoders: dict[str, Encoder] = {}

    def add_encoders(self, parcel: bytes) -> None:
        """Take in what `Parcels.encoders_beside` gave."""
        self._encoders.update(pickle.loads(parcel))

    def open(self, parcel: bytes) -> dict[str, Any]:
        """The parts of a parcel, by name."""
        parts: dict[str, Any] = _Unpickler(io.BytesIO(parcel), self._encoders).load()
        return parts


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, encoders: dict[str, Encoder]) -> None:
        super().__init__(file)
        self._encoders = encoders

    def persistent_load(self, name: str) -> Encoder:
        return self._encoders[name]


def settings_of_here() -> dict[str, Any]:
    """DSPy's settings of this context as far as they speak of how programs run: LM, adapter, limits, the user's own."""
    return {name: value for name, value in dspy.settings.copy().items() if name not in _OWN_SETTINGS}


def cache_of_here() -> dict[str, Any]:
    """The settings of DSPy's cache, as `dspy.configure_cache` takes them."""
    cache = dspy.cache
    settings: dict[str, Any] = {
        "enable_disk_cache": cache.enable_disk_cache,
        "enable_memory_cache": cache.enable_memory_cache,
        "disk_cache_dir": cache.disk_cache_dir,
    }
    if cache.enable_memory_cache:
        settings["memory_max_entries"] = cache.memory_cache.maxsize
    if cache.enable_disk_cache:
        settings["disk_size_limit_bytes"] = cache.disk_cache.size_limit * len(cache.disk_cache._shards)
        allowed = getattr(cache.disk_cache.disk, "_allowed", None)
        if allowed is not None:
            settings |= {"restrict_pickle": True, "safe_types": [locate(".".join(names)) for names in allowed]}
    return settings
