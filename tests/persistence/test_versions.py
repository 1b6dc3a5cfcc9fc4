"""Files of every version, each written by the code of its time; those from version 3 on have a guard and a record."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

import dspy_router
from dspy_router import RouteError
from dspy_router.persistence import VERSION
from tests.persistence.kiosk import contents, learned
from tests.programs import fruit_requests, fruit_route

FILES = Path(__file__).parent


def saved(version: int) -> dict[str, Any]:
    return json.loads((FILES / f"version_{version}.json").read_text())["learned"]


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_a_file_of_every_version_loads_bit_for_bit(version: int) -> None:
    assert saved(version)["version"] == version
    route = fruit_route()
    route.load(FILES / f"version_{version}.json")
    tensors = load(base64.b64decode(saved(version)["tensors"]))
    assert {f"fruit/{name}": tensor.tolist() for name, tensor in route.head["fruit"].state_dict().items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert (route.learned.guard is not None, route.learned.record is not None) == (version > 2, version > 2)
    assert (route.promise is not None) == (version > 3)  # version 3 knew the promise's head by the bits of a product
    route.learned.guard = None
    requests = fruit_requests(12, seed=7)
    assert [route(request=example.request).fruit for example in requests] == [example.wanted for example in requests]


def test_a_route_is_saved_in_the_newest_version_whatever_it_was_loaded_from() -> None:
    route = fruit_route()
    route.load(FILES / "version_1.json")
    state = route.learned.dump_state()
    assert (state["version"], state["release"]) == (VERSION, dspy_router.__version__)
    again = fruit_route()
    again.load_state({"learned": state})
    assert contents(again) == contents(route)


@pytest.mark.parametrize(
    ("release", "said"), [("9.1.0", r"written by dspy-router 9\.1\.0"), (None, "written by a later dspy-router")]
)
def test_a_newer_version_says_which_release_reads_it(release: str | None, said: str) -> None:
    route = learned(fruit_route())
    before = contents(route)
    state = {**route.learned.dump_state(), "version": VERSION + 1, "release": release, "shape": "unheard of"}
    with pytest.raises(RouteError, match=f"format version {VERSION + 1} and was {said}.*reads versions 1 to {VERSION}"):
        route.load_state({"learned": state})
    assert contents(route) == before


def test_version_1_leaves_no_tensor_out() -> None:
    route = learned(fruit_route())
    state = {**saved(2), "version": 1}
    tensors = load(base64.b64decode(state["tensors"]))
    assert len(tensors) == 6
    del state["release"], state["sha256"]
    route.load_state({"learned": state})
    untrained = {**fruit_route().learned.dump_state(), "version": 1}
    for name in ("release", "training", "guard", "sha256"):
        del untrained[name]
    with pytest.raises(RouteError, match=r"\['fruit/bias', 'fruit/shared_map', 'fruit/weight'\] are missing"):
        route.load_state({"learned": untrained})
