import asyncio
import enum
import json
import logging
from pathlib import Path

import dspy
import pytest
from dspy.adapters.types.decision import Choice

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, record_decisions, replace_predictor
from dspy_router.decision_types import plain_value
from dspy_router.overrides import force_decisions
from dspy_router.split import RoutedPredict
from tests.conftest import bag_of_words
from tests.programs import FRUIT, fruit_of, fruit_requests, right_fruit
from tests.tutorial_programs import writes

SIGNATURE = "request -> fruit: Literal['apple', 'banana', 'cherry'], note: str, count: int"


class Counter(dspy.Module):
    """A clerk who also writes a note."""

    def __init__(self) -> None:
        super().__init__()
        self.clerk = dspy.Predict(SIGNATURE)

    def forward(self, request: str) -> dspy.Prediction:
        order = self.clerk(request=request)
        return dspy.Prediction(fruit=order.fruit, note=order.note)


def split_counter() -> Counter:
    return replace_predictor(Counter(), "clerk", keep_lm=True, encoder=bag_of_words)


WRITER = writes({"note": "wrapped", "count": "3", "fruit": "apple"})


def test_one_prediction_holds_the_decision_and_what_was_written_for_it(scripted_lm: object) -> None:
    server = scripted_lm(WRITER)
    clerk = split_counter().clerk
    with dspy.context(lm=server.lm, trace=[]), record_decisions() as decisions:
        prediction = clerk(request="a banana")
        trace = dspy.settings.trace
    assert list(prediction.keys())[:3] == ["fruit", "note", "count"]
    assert (prediction.fruit, prediction.note, prediction.count) == ("banana", "wrapped", 3)
    assert prediction.decisions["fruit"] == prediction.decision == decisions[0]
    assert prediction.confidence == prediction.probabilities["banana"]
    [(predictor, inputs, outputs)] = trace
    assert predictor is clerk.predict
    assert inputs == {"request": "a banana", "fruit": "banana"}
    assert set(outputs.keys()) == {"note", "count"}


def test_the_lm_is_told_the_decision_and_not_asked_for_it(scripted_lm: object) -> None:
    server = scripted_lm(WRITER)
    clerk = split_counter().clerk
    with dspy.context(lm=server.lm):
        clerk(request="a banana")
    [prompt] = server.requests
    assert "[[ ## fruit ## ]]\nbanana" in prompt
    assert "[[ ## fruit ## ]]" not in prompt.split("Respond with")[1]
    assert clerk.predict.signature.instructions.endswith("Already decided: `fruit`. Write the outputs to fit.")


def test_async_calls_give_the_same(scripted_lm: object) -> None:
    server = scripted_lm(WRITER)
    clerk = split_counter().clerk
    with dspy.context(lm=server.lm):
        waited = asyncio.run(clerk.acall(request="a banana"))
        called = clerk(request="a banana")
    evidence = ("decision", "decisions")
    assert {k: v for k, v in waited.items() if k not in evidence} == {
        k: v for k, v in called.items() if k not in evidence
    }


def test_call_settings_go_to_the_lm(scripted_lm: object) -> None:
    default, other = scripted_lm(WRITER), scripted_lm(writes({"note": "other", "count": "1"}))
    clerk = split_counter().clerk
    demos = [dspy.Example(request="an apple", fruit="apple", note="a demo", count=1)]
    config = {"temperature": 0.5, "n": 2}
    with dspy.context(lm=default.lm):
        prediction = clerk(request="a banana", lm=other.lm, demos=demos, config=config)
        assert prediction.note == "other"
        shorter = clerk(request="a banana", signature="request -> fruit: Literal['apple', 'banana', 'cherry'], note")
    assert default.lm.history[0]["kwargs"].get("temperature") is None
    assert other.lm.history[0]["kwargs"]["temperature"] == 0.5
    assert "a demo" in json.dumps(other.lm.history[0]["messages"])
    assert (shorter.fruit, shorter.note) == ("banana", "wrapped")
    assert "count" not in shorter


def test_every_completion_carries_the_decision(scripted_lm: object) -> None:
    server = scripted_lm(WRITER)
    clerk = split_counter().clerk

    class Twice(dspy.ChatAdapter):
        def __call__(self, *args: object, **inputs: object) -> list[dict[str, object]]:
            return super().__call__(*args, **inputs) * 2

    with dspy.context(lm=server.lm, adapter=Twice()):
        prediction = clerk(request="a banana")
    assert prediction.completions.fruit == ["banana", "banana"]
    assert dspy.majority(prediction.completions, field="note").fruit == "banana"


def test_positional_inputs_are_refused() -> None:
    with pytest.raises(RouteError, match=r"keyword inputs.*request=\.\.\."):
        split_counter().clerk("a banana")


def test_a_declared_output_takes_the_place_of_the_routes_evidence(scripted_lm: object) -> None:
    server = scripted_lm(writes({"decision": "mine", "probabilities": '["a"]'}))
    planner = dspy.Predict("text -> tool: Literal['search', 'mail'], decision: str, probabilities: list[str]")
    with dspy.context(lm=server.lm):
        prediction = replace_predictor(planner, "self", keep_lm=True, encoder=bag_of_words)(text="mail")
    assert (prediction.tool, prediction.decision, prediction.probabilities) == ("mail", "mine", ["a"])
    assert prediction.decisions["tool"].name == "mail"


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


@pytest.mark.parametrize(
    ("declared", "shown", "value"),
    [
        (Mood, "good", Mood.GOOD),
        (bool, "True", True),
        (Choice[("good", "a fine day"), ("bad", "rain")], "good", "good"),
    ],
)
def test_decisions_are_typed_as_declared_and_plain_to_the_lm(
    declared: type, shown: str, value: object, scripted_lm: object
) -> None:
    server = scripted_lm(writes({"note": "noted"}))
    fields = {
        "text": (str, dspy.InputField()), "mood": (declared, dspy.OutputField()), "note": (str, dspy.OutputField()),
    }  # fmt: skip
    routed = replace_predictor(dspy.Predict(dspy.Signature(fields)), "self", keep_lm=True, encoder=bag_of_words)
    with dspy.context(lm=server.lm), force_decisions({"mood": shown}):
        prediction = routed(text="a day")
    assert isinstance(prediction.mood, declared)
    assert plain_value(prediction.mood) == value
    assert f"[[ ## mood ## ]]\n{shown}\n" in server.requests[0]


def test_demos_config_and_lm_of_the_predictor_are_kept(scripted_lm: object, caplog: pytest.LogCaptureFixture) -> None:
    server = scripted_lm(WRITER)
    program = Counter()
    program.clerk.demos = [dspy.Example(request="an apple", fruit="apple", note="a demo", count=1)]
    program.clerk.lm = server.lm
    program.clerk.config = {"temperature": 0.25}
    with caplog.at_level(logging.INFO, logger="dspy_router"):
        routed = replace_predictor(program, "clerk", keep_lm=True, encoder=bag_of_words)
    assert "the 1 of the predictor at 'clerk' stay with the LM. They can teach it" in caplog.text
    routed(request="a banana")
    messages = json.dumps(routed.clerk.predict.lm.history[0]["messages"])
    assert "a demo" in messages
    assert r"[[ ## fruit ## ]]\napple" in messages
    assert routed.clerk.predict.lm.history[0]["kwargs"]["temperature"] == 0.25


def test_what_is_set_on_the_predictor_reaches_the_lm(scripted_lm: object) -> None:
    server = scripted_lm(WRITER)
    program = split_counter()
    program.clerk.lm = server.lm
    program.clerk.demos = [dspy.Example(request="an apple", fruit="apple", note="a demo", count=1)]
    assert program(request="a banana").note == "wrapped"
    assert "a demo" in json.dumps(server.lm.history[0]["messages"])
    assert [name for name, _ in program.named_predictors()] == ["clerk.predict"]


def test_saving_loading_and_copying(tmp_path: Path, scripted_lm: object) -> None:
    server = scripted_lm(WRITER)
    examples = fruit_requests(12, label=True)
    with dspy.context(lm=server.lm):
        trained = RouteFinetune().compile(split_counter(), trainset=examples)
        trained.clerk.predict.demos = [dspy.Example(request="a pie", fruit="apple", note="a demo", count=1)]
        trained.save(tmp_path / "counter.json")
        loaded = split_counter()
        loaded.load(tmp_path / "counter.json")
        for program in (loaded, trained.deepcopy()):
            assert program(request=examples[1].request).fruit == trained(request=examples[1].request).fruit == "banana"
            assert program.clerk.predict.demos[0]["note"] == "a demo"
            assert program.clerk.route.encoder is not None


def test_the_lm_is_set_and_found_as_ever() -> None:
    routed = split_counter()
    lm = dspy.LM("openai/none", api_key="none")
    routed.set_lm(lm)
    assert routed.get_lm() is lm
    assert routed.clerk.predict.lm is lm


def test_a_module_that_holds_a_route_is_never_marked_compiled(tmp_path: Path) -> None:
    routed = split_counter()
    routed.clerk._compiled = True
    assert {"clerk.predict", "clerk.route.learned"} <= set(routed.dump_state())


@pytest.mark.parametrize("teacher", [False, True])
def test_bootstrapping_gives_the_lms_part_demos_that_hold_the_decision(scripted_lm: object, teacher: bool) -> None:
    server = scripted_lm(WRITER)
    routed = split_counter()
    with dspy.context(lm=server.lm):
        optimizer = dspy.BootstrapFewShot(metric=lambda x, y, trace=None: True, max_labeled_demos=0)
        compiled = optimizer.compile(routed, trainset=fruit_requests(3), teacher=routed.deepcopy() if teacher else None)
        server.requests.clear()
        compiled(request="a banana")
    assert all(demo.fruit in FRUIT and demo.note == "wrapped" for demo in compiled.clerk.predict.demos)
    assert len(compiled.clerk.predict.demos) == 3


def test_mipro_tunes_the_lms_part_and_leaves_the_route(scripted_lm: object) -> None:
    server = scripted_lm(writes({"note": "wrapped", "count": "3", "proposed_instruction": "Write in rhyme."}))
    routed = split_counter()
    weights = routed.clerk.route.learned.dump_state()
    with dspy.context(lm=server.lm):
        optimizer = dspy.MIPROv2(
            metric=right_fruit, auto=None, num_candidates=2, max_bootstrapped_demos=1, max_labeled_demos=0,
            num_threads=1, verbose=False,
        )  # fmt: skip
        compiled = optimizer.compile(
            routed, trainset=fruit_requests(4), valset=fruit_requests(3), num_trials=4, minibatch=False
        )
    assert any("Write in rhyme." in call["messages"][0]["content"] for call in server.lm.history)
    assert [name for name, _ in compiled.named_predictors()] == ["clerk.predict"]
    assert compiled.clerk.route.learned.dump_state() == weights


def test_the_old_planner_teaches_the_route(scripted_lm: object) -> None:
    server = scripted_lm(lambda text: writes({"fruit": fruit_of(text), "note": "wrapped", "count": "1"})(text))
    examples = fruit_requests(24)
    with dspy.context(lm=server.lm):
        trained = RouteFinetune().compile(split_counter(), trainset=examples, teacher=Counter())
        assert all(trained(request=example.request).fruit == example.wanted for example in examples)


def test_a_predict_with_nothing_left_to_write_is_refused() -> None:
    planner = dspy.Predict("request -> fruit: bool")
    with pytest.raises(RouteError, match=r"every output, \['fruit'\].*Use the route alone"):
        RoutedPredict(DifferentiableRoute(planner.signature, encoder=bag_of_words), planner)
