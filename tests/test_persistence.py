import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, SentenceEncoder, TokenEncoder
from tests.conftest import bag_of_words
from tests.programs import FRUIT, Shop, fruit_requests, fruit_route, right_fruit

REQUESTS = [example.request for example in fruit_requests(12, seed=7)]


@pytest.fixture
def shop() -> dspy.Module:
    return RouteFinetune(right_fruit).compile(Shop(), trainset=fruit_requests(30))


def probabilities(shop: dspy.Module) -> list[dict[str, float]]:
    return [shop.clerk(request=request).probabilities for request in REQUESTS]


@pytest.mark.parametrize("name", ["shop.json", "shop.pkl"])
def test_state_files_give_identical_probabilities(shop: dspy.Module, tmp_path: Path, name: str) -> None:
    shop.save(tmp_path / name)
    fresh = Shop()
    assert probabilities(fresh) != probabilities(shop)
    fresh.load(tmp_path / name, allow_pickle=name.endswith("pkl"))
    assert probabilities(fresh) == probabilities(shop)


def test_a_whole_program_gives_identical_probabilities(shop: dspy.Module, tmp_path: Path) -> None:
    shop.save(tmp_path / "shop", save_program=True)
    assert probabilities(dspy.load(tmp_path / "shop", allow_pickle=True)) == probabilities(shop)


def test_a_new_process_decides_the_same_and_the_file_holds_no_encoder(
    sentence_encoder: SentenceEncoder, tmp_path: Path
) -> None:
    route = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=sentence_encoder)
    trained = RouteFinetune().compile(route, trainset=fruit_requests(30, label=True))
    trained.save(tmp_path / "route.json")
    trained.save(tmp_path / "program", save_program=True)
    code = f"""
import json, dspy
from dspy_router import DifferentiableRoute
route = DifferentiableRoute("request -> fruit", tools={FRUIT})
route.load({str(tmp_path / "route.json")!r})
whole = dspy.load({str(tmp_path / "program")!r}, allow_pickle=True)
print(json.dumps([[r(request=q).probabilities for q in {REQUESTS}] for r in (route, whole)]))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # Fresh encoders on both sides: one text at a time, as in the new process.
    own = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=SentenceEncoder())
    own.load_state(trained.dump_state())
    expected = [own(request=request).probabilities for request in REQUESTS]
    assert json.loads(output.splitlines()[-1]) == [expected, expected]
    # The head of three options: its vectors, weights and the shared map. The encoder alone is 90 MB.
    assert (tmp_path / "route.json").stat().st_size < 1_000_000
    assert (tmp_path / "program" / "program.pkl").stat().st_size < 1_000_000
    assert "pickle" not in (tmp_path / "route.json").read_text().replace("cloudpickle", "")


def test_a_token_encoder_is_saved_with_its_route(tmp_path: Path) -> None:
    def fresh() -> DifferentiableRoute:
        return DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=TokenEncoder(32))

    trained = RouteFinetune().compile(fresh(), trainset=fruit_requests(60, label=True))
    trained.save(tmp_path / "route.json")
    loaded = fresh()
    loaded.load(tmp_path / "route.json")
    assert [loaded(request=text).probabilities for text in REQUESTS] == [
        trained(request=text).probabilities for text in REQUESTS
    ]


def with_tensors(state: dict[str, Any], change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, Any]:
    tensors = load(base64.b64decode(state["tensors"]))
    change(tensors)
    return {**state, "tensors": base64.b64encode(save(tensors)).decode()}


def flipped(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "tensors": "!" + state["tensors"][1:]}


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "cut short": (lambda state: {**state, "tensors": state["tensors"][:400]}, "tensors are damaged"),
    "not base64": (flipped, "tensors are damaged"),
    "no tensors": (lambda state: {**state, "tensors": None}, "expected base64 text, found NoneType"),
    "no state": (lambda state: "state", "no state of a route"),
    "other format": (lambda state: {**state, "format": "other"}, "no state of a route"),
    "newer version": (lambda state: {**state, "version": 99}, "format version 99; this release reads 1"),
    "other options": (
        lambda state: {**state, "fields": [{"name": "fruit", "options": [{"name": "kiwi"}]}]},
        r"decides \{'fruit': \['kiwi'\]\}, this one \{'fruit': \['apple', 'banana', 'cherry'\]\}",
    ),
    "damaged fields": (lambda state: {**state, "fields": [3]}, "list of fields is damaged"),
    "other encoder": (
        lambda state: {**state, "encoder": {**state["encoder"], "name": "other", "weights": "abc"}},
        "saved with the encoder other .* but this program uses bag_of_words",
    ),
    "damaged encoder": (lambda state: {**state, "encoder": {"name": "x"}}, "fingerprint is damaged"),
    "not a number": (
        lambda state: with_tensors(state, lambda tensors: tensors["fruit/weight"].fill_(float("nan"))),
        "'fruit/weight' holds values that are not finite",
    ),
    "other shape": (
        lambda state: with_tensors(state, lambda tensors: tensors.update({"fruit/bias": torch.zeros(7)})),
        r"'bias': \(7,\)",
    ),
    "missing tensor": (
        lambda state: with_tensors(state, lambda tensors: tensors.pop("fruit/weight")),
        "field 'fruit' have shapes",
    ),
    "zero temperature": (
        lambda state: with_tensors(state, lambda tensors: tensors["fruit/temperature"].zero_()),
        "not positive",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_changes_nothing(damage: str) -> None:
    change, message = DAMAGES[damage]
    shop = Shop()
    state = shop.dump_state()
    before = probabilities(shop)
    state["clerk.learned"] = change(state["clerk.learned"])
    with pytest.raises(RouteError, match=message):
        shop.load_state(state)
    assert probabilities(shop) == before


def test_two_encoders_are_told_apart(tmp_path: Path) -> None:
    def other(texts: list[str]) -> np.ndarray:
        return bag_of_words(texts)[:, ::-1]

    fruit_route().save(tmp_path / "route.json")
    with pytest.raises(RouteError, match=r"saved with the encoder bag_of_words.*but this program uses .*other"):
        DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=other).load(tmp_path / "route.json")
