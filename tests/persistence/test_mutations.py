"""Thousands of mutated state files: each loads to what was saved, or raises a documented error and changes nothing.

Every file is of a program that holds routes in all the ways a program can. The examples are the same in every run.
"""

import base64
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import orjson
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dspy_router import RouteError
from dspy_router.sealing import sealed
from tests.persistence.kiosk import REQUESTS, Kiosk, Stand, contents, learned, nested, parameters, routes

# Some mutations come twice; the files that differ are over 2,000.
MUTATIONS = {"bytes": 1_850, "values": 450, "values of version 1": 260, "tensors": 350}
FILES = {"bytes": 1_400, "values": 230, "values of version 1": 120, "tensors": 260}
# What DSPy raises of a file, before it has touched a route; see `RouteParameter.load_state`.
NEW_IN_2_AND_3 = ("release", "sha256", "training", "guard")
ERRORS_OF_DSPY = (orjson.JSONDecodeError, KeyError, TypeError, AttributeError)
NO_ROUTE_OR_NO_JSON = (RouteError, orjson.JSONDecodeError)
# What no load may do. Hooks cannot be removed, so this one looks only while it is asked to.
FORBIDDEN = {"compile", "exec", "pickle.find_class", "os.system", "subprocess.Popen", "socket.connect"}
watched: list[list[str]] = []
sys.addaudithook(lambda event, _: watched[-1].append(event) if watched and event in FORBIDDEN else None)


def mutants(kind: str) -> settings:
    return settings(
        max_examples=MUTATIONS[kind],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a failing file is shown as it is: making it smaller takes minutes
        suppress_health_check=list(HealthCheck),
    )


class Target:
    """A program, what its own file holds, and what the program holds before every load."""

    def __init__(self, make: Callable[[], dspy.Module], path: Path) -> None:
        self.path, self.make = path, make
        self.program = learned(make(), 2)
        saved = learned(make(), 1)
        saved.save(path)
        self.data, self.saved = path.read_bytes(), contents(saved)
        self.file = json.loads(self.data)
        self.names = list(parameters(saved))
        self.before = contents(self.program)
        self.tried: set[bytes] = set()
        self.loaded = 0

    def load(self, data: bytes, *, errors: Sequence[type[Exception]] = (RouteError,), exact: bool = True) -> None:
        """Load a file of these bytes; `exact`: only what was saved may load."""
        self.path.write_bytes(data)
        self.tried.add(data)
        try:
            with nothing_executed():
                self.program.load(self.path)
        except tuple(errors):
            assert contents(self.program) == self.before
            return
        self.loaded += 1
        if exact:
            assert contents(self.program) == self.saved
        for route in routes(self.program):
            for found in route(request=REQUESTS[0]).decisions.values():
                assert abs(sum(found.probabilities.values()) - 1) < 1e-6
        self.program = learned(self.make(), 2)


@contextmanager
def nothing_executed() -> Iterator[None]:
    watched.append([])
    try:
        yield
    finally:
        events = watched.pop()
    assert events == []


INSERTED = [b'"', b"\\", b"[" * 5_000, b'{"a":' * 2_000, b"1e999", b"0", b"\xff", b'"version": 1,', b"null,"]


def test_files_with_other_bytes(tmp_path: Path) -> None:
    target = Target(Stand, tmp_path / "stand.json")
    data = target.data
    # Most of a file is base64 of tensors: half the places are taken from the rest.
    marks = [place for line in lines_of(data) if len(line) < 200 for place in line]
    places = st.one_of(st.integers(0, len(data) - 1), st.sampled_from(marks))
    edits = st.one_of(
        st.tuples(st.just("flip"), places, st.integers(1, 255)),
        st.tuples(st.just("cut"), places, st.just(0)),
        st.tuples(st.just("remove"), places, st.integers(1, 400)),
        st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("insert"), places, st.sampled_from(INSERTED)),
        st.tuples(st.just("repeat"), places, st.integers(1, 3_000)),
        st.tuples(st.just("copy"), places, places),
    )  # fmt: skip

    @mutants("bytes")
    @given(st.lists(edits, min_size=1, max_size=3))
    def check(changes: list[tuple[str, int, Any]]) -> None:
        target.load(edited(data, changes), errors=(RouteError, *ERRORS_OF_DSPY))

    check()
    assert len(target.tried) >= FILES["bytes"]
    assert target.loaded < FILES["bytes"] / 10  # the mutations are no trifles


def lines_of(data: bytes) -> list[range]:
    """The places of every line: DSPy writes a value a line."""
    ends = [place for place, byte in enumerate(data) if byte == ord("\n")]
    return [range(start + 1, end) for start, end in zip([-1, *ends], ends, strict=False)]


def edited(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    out = bytearray(data)
    for kind, place, value in changes:
        place = min(place, max(0, len(out) - 1))
        if not out or kind == "cut":
            del out[place:]
        elif kind == "flip":
            out[place] ^= value
        elif kind == "remove":
            del out[place : place + value]
        elif kind == "insert":
            out[place:place] = value
        elif kind == "repeat":
            out[place:place] = out[place : place + value]
        else:
            out[place : place + 40] = out[value : value + 40]
    return bytes(out)


ODD: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 1.0, 2.0, 1e308, float("nan"),
    float("inf"), "", "x" * 100_000, "\ud800", "\x00", "é", "dspy_router.route", [], {}, [[]], [{}], {"name": "fruit"},
    [{"name": "fruit", "options": []}], nested(200), {"": {"": {}}},
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
        max_leaves=6,
    ),
)
CHANGES = st.sampled_from(["replace", "remove", "add", "extend", "wrap", "double", "take another's", "reorder"])


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [at, *(path for key in keys for path in paths(value[key], (*at, key)))]


def changed(state: Any, change: str, path: tuple[Any, ...], value: Any) -> Any:
    """The state with the value at `path` replaced, removed, extended, ..."""
    state = json.loads(json.dumps(state))
    if not path:
        return value if change == "replace" else [state] if change == "wrap" else state
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    if change == "replace":
        parent[key] = value
    elif change == "remove":
        del parent[key]
    elif change == "add" and isinstance(parent, dict):
        parent[value if isinstance(value, str) else "new"] = value
    elif change == "extend" and isinstance(old, str):
        parent[key] = old + str(value)[:50]
    elif change == "double" and isinstance(old, (str, list, int)):
        parent[key] = old * 2
    elif change == "take another's":
        parent[key] = json.loads(json.dumps(state["fields" if isinstance(value, list) else "encoder"]))
    elif change == "reorder" and isinstance(old, list):
        old.reverse()
    else:
        parent[key] = [old]
    return state


def without(state: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


def as_json(state: Any) -> bytes:
    """As another program might write it: numbers that are not finite and lone surrogates too."""
    return json.dumps(state).encode()


def test_files_with_other_values(tmp_path: Path) -> None:
    target = Target(Kiosk, tmp_path / "kiosk.json")

    @mutants("values")
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(target.names))
        found = target.file[name]
        for _ in range(data.draw(st.integers(1, 2))):
            path = data.draw(st.sampled_from(paths(found)))
            found = changed(found, data.draw(CHANGES), path, data.draw(VALUES))
            if not isinstance(found, dict) or not {"fields", "encoder"} <= set(found):
                break
        exact = True
        if data.draw(st.booleans()) and isinstance(found, dict):
            # Made on purpose, with a checksum of its own: it may load, but then every route decides.
            with suppress(RouteError):
                found, exact = sealed(without(found, "sha256")), False
        target.load(as_json({**target.file, name: found}), errors=NO_ROUTE_OR_NO_JSON, exact=exact)

    check()
    assert len(target.tried) >= FILES["values"]
    assert target.loaded < FILES["values"] / 2


def test_files_of_version_1_with_other_values(tmp_path: Path) -> None:
    """They have no checksum: what loads may differ from what was saved, but every route decides."""
    target = Target(Stand, tmp_path / "stand.json")
    file = {
        name: {**without(part, *NEW_IN_2_AND_3), "version": 1} if name in target.names else part
        for name, part in target.file.items()
    }
    target.load(as_json(file))
    assert target.loaded == 1

    @mutants("values of version 1")
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(target.names))
        path = data.draw(st.sampled_from(paths(file[name])))
        found = changed(file[name], data.draw(CHANGES), path, data.draw(VALUES))
        target.load(as_json({**file, name: found}), errors=NO_ROUTE_OR_NO_JSON, exact=False)

    check()
    assert len(target.tried) >= FILES["values of version 1"]


def test_files_whose_tensors_claim_anything(tmp_path: Path) -> None:
    target = Target(Kiosk, tmp_path / "kiosk.json")
    numbers = st.one_of(st.integers(-2, 70), st.sampled_from([-(2**63), 2**31, 2**32, 2**63 - 1, 2**64 - 1, 2**70]))
    shapes = st.lists(numbers, max_size=4)
    dtypes = st.sampled_from(["F32", "F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "X"])

    @mutants("tensors")
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(target.names))
        state = target.file[name]
        raw = base64.b64decode(state["tensors"])
        start = 8 + int.from_bytes(raw[:8], "little")
        header, body = json.loads(raw[8:start]), bytearray(raw[start:])
        entry = header[data.draw(st.sampled_from(list(header)))]
        change = data.draw(
            st.sampled_from(["shape", "dtype", "offsets", "rename", "numbers", "length", "size", "value"])
        )
        if change == "shape":
            entry["shape"] = data.draw(shapes)
        elif change == "dtype":
            entry["dtype"] = data.draw(dtypes)
        elif change == "offsets":
            entry["data_offsets"] = data.draw(shapes)
        elif change == "rename":
            header[data.draw(st.one_of(st.text(max_size=9), st.just("__metadata__")))] = entry
        elif change == "numbers":
            numbers_of = np.frombuffer(body, "<f4").copy()
            place = data.draw(st.integers(0, len(numbers_of) - 1))
            numbers_of[place] = data.draw(st.floats(width=32))
            body = bytearray(numbers_of.tobytes())
        elif change == "size":
            body = body[: data.draw(st.integers(0, len(body)))] + bytes(data.draw(st.integers(0, 5)))
        elif change == "value":
            entry[data.draw(st.sampled_from(["shape", "dtype", "data_offsets", "new"]))] = data.draw(
                st.one_of(st.none(), st.booleans(), st.text(max_size=5), st.floats(allow_nan=False), st.just([[[1]]]))
            )
        text = json.dumps(header).encode()
        length = data.draw(numbers) % 2**64 if change == "length" else len(text)
        tensors = base64.b64encode(length.to_bytes(8, "little") + text + body).decode()
        found = sealed({**without(state, "sha256"), "tensors": tensors})
        target.load(as_json({**target.file, name: found}), exact=False)

    check()
    assert len(target.tried) >= FILES["tensors"]
    assert 0 < target.loaded < FILES["tensors"] / 2  # another number loads
