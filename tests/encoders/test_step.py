import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspy_router import DifferentiableRoute, OnnxEncoder, RoutedAgent, RouteError, SentenceEncoder, TokenEncoder
from dspy_router.agent.state import StepState
from dspy_router.encoders.function import FunctionEncoder
from dspy_router.encoders.step import WEIGHTS, StepEncoder
from tests.conftest import DIMENSION, bag_of_words

TOOLS = ("map", "search", "calculator")
STATE = StepState("", "12 km", ("map", "map", "weather", "search"), True, ("Hello", "How far?", "search far"))


class Counting:
    """A base that keeps the texts it was asked for."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.batches.append(sorted(texts))
        return bag_of_words(texts)


def blocks(encoder: StepEncoder, state: StepState | str) -> dict[str, np.ndarray]:
    """The blocks of a vector by name; the messages in one array [turns, d]."""
    vector = encoder.encode([state if isinstance(state, str) else state.to_text()])[0]
    ends = np.cumsum([DIMENSION, DIMENSION, encoder.turns * DIMENSION, 3, 4, 1])
    found = dict(zip(WEIGHTS, np.split(vector, ends), strict=True))
    found["messages"] = found["messages"].reshape(encoder.turns, DIMENSION)
    return found


def direction(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values)


def test_each_block_holds_its_part() -> None:
    encoder = StepEncoder(bag_of_words, TOOLS, turns=2)
    found = blocks(encoder, STATE)
    base = encoder.base
    assert not found["request"].any()
    np.testing.assert_allclose(direction(found["observation"]), base.encode_one("12 km"), atol=1e-6)
    np.testing.assert_allclose(direction(found["messages"][0]), base.encode_one("search far"), atol=1e-6)
    np.testing.assert_allclose(direction(found["messages"][1]), base.encode_one("How far?"), atol=1e-6)
    length = np.linalg.norm(found["observation"]) / WEIGHTS["observation"]  # of a block of weight 1
    np.testing.assert_allclose(found["calls"] / length, WEIGHTS["calls"] * np.log1p([2, 1, 0]), rtol=1e-5)
    np.testing.assert_allclose(found["last"] / length, [0, WEIGHTS["last"], 0, 0], rtol=1e-5)
    np.testing.assert_allclose(found["step"] / length, WEIGHTS["step"] * np.log1p([4]) / 3, rtol=1e-5)
    np.testing.assert_allclose(found["failed"] / length, [WEIGHTS["failed"]], rtol=1e-5)


def test_vectors_have_length_one_and_the_length_that_is_told() -> None:
    encoder = StepEncoder(bag_of_words, TOOLS, turns=3)
    vectors = encoder.encode([STATE.to_text(), StepState("").to_text(), "map: Where things are."])
    assert vectors.shape == (3, encoder.dimension) == (3, 5 * DIMENSION + 9)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_a_text_that_is_no_state_is_a_request_alone() -> None:
    encoder = StepEncoder(bag_of_words, TOOLS, turns=1, without=("request",))
    found = blocks(encoder, "map: Where things are.")
    np.testing.assert_allclose(found.pop("request"), encoder.base.encode_one("map: Where things are."), atol=1e-6)
    assert not any(block.any() for block in found.values())


def test_a_step_that_follows_no_call_is_told_from_others() -> None:
    encoder = StepEncoder(bag_of_words, TOOLS)
    for state in (StepState("How far?"), StepState("Thanks!", "", ("map",), messages=("How far?", "12 km"))):
        assert blocks(encoder, state)["last"].argmax() == 3
    assert blocks(encoder, StepState("How far?", "", ("map",)))["last"].argmax() == 0
    assert not blocks(encoder, StepState("How far?", "", ("weather",)))["last"].any()


@pytest.mark.parametrize("block", WEIGHTS)
def test_a_block_that_is_left_out_is_zero_and_the_others_keep_their_proportions(block: str) -> None:
    state = StepState("How far?", "12 km", ("map",), True, ("Hello",))
    whole = blocks(StepEncoder(bag_of_words, TOOLS, turns=1), state)
    found = blocks(StepEncoder(bag_of_words, TOOLS, turns=1, without=(block,)), state)
    assert whole.pop(block).any()
    assert not found.pop(block).any()
    np.testing.assert_allclose(
        direction(np.concatenate([part.ravel() for part in found.values()])),
        direction(np.concatenate([part.ravel() for part in whole.values()])),
        atol=1e-6,
    )


def test_at_each_step_only_what_is_new_is_encoded() -> None:
    base = Counting()
    encoder = StepEncoder(base, TOOLS, turns=2)
    encoder.encode(["map", "search"])
    first = StepState("How far is Ostrel?")
    second = StepState("", "12 km", ("map",), messages=("How far is Ostrel?", "map Ostrel"))
    third = StepState("Thanks!", "", ("map",), messages=(*second.messages, "12 km", "It is 12 km."))
    base.batches.clear()
    for state in (first, second, second, third):
        encoder.encode_one(state.to_text())
    assert base.batches == [["How far is Ostrel?"], ["12 km", "map Ostrel"], ["It is 12 km.", "Thanks!"]]


def test_what_is_left_out_is_not_encoded() -> None:
    base = Counting()
    encoder = StepEncoder(base, TOOLS, turns=2, without=("request", "messages"), weights={"observation": 0.0})
    assert encoder.dimension == 4 * DIMENSION + 9
    base.batches.clear()
    encoder.encode([STATE.to_text(), StepState("How far?").to_text()])
    assert base.batches == []


def test_states_are_encoded_in_one_batch() -> None:
    base = Counting()
    encoder = StepEncoder(base, TOOLS, turns=1)
    assert encoder.dimension == 3 * DIMENSION + 9
    base.batches.clear()
    encoder.encode([StepState("a", "b").to_text(), StepState("", "c", messages=("d",)).to_text(), "e"])
    assert base.batches == [["a", "b", "c", "d", "e"]]


def test_the_fingerprint_covers_base_and_layout() -> None:
    def other(texts: list[str]) -> np.ndarray:
        return -bag_of_words(texts)

    encoders = [
        StepEncoder(bag_of_words, TOOLS),
        StepEncoder(other, TOOLS),
        StepEncoder(bag_of_words, TOOLS[::-1]),
        StepEncoder(bag_of_words, TOOLS, turns=1),
        StepEncoder(bag_of_words, TOOLS, without=("calls",)),
        StepEncoder(bag_of_words, TOOLS, weights={"calls": 2.0}),
    ]
    assert len({encoder.fingerprint.weights for encoder in encoders}) == len(encoders)
    assert StepEncoder(FunctionEncoder(bag_of_words), iter(TOOLS)).fingerprint == encoders[0].fingerprint


def test_pickling_keeps_the_settings_and_deepcopy_the_object() -> None:
    encoder = StepEncoder(bag_of_words, TOOLS, turns=1, without=("calls",), weights={"last": 2.0})
    copied = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(copied.encode([STATE.to_text()]), encoder.encode([STATE.to_text()]))
    assert copied.fingerprint == encoder.fingerprint
    assert copy.deepcopy(encoder) is encoder


def test_a_saved_route_asks_for_the_same_layout(tmp_path: Path) -> None:
    def route(**settings: Any) -> DifferentiableRoute:
        return DifferentiableRoute("state -> next", tools=TOOLS, encoder=StepEncoder(bag_of_words, TOOLS, **settings))

    route(turns=1).save(tmp_path / "route.json")
    route(turns=1).load(tmp_path / "route.json")
    for other in ({"turns": 2}, {"turns": 1, "without": ("calls",)}):
        with pytest.raises(RouteError, match="was saved with the encoder steps read by bag_of_words"):
            route(**other).load(tmp_path / "route.json")


def test_an_untrained_route_decides_by_descriptions() -> None:
    tools = {"map": "how far and where", "search": "who wrote and when", "calculator": "sums and products"}
    route = DifferentiableRoute("state -> next", tools=tools, encoder=StepEncoder(bag_of_words, tools))
    assert route(state=StepState("how far and when").to_text()).next == "map"
    assert route(state=StepState("sums please", "12 km", ("map",)).to_text()).next == "calculator"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": TokenEncoder(16)}, "is trained with its route"),
        ({"tools": ["map", "map"]}, "names one twice"),
        ({"turns": -1}, "turns=-1 is negative"),
        ({"without": ["recall"]}, r"no block \['recall'\]; the blocks are \['request'"),
        ({"weights": {"recall": 1.0}}, "no block"),
        ({"weights": {"calls": -1.0}}, r"weights=\{'calls': -1.0\}"),
        ({"weights": {"calls": float("nan")}}, "expected finite numbers"),
    ],
)
def test_unusable_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        StepEncoder(**({"base": bag_of_words, "tools": TOOLS} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("saving", ["SentenceEncoder", "OnnxEncoder", "int8"])
def test_an_agents_head_serves_on_another_form_of_the_base(saving: str, tmp_path: Path) -> None:
    forms = {"SentenceEncoder": SentenceEncoder(), "OnnxEncoder": OnnxEncoder(), "int8": OnnxEncoder(arithmetic="int8")}
    agent = {name: RoutedAgent("question -> answer", tools=[len], encoder=form) for name, form in forms.items()}
    agent[saving].save(tmp_path / "agent.json")
    for name in forms:
        agent[name].load(tmp_path / "agent.json")
    other = RoutedAgent("question -> answer", tools=[len], encoder=bag_of_words)
    with pytest.raises(RouteError, match="but this program uses"):
        other.load(tmp_path / "agent.json")
    fewer = StepEncoder(forms[saving], TOOLS, without=["failed"])
    assert not fewer.serves(StepEncoder(forms["OnnxEncoder"], TOOLS).fingerprint)
    assert fewer.serves(StepEncoder(forms["OnnxEncoder"], TOOLS, without=["failed"]).fingerprint)
