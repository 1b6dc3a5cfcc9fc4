"""What was saved comes back bit for bit, in every form DSPy saves a program."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
import torch

from dspy_router import DifferentiableRoute, RouteError, SentenceEncoder, TokenEncoder
from dspy_router.encoders.sentence import DEFAULT_MODEL, offline_folder
from tests.conftest import bag_of_words
from tests.persistence.kiosk import REQUESTS, Kiosk, contents, learned, probabilities, routes, tensors_of
from tests.programs import FRUIT, Shop, fruit_route


@pytest.mark.parametrize("name", ["kiosk.json", "kiosk.pkl"])
def test_a_state_file_brings_back_every_route(tmp_path: Path, name: str) -> None:
    saved, fresh = learned(Kiosk()), Kiosk()
    saved.save(tmp_path / name)
    assert contents(fresh) != contents(saved)
    fresh.load(tmp_path / name, allow_pickle=True)
    assert contents(fresh) == contents(saved)
    assert [probabilities(route) for route in routes(fresh)] == [probabilities(route) for route in routes(saved)]
    assert fresh.desks[0].encoder is fresh.desks[1].encoder
    fresh.load(tmp_path / name, allow_pickle=True)
    assert contents(fresh) == contents(saved)


def test_a_whole_program_brings_back_every_route(tmp_path: Path) -> None:
    saved = learned(Kiosk())
    saved.save(tmp_path / "kiosk", save_program=True)
    loaded = dspy.load(tmp_path / "kiosk", allow_pickle=True)
    assert contents(loaded) == contents(saved)
    assert [probabilities(route) for route in routes(loaded)] == [probabilities(route) for route in routes(saved)]
    assert loaded.desks[0].encoder is loaded.desks[1].encoder


@pytest.mark.parametrize("name", ["route.json", "route.pkl"])
def test_a_bare_route_comes_back(tmp_path: Path, name: str) -> None:
    saved, fresh = learned(fruit_route()), fruit_route()
    saved.save(tmp_path / name)
    fresh.load(tmp_path / name, allow_pickle=True)
    assert contents(fresh) == contents(saved)


def test_a_route_that_is_marked_compiled_is_saved_with_its_parent(tmp_path: Path) -> None:
    saved, fresh = learned(Shop()), Shop()
    saved.clerk._compiled = True
    saved.save(tmp_path / "shop.json")
    fresh.load(tmp_path / "shop.json")
    assert contents(fresh) == contents(saved)


def test_a_module_that_is_marked_compiled_is_left_out_by_dspy_and_missed_at_load(tmp_path: Path) -> None:
    saved, fresh = learned(Kiosk()), Kiosk()
    saved.shop._compiled = True
    saved.save(tmp_path / "kiosk.json")
    before = contents(fresh)
    with pytest.raises(KeyError, match=r"shop\.clerk\.learned"):
        fresh.load(tmp_path / "kiosk.json")
    assert contents(fresh) == before
    saved.save(tmp_path / "kiosk", save_program=True)
    whole = dspy.load(tmp_path / "kiosk", allow_pickle=True)
    assert contents(whole.shop) == contents(saved.shop)
    saved.shop._compiled = False
    saved.save(tmp_path / "kiosk.json")
    fresh.load(tmp_path / "kiosk.json")
    assert contents(fresh) == contents(saved)


def test_an_untrained_head_takes_little_room_and_comes_back(tmp_path: Path) -> None:
    route = fruit_route()
    with torch.no_grad():
        route.head["fruit"].bias[1] = -0.0
    route.save(tmp_path / "route.json")
    state = json.loads((tmp_path / "route.json").read_text())["learned"]
    # Neither the weights nor the map, which are all zero; a negative zero is a value.
    assert set(tensors_of(state)) == {f"fruit/{name}" for name in ("option_vectors", "scale", "temperature", "bias")}
    fresh = learned(fruit_route())
    fresh.load(tmp_path / "route.json")
    assert contents(fresh) == contents(route)


def test_tensors_that_share_memory_can_be_saved() -> None:
    shop = learned(Kiosk()).shop
    head = shop.clerk.head
    head["size"].shared_map = head["fruit"].shared_map
    fresh = Kiosk().shop
    fresh.load_state(shop.dump_state())
    assert contents(fresh) == contents(shop)


@pytest.mark.parametrize("names", [("encoder", "encoders"), ("encoder.layer", "a/b"), ("a", "a/b"), ("a\nb", "ü")])
def test_fields_of_any_name_are_told_apart(names: tuple[str, str]) -> None:
    fields = {name: (bool, dspy.OutputField()) for name in names}
    signature = dspy.Signature({"text": (str, dspy.InputField()), **fields})
    saved, fresh = (DifferentiableRoute(signature, encoder=TokenEncoder(8, vocabulary=32)) for _ in range(2))
    fresh.load_state(learned(saved).dump_state())
    assert contents(fresh) == contents(saved)


def test_options_of_any_name_come_back(tmp_path: Path) -> None:
    tools = ["two\nlines", "ünïcode 🍒", "nul\x00", "quote\"'\\", "x" * 5_000]
    saved, fresh = (DifferentiableRoute("request -> tool", tools=tools, encoder=bag_of_words) for _ in range(2))
    learned(saved).save(tmp_path / "route.json")
    fresh.load(tmp_path / "route.json")
    assert contents(fresh) == contents(saved)


def test_what_could_not_be_loaded_again_is_not_saved_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "route.json"
    path.write_text("the old file")

    def lengths(texts: list[str]) -> list[list[float]]:
        return [[len(text), 1.0] for text in texts]

    route = DifferentiableRoute("request -> tool", tools=["lone \ud800", "other"], encoder=lengths)
    with pytest.raises(RouteError, match=r"cannot be saved as JSON.*surrogates"):
        route.save(path)
    broken = fruit_route()
    with torch.no_grad():
        broken.head["fruit"].bias[0] = float("nan")
    with pytest.raises(RouteError, match=r"'fruit/bias' is float32 and not finite"):
        broken.save(path)
    double = fruit_route()
    double.head.double()
    with pytest.raises(RouteError, match=r"is float64 and finite"):
        double.save(path)
    assert path.read_text() == "the old file"


def test_routes_that_share_an_encoder_refuse_weights_that_were_saved_apart() -> None:
    class Desks(dspy.Module):
        def __init__(self, *encoders: TokenEncoder) -> None:
            super().__init__()
            self.desks = [DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=each) for each in encoders]

    def encoder() -> TokenEncoder:
        return TokenEncoder(8, vocabulary=32)

    shared = encoder()
    together, apart = Desks(shared, shared), Desks(encoder(), encoder())
    before, state = contents(together), learned(apart).dump_state()
    with pytest.raises(RouteError, match="shared by routes that were saved with different weights"):
        together.load_state(state)
    assert contents(together) == before
    # Weights that were saved together serve both kinds, again and again.
    for seed in (1, 2):
        state = learned(Desks(shared, shared), seed).dump_state()
        for program in (together, apart):
            program.load_state(state)
            assert program.dump_state() == state
    # A route that is gone is in nobody's way.
    alone = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=(own := encoder()))
    alone.load_state(learned(Desks(encoder()), 3).desks[0].dump_state())
    alone = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=own)
    alone.load_state(learned(Desks(encoder()), 4).desks[0].dump_state())


@pytest.fixture(scope="module")
def elsewhere(sentence_encoder: SentenceEncoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a new process makes of files whose encoder it has, and of files whose encoder is gone there."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "model").symlink_to(offline_folder(DEFAULT_MODEL), target_is_directory=True)
    route = learned(DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=sentence_encoder))
    orphan = learned(DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=SentenceEncoder(f"{folder}/model")))
    for name, saved in (("route", route), ("orphan", orphan)):
        for ending in ("json", "pkl"):
            saved.save(folder / f"{name}.{ending}")
        saved.save(folder / name, save_program=True)
    (folder / "model").unlink()
    code = f"""
import json, dspy
from dspy_router import DifferentiableRoute, RouteError
def fresh(encoder=None): return DifferentiableRoute("request -> fruit", tools={FRUIT}, encoder=encoder)
def other(texts): return [[len(text), 1.0] for text in texts]
folder, loaded, messages = {str(folder)!r}, [fresh(), fresh()], []
loaded[0].load(f"{{folder}}/route.json")
loaded[1].load(f"{{folder}}/route.pkl", allow_pickle=True)
loaded.append(dspy.load(f"{{folder}}/route", allow_pickle=True))
for encoder in (f"{{folder}}/model", f"{{folder}}/another", other):
    for ending in ("json", "pkl"):
        route = fresh(encoder)
        try: route.load(f"{{folder}}/orphan.{{ending}}", allow_pickle=True)
        except RouteError as error: messages.append(str(error))
        assert not route.learned.is_built
try: dspy.load(f"{{folder}}/orphan", allow_pickle=True)
except RouteError as error: messages.append(str(error))
decisions = [[route(request=request).probabilities for request in {REQUESTS}] for route in loaded]
print(json.dumps(dict(decisions=decisions, messages=messages)))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return {"folder": folder, "route": route, **json.loads(output.stdout.splitlines()[-1])}


def test_a_new_process_decides_the_same_and_the_files_hold_no_encoder(elsewhere: dict[str, Any]) -> None:
    # A fresh encoder here too: one text at a time, as in the new process.
    own = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=SentenceEncoder())
    own.load_state(elsewhere["route"].dump_state())
    expected = [own(request=request).probabilities for request in REQUESTS]
    assert elsewhere["decisions"] == [expected] * 3
    # The head of three options: its vectors, weights and the shared map. The encoder alone is 90 MB.
    for path in ("route.json", "route.pkl", "route/program.pkl"):
        assert (elsewhere["folder"] / path).stat().st_size < 1_000_000


def test_a_new_process_without_the_encoder_loads_nothing_and_names_both(elsewhere: dict[str, Any]) -> None:
    folder, messages = elsewhere["folder"], elsewhere["messages"]
    assert len(messages) == 7
    gone, another, other = [*messages[:2], messages[6]], messages[2:4], messages[4:6]
    for message in messages:
        assert message.startswith(f"The route was saved with the encoder {folder}/model (dimension 384")
    for message in gone:
        assert f"encoder, SentenceEncoder('{folder}/model'), cannot be loaded" in message
        assert "Make the model available" in message
    for message in another:
        assert f"encoder, SentenceEncoder('{folder}/another'), cannot be loaded" in message
    for message in other:
        assert "this program uses other (dimension 2" in message
        assert f"Build the route with the encoder '{folder}/model'" in message


def test_a_whole_program_refuses_an_encoder_whose_weights_have_changed(tmp_path: Path) -> None:
    np.save(tmp_path / "weights.npy", np.eye(64, dtype=np.float32))

    def projected(texts: list[str]) -> np.ndarray:
        return bag_of_words(texts) @ np.load(tmp_path / "weights.npy")

    route = learned(DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=projected))
    route.save(tmp_path / "program", save_program=True)
    assert contents(dspy.load(tmp_path / "program", allow_pickle=True)) == contents(route)
    np.save(tmp_path / "weights.npy", np.eye(64, dtype=np.float32)[::-1])
    with pytest.raises(RouteError, match="The weights behind the name have changed"):
        dspy.load(tmp_path / "program", allow_pickle=True)
