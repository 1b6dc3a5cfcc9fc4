"""A state that does not fit is refused with an error that says why, and changes nothing."""

import base64
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dspy_router import DifferentiableRoute, RouteError
from dspy_router.sealing import require_intact, sealed
from tests.conftest import bag_of_words
from tests.persistence.kiosk import Kiosk, contents, learned, nested, tensors_of
from tests.programs import FRUIT, Shop, fruit_route

State = dict[str, Any]


def resealed(state: State, **changes: Any) -> State:
    """What somebody who knows the format can make: other content, with its own checksum."""
    return sealed({**{name: value for name, value in state.items() if name != "sha256"}, **changes})


def with_tensors(state: State, change: Callable[[dict[str, torch.Tensor]], object]) -> State:
    tensors = tensors_of(state)
    change(tensors)
    return resealed(state, tensors=base64.b64encode(save(tensors)).decode())


def with_option(state: State, **option: Any) -> State:
    (field,) = state["fields"]
    return resealed(state, fields=[{**field, "options": [*field["options"][:-1], option]}])


def with_encoder(state: State, **changes: Any) -> State:
    return resealed(state, encoder={**state["encoder"], **changes})


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.path.write_text, ("executed",))


DAMAGES: dict[str, tuple[Callable[[State], Any], str]] = {
    "no object": (lambda state: "state", "no state of a route"),
    "other format": (lambda state: {**state, "format": "other"}, "no state of a route"),
    "format of another type": (lambda state: {**state, "format": [state]}, "no state of a route"),
    "version is a truth value": (lambda state: {**state, "version": True}, "format version is no count"),
    "version is a fraction": (lambda state: {**state, "version": 2.0}, "format version is no count"),
    "version is huge": (lambda state: {**state, "version": 10**5_000}, "format version is no count"),
    "version is zero": (lambda state: {**state, "version": 0}, "format version is no count"),
    "a digit of the tensors": (
        lambda state: {**state, "tensors": f"{state['tensors'][:-9]}{'BA'[state['tensors'][-9] == 'B']}AAAAAAA="},
        "damaged: its checksum is '[0-9a-f]{64}', its content has '[0-9a-f]{64}'",
    ),
    "no checksum": (lambda state: {k: v for k, v in state.items() if k != "sha256"}, r"\['sha256'\] are missing"),
    "checksum of another type": (lambda state: {**state, "sha256": [1]}, "its checksum is of type list"),
    "a stray entry": (lambda state: {**state, "note": 1}, "1 unknown entries"),
    "an older version with a checksum": (lambda state: {**state, "version": 1}, "4 unknown entries"),
    "not a number": (lambda state: {**state, "fields": float("nan")}, "Out of range float"),
    "nested too deeply": (lambda state: {**state, "fields": nested(100_000)}, "recursion"),
    "nested deeply": (lambda state: resealed(state, fields=nested(900)), "list of fields and options is damaged"),
    "fields are an object": (lambda state: resealed(state, fields={"name": "fruit"}), "list of fields and options"),
    "fields are a text": (lambda state: resealed(state, fields="fruit"), "list of fields and options is damaged"),
    "a field is a number": (lambda state: resealed(state, fields=[3]), "list of fields and options is damaged"),
    "options are a text": (
        lambda state: resealed(state, fields=[{"name": "fruit", "options": "apple"}]),
        "list of fields and options is damaged",
    ),
    "an option's name is a list": (lambda state: with_option(state, name=["cherry"]), "fields and options is damaged"),
    "an option without a name": (lambda state: with_option(state, text="cherry"), "fields and options is damaged"),
    "another option": (
        lambda state: with_option(state, name="kiwi"),
        "'fruit' among 3 options, this one among 3: option 3 was 'kiwi', here it is 'cherry'",
    ),
    "fewer options": (
        lambda state: resealed(state, fields=[{"name": "fruit", "options": state["fields"][0]["options"][:2]}]),
        "among 2 options, this one among 3: option 3 was nothing, here it is 'cherry'",
    ),
    "another field": (
        lambda state: resealed(state, fields=[{**state["fields"][0], "name": "pet"}]),
        r"decides the fields \['pet'\], this one \['fruit'\]",
    ),
    "the field twice": (
        lambda state: resealed(state, fields=state["fields"] * 2),
        r"decides the fields \['fruit', 'fruit'\], this one \['fruit'\]",
    ),
    "another encoder": (
        lambda state: with_encoder(state, name="other", weights="abc"),
        "saved with the encoder other .* but this program uses bag_of_words .* the encoder 'other'",
    ),
    "other weights of the encoder": (lambda state: with_encoder(state, weights="abc"), "weights behind the name"),
    "fingerprint is a list": (lambda state: resealed(state, encoder=[]), "fingerprint is damaged"),
    "fingerprint is short": (lambda state: resealed(state, encoder={"name": "x"}), "fingerprint is damaged"),
    "fingerprint is long": (lambda state: with_encoder(state, language="en"), "fingerprint is damaged"),
    "weights are a number": (lambda state: with_encoder(state, weights=1), "fingerprint is damaged"),
    "dimension is a fraction": (lambda state: with_encoder(state, dimension=64.0), "fingerprint is damaged"),
    "tensors are missing": (lambda state: resealed(state, tensors=None), "base64, found NoneType"),
    "tensors are empty": (lambda state: resealed(state, tensors=""), "tensors are damaged"),
    "tensors are no base64": (lambda state: resealed(state, tensors="é" + state["tensors"][1:]), "ASCII"),
    "tensors are cut short": (lambda state: resealed(state, tensors=state["tensors"][:400]), "tensors are damaged"),
    "tensors are long": (lambda state: resealed(state, tensors=state["tensors"] * 9), "expected at most [0-9]+ char"),
    "a tensor is not finite": (
        lambda state: with_tensors(state, lambda tensors: tensors["fruit/weight"].fill_(float("nan"))),
        "'fruit/weight' holds values that are not finite",
    ),
    "a tensor has another shape": (
        lambda state: with_tensors(state, lambda tensors: tensors.update({"fruit/bias": torch.zeros(7)})),
        r"'fruit/bias' is F32 of shape \(7,\); expected F32 of \(3,\)",
    ),
    "a tensor is transposed": (
        lambda state: with_tensors(
            state, lambda all_: all_.update({"fruit/weight": all_["fruit/weight"].T.contiguous()})
        ),
        r"'fruit/weight' is F32 of shape \(64, 3\); expected F32 of \(3, 64\)",
    ),
    "a tensor has another type": (
        lambda state: with_tensors(state, lambda all_: all_.update({"fruit/scale": all_["fruit/scale"].half()})),
        "'fruit/scale' is F16",
    ),
    "an unknown tensor": (
        lambda state: with_tensors(state, lambda tensors: tensors.update({"pet/bias": torch.zeros(3)})),
        "'pet/bias' is F32 of .*; expected only",
    ),
    "no temperature": (
        lambda state: with_tensors(state, lambda tensors: tensors.pop("fruit/temperature")),
        "its temperature 0 is not positive",
    ),
    "a temperature next to zero": (
        lambda state: with_tensors(state, lambda tensors: tensors["fruit/temperature"].fill_(1e-45)),
        "logits are not finite",
    ),
    "weights next to infinity": (
        lambda state: with_tensors(state, lambda tensors: tensors["fruit/weight"].fill_(3e38)),
        "logits are not finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: str) -> None:
    change, message = DAMAGES[damage]
    kiosk = learned(Kiosk())
    state = kiosk.dump_state()
    before = contents(kiosk)
    # The routes before it in the program are sound, and would change.
    state |= {name: part for name, part in learned(Kiosk(), 1).dump_state().items() if name.startswith("desks")}
    state["carts['east'].learned"] = change(state["carts['east'].learned"])
    with pytest.raises(RouteError, match=message):
        kiosk.load_state(state)
    assert contents(kiosk) == before


def test_two_encoders_are_told_apart(tmp_path: Path) -> None:
    def other(texts: list[str]) -> np.ndarray:
        return bag_of_words(texts)[:, ::-1]

    fruit_route().save(tmp_path / "route.json")
    with pytest.raises(RouteError, match=r"saved with the encoder bag_of_words.*but this program uses .*other"):
        DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=other).load(tmp_path / "route.json")


def test_a_pickle_in_the_place_of_tensors_is_not_executed(tmp_path: Path) -> None:
    route = fruit_route()
    payload = base64.b64encode(pickle.dumps(Payload(tmp_path / "mark"))).decode()
    with pytest.raises(RouteError, match="tensors are damaged"):
        route.load_state({"learned": resealed(route.learned.dump_state(), tensors=payload)})
    assert not (tmp_path / "mark").exists()
    pickle.loads(base64.b64decode(payload))
    assert (tmp_path / "mark").read_text() == "executed"


def claiming(**entry: Any) -> str:
    """Tensors of a few bytes whose header claims anything."""
    header = json.dumps({"fruit/weight": {"dtype": "F32", "shape": [3, 64], "data_offsets": [0, 768], **entry}})
    return base64.b64encode(len(header).to_bytes(8, "little") + header.encode() + bytes(768)).decode()


CLAIMS = {
    "a huge shape": claiming(shape=[1 << 40, 1 << 20]),
    "a shape that overflows": claiming(shape=[1 << 63, 2]),
    "an empty shape with a huge dimension": claiming(shape=[0, 1 << 62], data_offsets=[0, 0]),
    "a negative shape": claiming(shape=[-3, -64]),
    "offsets behind the end": claiming(data_offsets=[0, 1 << 50]),
    "offsets in reverse": claiming(data_offsets=[768, 0]),
    "a huge header": base64.b64encode((1 << 60).to_bytes(8, "little") + b"{}").decode(),
    "a deep header": base64.b64encode((10_000).to_bytes(8, "little") + b"[" * 10_000).decode(),
    "a long text": "A" * 50_000_000,
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_state_claims_costs_no_memory(claim: str) -> None:
    """The bound: three times the state's length for the checksum, ten times the route's own tensors."""
    route = fruit_route()
    own = sum(tensor.nbytes for tensor in route.head.state_dict().values())
    state = {"learned": resealed(route.learned.dump_state(), tensors=CLAIMS[claim])}
    tracemalloc.start()
    try:
        with pytest.raises(RouteError, match=r"tensors are damaged|saved tensor 'fruit/weight' is"):
            route.load_state(state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(CLAIMS[claim]) + 10 * own + 200_000  # the last for the copy that DSPy tries, and the error


def test_a_sound_state_keeps_to_the_bound() -> None:
    route = DifferentiableRoute("request -> fruit", tools=[f"tool {n}" for n in range(2_000)], encoder=bag_of_words)
    state = {"learned": learned(route).learned.dump_state()}
    length = len(json.dumps(state))
    own = sum(tensor.nbytes for tensor in route.head.state_dict().values())
    tracemalloc.start()
    route.load_state(state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert own < peak < 3 * length + 10 * own


@pytest.mark.parametrize("value", [float("inf"), "\udfff", nested(100_000), {1: 2, "1": 3}, {1, 2}])
def test_a_seal_refuses_what_json_cannot_say(value: Any) -> None:
    with pytest.raises(RouteError, match="cannot be saved as JSON"):
        sealed({"value": value})
    with pytest.raises(RouteError, match="damaged"):
        require_intact({"value": value, "sha256": "0" * 64})


def test_a_seal_survives_json_and_tells_every_value_apart() -> None:
    values: list[Any] = [0, 0.0, -0.0, False, None, "", "0", [], {}, [0], 1, 1.0, True, 1e300, "é", "e"]
    states = [sealed({"value": value, "name": "x"}) for value in values]
    assert len({state["sha256"] for state in states}) == len(values)
    for state in states:
        require_intact(json.loads(json.dumps(dict(reversed(state.items())))))
        for other in states:
            if other is not state:
                with pytest.raises(RouteError, match="damaged"):
                    require_intact({**state, "value": other["value"]})


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"metadata": {}}', '{"self": 1}', "null", '"a"'])
def test_a_file_that_is_no_saved_route_is_one_error_for_a_bare_route(text: str, tmp_path: Path) -> None:
    route = learned(fruit_route())
    before = contents(route)
    (tmp_path / "route.json").write_text(text)
    with pytest.raises(RouteError, match="not the file of a saved route"):
        route.load(tmp_path / "route.json")
    assert contents(route) == before


def test_the_file_of_a_program_is_told_from_that_of_a_route(tmp_path: Path) -> None:
    Shop().save(tmp_path / "shop.json")
    route = learned(fruit_route())
    before = contents(route)
    with pytest.raises(RouteError, match=r"holds no route: .* only \['clerk\.learned', 'metadata'\].*by that program"):
        route.load(tmp_path / "shop.json")
    assert contents(route) == before
