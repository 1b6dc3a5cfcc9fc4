"""`DecisionClient`, case by case against DSPy's own decision client, which gets the same answers over HTTP."""

import asyncio
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import dspy
import pytest
from dspy.adapters.decision import record_evidence
from dspy.adapters.types.decision import Choice, Noul, Score
from dspy.teleprompt.reanchor.reanchor import ReAnchor
from dspy.utils.callback import BaseCallback
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dspy_router import DecisionClient, DifferentiableRoute, RouteError, RouteFinetune, TokenEncoder, record_decisions
from dspy_router.overrides import explore_decisions, force_decisions
from dspy_router.sealing import sealed
from tests.conftest import bag_of_words
from tests.decision_service import DecisionService
from tests.programs import fruit_requests, right_fruit

Team = Choice[("billing", "A payment issue"), ("technical", "A product bug"), ("other", None)]
Blocked = Noul[(True, "cannot work"), (False, "can still work")]
Grade = Score["poor work", "fair work", "excellent work"]


class Everything(dspy.Signature):
    """Look at a message."""

    text: str = dspy.InputField()
    hints: list[str] = dspy.InputField()
    kind: Literal["fig", "date"] = dspy.OutputField(desc="the fruit")
    number: Literal[1, 2, None] = dspy.OutputField(desc="how many")
    urgent: bool = dspy.OutputField(desc="must be answered today")
    maybe: Noul = dspy.OutputField(desc="asks for money")
    blocked: Blocked = dspy.OutputField(desc="blocked")
    native: Annotated[bool, Blocked] = dspy.OutputField(desc="blocked, natively")
    team: Team = dspy.OutputField(desc="the team")
    route: Annotated[Literal["in", "out"], Choice[("in", "comes in"), ("out", "goes out")]] = dspy.OutputField(
        desc="way"
    )
    grade: Grade = dspy.OutputField(desc="the work")


class Pick(dspy.Signature):
    """Serve a request."""

    request: str = dspy.InputField()
    fruit: Literal["apple", "banana", "cherry"] = dspy.OutputField(desc="the fruit to serve")


MESSAGES = [
    {"text": "a fig and a payment issue that must be answered today", "hints": ["fair", "work"]},
    {"text": "cannot work: a product bug, poor work", "hints": []},
    {"hints": ["date", "goes out"], "text": "excellent work, asks for money"},
]


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    before = dspy.cache
    dspy.configure_cache(enable_disk_cache=False)
    yield
    dspy.cache = before


@pytest.fixture
def service() -> Iterator[Callable[..., DecisionService]]:
    started: list[DecisionService] = []

    def start(client: DecisionClient) -> DecisionService:
        started.append(DecisionService(client))
        return started[-1]

    yield start
    for each in started:
        each.close()


def local(**settings: Any) -> DecisionClient:
    return DecisionClient(encoder=bag_of_words, **settings)


def outputs(prediction: dspy.Prediction) -> dict[str, str]:
    """Values with their types: 1 is not True."""
    return {name: repr(value) for name, value in prediction.items()}


class Program(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clerk = dspy.Predict(Pick)

    def forward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(fruit=self.clerk(request=request).fruit)


def score(program: dspy.Module, examples: list[dspy.Example]) -> float:
    return sum(right_fruit(example, program(**example.inputs())) for example in examples) / len(examples)


# The contract, case by case


@pytest.mark.parametrize("message", MESSAGES, ids=["first", "second", "third"])
def test_every_decision_type_comes_back_as_from_dspys_own_client(
    message: dict[str, Any], service: Callable[..., DecisionService]
) -> None:
    predictor = dspy.Predict(Everything)
    theirs = service(local()).client()
    with record_evidence() as expected_evidence:
        expected = predictor(lm=theirs, **message)
    with record_evidence() as evidence:
        found = predictor(lm=local(), **message)
    assert outputs(found) == outputs(expected)
    assert [(caller, name) for caller, name, _ in evidence] == [(caller, name) for caller, name, _ in expected_evidence]
    assert [answer for *_, answer in evidence] == [answer for *_, answer in expected_evidence]
    assert outputs(asyncio.run(predictor.acall(lm=local(), **message))) == outputs(expected)


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("urgent", {"threshold": 1.0}), ("urgent", {"threshold": 0.0}), ("maybe", {"threshold": 0.9}),
        ("team", {"weights": {"billing": 0.01, "technical": 0.01}}), ("kind", {"weights": {"fig": 0.0}}),
        ("grade", {"cuts": [0.01, 0.02]}), ("grade", {"cuts": [1.98, 1.99]}),
        ("team", {"criteria": {"billing": "asks for money", "technical": {"is": "a fig"}, "other": None}}),
        ("urgent", {"criteria": {"true": "a fig"}}), ("grade", {"criteria": ["fair", "excellent", "poor"]}),
        ("urgent", {"instructions": "asks for money"}), ("kind", {"instructions": {"task": "the fruit"}}),
    ],
)  # fmt: skip
def test_what_a_predictor_configures_counts_as_with_dspys_own_client(
    field: str, config: dict[str, Any], service: Callable[..., DecisionService]
) -> None:
    predictor = dspy.Predict(Everything)
    defaults = {"threshold": 0.5} if field in ("urgent", "maybe") else {"cuts": [0.5, 1.5]} if field == "grade" else {}
    weights = {"team": {"weights": {}}, "kind": {"weights": {}}}.get(field, {})
    predictor.fields[field] = {**defaults, **weights, **config}
    theirs = service(local()).client()
    for message in MESSAGES:
        with record_decisions() as decisions:
            found = predictor(lm=local(), **message)
        assert outputs(found) == outputs(predictor(lm=theirs, **message))
        # The decision on record is the one the predictor took.
        [decision] = [decision for decision in decisions if decision.field == field]
        value = found[field]
        taken = value.level if isinstance(value, Score) else value.value if hasattr(value, "value") else value
        assert decision.name == str(taken)


def test_set_criteria_describe_the_options_from_then_on() -> None:
    predictor = dspy.Predict(Pick)
    predictor.lm = DifferentiableRoute(Pick, encoder=bag_of_words).as_lm()
    assert predictor(request="something for a pie").fruit != "cherry"
    predictor.set_criteria("fruit", {"apple": None, "banana": None, "cherry": "something for a pie"})
    assert predictor(request="something for a pie").fruit == "cherry"
    predictor.set_criteria("fruit", {"apple": "something for a pie", "banana": None, "cherry": None})
    assert predictor(request="something for a pie").fruit == "apple"


def test_criteria_are_read_with_what_the_head_has_learned_since() -> None:
    import torch

    program = Program()
    program.clerk.lm = DifferentiableRoute(Pick, encoder=bag_of_words).as_lm()
    program.clerk.set_criteria("fruit", {"apple": "pie", "banana": None, "cherry": None})
    sharp = _decision(program, "a pie").probabilities
    with torch.no_grad():
        program.clerk.lm.route.head["fruit"].temperature.fill_(1.0)
    assert _decision(program, "a pie").probabilities["apple"] < sharp["apple"]


class NoDesc(dspy.Signature):
    text: str = dspy.InputField()
    kind: Literal["fig", "date"] = dspy.OutputField()


class FreeText(dspy.Signature):
    text: str = dspy.InputField()
    answer: str = dspy.OutputField(desc="the answer")


@pytest.mark.parametrize(
    ("signature", "arguments"),
    [(NoDesc, {}), (FreeText, {}), (Everything, {"hints": [], "config": {"temperature": 0.5}})],
    ids=["no desc", "free text", "generation settings"],
)
def test_what_dspy_refuses_for_its_own_client_it_refuses_here(
    signature: type[dspy.Signature], arguments: dict[str, Any], service: Callable[..., DecisionService]
) -> None:
    theirs, predictor = service(local()).client(), dspy.Predict(signature)
    with pytest.raises(ValueError) as expected:
        predictor(lm=theirs, text="a fig", **arguments)
    with pytest.raises(ValueError) as found:
        predictor(lm=local(), text="a fig", **arguments)
    assert str(found.value) == str(expected.value)


def test_answers_are_cached_as_by_dspys_own_client(service: Callable[..., DecisionService]) -> None:
    decided = service(local(cache=False))
    theirs, ours, uncached = decided.client(), local(), local(cache=False)
    predictor = dspy.Predict(Everything)
    for client in (theirs, ours, uncached):
        for _ in range(2):
            predictor(lm=client, **MESSAGES[0])
    assert [entry["cache_hit"] for entry in theirs.history] == [False, True]
    assert [entry["cache_hit"] for entry in ours.history] == [False, True]
    assert [entry["cache_hit"] for entry in uncached.history] == [False, False]
    assert outputs(predictor(lm=ours, **MESSAGES[0])) == outputs(predictor(lm=uncached, **MESSAGES[0]))


def test_a_cached_answer_is_not_that_of_another_head() -> None:
    route = DifferentiableRoute(Pick, encoder=bag_of_words)
    predictor = dspy.Predict(Pick)
    predictor.lm = route.as_lm()
    assert predictor(request="a banana").fruit == "banana"
    _add_to_bias(route, [100.0, 0.0, 0.0])
    assert predictor(request="a banana").fruit == "apple"
    _add_to_bias(route, [-100.0, 0.0, 0.0])
    assert predictor(request="a banana").fruit == "banana"
    assert [entry["cache_hit"] for entry in predictor.lm.history] == [False, False, True]


def test_a_trained_token_encoder_is_not_cached() -> None:
    predictor = dspy.Predict(Pick)
    predictor.lm = DifferentiableRoute(Pick, encoder=TokenEncoder(16)).as_lm()
    predictor(request="a banana")
    predictor(request="a banana")
    assert [entry["cache_hit"] for entry in predictor.lm.history] == [False, False]


def test_history_is_kept_where_dspys_own_client_keeps_it(service: Callable[..., DecisionService]) -> None:
    theirs, ours, predictor = service(local()).client(), local(), dspy.Predict(Everything)
    expected, found = io.StringIO(), io.StringIO()
    for client, text in ((theirs, expected), (ours, found)):
        predictor(lm=client, **MESSAGES[0])
        client.inspect_history(file=text)
        assert predictor.history[-1] is client.history[-1]
    assert set(ours.history[0]) >= set(theirs.history[0])
    # What DSPy's own client sent is what this one was asked; only the type of an answer is not repeated.
    sent, asked = ([json.loads(part) for part in (entry["prompt"], *entry["outputs"])] for entry in
                   (theirs.history[0], ours.history[0]))  # fmt: skip
    assert asked == sent
    assert found.getvalue().split("User message:")[1] == expected.getvalue().split("User message:")[1]
    with dspy.context(disable_history=True):
        predictor(lm=ours, **MESSAGES[1])
    with dspy.context(max_history_size=1):
        predictor(lm=ours, **MESSAGES[2])
    assert len(ours.history) == 1


class Calls(BaseCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.seen.append(("start", sorted(inputs)))

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        self.seen.append(("end", type(exception) if exception else sorted(outputs)))


def test_callbacks_fire_as_for_dspys_own_client(service: Callable[..., DecisionService]) -> None:
    seen = []
    for client in (service(local()).client, local):
        calls = Calls()
        predictor = dspy.Predict(Pick)
        predictor(lm=client(callbacks=[calls]), request="a banana")
        asyncio.run(predictor.acall(lm=client(callbacks=[calls]), request="a cherry"))
        seen.append(calls.seen)
    assert seen[1] == seen[0]
    assert seen[1] == [("start", ["questions", "state"]), ("end", ["fruit"])] * 2


def test_no_tokens_are_counted() -> None:
    with dspy.context(track_usage=True):
        prediction = dspy.Predict(Pick)(lm=local(), request="a banana")
    assert prediction.get_lm_usage() == {}


def test_demos_are_sent_and_not_read() -> None:
    predictor = dspy.Predict(Pick)
    predictor.lm = local()
    plain = predictor(request="a pie")
    predictor.demos = [dspy.Example(request="a pie", fruit="cherry")]
    assert outputs(predictor(request="a pie")) == outputs(plain)
    assert json.loads(predictor.lm.history[-1]["prompt"])["state"]["demos"] == [{"request": "a pie", "fruit": "cherry"}]


def test_streaming_is_dspys_to_refuse(service: Callable[..., DecisionService]) -> None:
    async def stream(client: Any) -> None:
        predictor = dspy.Predict(Pick)
        predictor.lm = client
        async for _ in dspy.streamify(predictor)(request="a banana"):
            pass

    for client in (service(local()).client(), local()):
        with pytest.raises(BaseException) as raised:
            asyncio.run(stream(client))
        assert "Streaming decision evidence is not supported" in "".join(map(str, _leaves(raised.value)))


def _leaves(error: BaseException) -> list[BaseException]:
    return [leaf for inner in getattr(error, "exceptions", []) for leaf in _leaves(inner)] or [error]


# One head, two faces


def test_the_route_and_the_predictor_in_front_of_it_decide_the_same() -> None:
    route = RouteFinetune().compile(
        DifferentiableRoute(Pick, encoder=bag_of_words), trainset=fruit_requests(30, label=True)
    )
    predictor = dspy.Predict(Pick)
    predictor.lm = route.as_lm()
    examples = fruit_requests(30, seed=1)
    with record_decisions() as direct:
        expected = [route(**example.inputs()).fruit for example in examples]
    with record_decisions() as behind:
        found = [predictor(**example.inputs()).fruit for example in examples]
    assert found == expected
    assert [(d.text, d.name, dict(d.probabilities)) for d in behind] == [
        (d.text, d.name, dict(d.probabilities)) for d in direct
    ]
    assert sum(right_fruit(e, dspy.Prediction(fruit=f)) for e, f in zip(examples, found, strict=True)) == 30


def test_several_inputs_are_read_in_the_signatures_order_by_both_faces() -> None:
    route = DifferentiableRoute(Everything, encoder=bag_of_words)
    predictor = dspy.Predict(Everything)
    texts = []
    for call in (route, lambda **message: predictor(lm=route.as_lm(), **message),
                 lambda **message: predictor(lm=local(), **message)):  # fmt: skip
        with record_decisions() as decisions:
            call(hints=["fair"], text="a fig")
        texts.append({decision.text for decision in decisions})
    assert texts == [{'text: a fig\nhints: ["fair"]'}] * 3


class Told(dspy.Signature):
    text: str = dspy.InputField(desc="goes before `note`")
    hint: str | None = dspy.InputField()
    note: str | None = dspy.InputField()
    kind: Literal["fig", "date"] = dspy.OutputField(desc="the fruit")


@pytest.mark.parametrize(
    "message",
    [{"note": "c", "hint": "b", "text": "a"}, {"text": "a"}, {"text": ["a", "b"], "hint": "", "note": "c"}],
)
def test_an_untrained_client_reads_what_the_route_it_becomes_will_read(message: dict[str, Any]) -> None:
    predictor = dspy.Predict(Told)
    with record_decisions() as decisions:
        predictor(lm=local(), **message)
        predictor(lm=local().with_route(predictor), **message)
        DifferentiableRoute(Told, encoder=bag_of_words)(**message)
    assert len({decision.text for decision in decisions}) == 1


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("urgent", {"threshold": 0.5, "instructions": "asks for money"}),
        ("urgent", {"threshold": 0.5, "criteria": {"true": None}}),
        ("team", {"weights": {}, "criteria": {"billing": None, "technical": "asks for money", "other": None}}),
        ("team", {"weights": {}, "criteria": dict.fromkeys(["billing", "technical", "other"])}),
    ],
)
def test_a_client_answers_with_a_route_as_it_does_without(field: str, config: dict[str, Any]) -> None:
    predictor = dspy.Predict(Everything)
    predictor.fields[field] = config
    for message in MESSAGES:
        without, bound = predictor(lm=local(), **message), predictor(lm=local().with_route(predictor), **message)
        assert outputs(bound) == outputs(without)


def test_a_missing_input_is_read_as_empty_since_dspy_only_warns() -> None:
    prediction = dspy.Predict(Everything)(
        lm=DifferentiableRoute(Everything, encoder=bag_of_words).as_lm(), text="a fig"
    )
    assert prediction.kind == "fig"


def test_an_untrained_client_answers_any_signature_from_the_descriptions() -> None:
    predictor = dspy.Predict(Everything)
    prediction = predictor(lm=DecisionClient(encoder=bag_of_words), text="date product bug excellent work", hints=[])
    assert (prediction.kind, prediction.team.value, prediction.grade.level) == ("date", "technical", 2)


def test_a_route_that_decides_something_else_says_so() -> None:
    route = DifferentiableRoute("request -> fruit: Literal['apple', 'fig'], fresh: bool", encoder=bag_of_words)
    with pytest.raises(RouteError, match=r"asks for 'fruit', choice among \['apple', 'banana', 'cherry'\]"):
        dspy.Predict(Pick)(lm=route.as_lm(), request="a banana")
    with pytest.raises(RouteError, match="two encoders"):
        DecisionClient(route, encoder=bag_of_words)


def test_decisions_behind_a_predictor_are_explored_and_forced() -> None:
    predictor = dspy.Predict(Pick)
    predictor.lm = local()
    with force_decisions({"fruit": "cherry"}), record_decisions() as decisions:
        assert predictor(request="a banana").fruit == "cherry"
    assert (decisions[0].name, decisions[0].probabilities["banana"] > 0.9) == ("cherry", True)
    with explore_decisions(1.0, seed=0), record_decisions() as decisions:
        found = [predictor(request="a pie").fruit for _ in range(30)]
    assert len(set(found)) == 3
    assert found == [decision.name for decision in decisions]
    assert all(0 < decision.propensity < 1 for decision in decisions)
    # The cache holds the policy, whatever was taken.
    assert predictor(request="a banana").fruit == "banana"


DECIDED_OTHERWISE = [
    ("fruit", {"weights": {"cherry": 1e9}}), ("grade", {"cuts": [0.01, 0.02]}), ("grade", {"cuts": [1.98, 1.99]}),
    ("ripe", {"threshold": 1.0}),
]  # fmt: skip


class Judged(dspy.Signature):
    """Judge a fruit."""

    request: str = dspy.InputField()
    fruit: Literal["apple", "banana", "cherry"] = dspy.OutputField(desc="the fruit to serve")
    grade: Grade = dspy.OutputField(desc="the work")
    ripe: bool = dspy.OutputField(desc="ripe")


def judge(**fields: Any) -> dspy.Predict:
    predictor = dspy.Predict(Judged)
    predictor.lm = local()
    predictor.fields = fields
    return predictor


@pytest.mark.parametrize(("field", "config"), DECIDED_OTHERWISE)
def test_a_predictor_takes_what_is_decided_from_outside_whatever_its_parameters(
    field: str, config: dict[str, Any]
) -> None:
    predictor = judge(**{field: config})
    options = {"fruit": ["apple", "banana", "cherry"], "grade": ["0", "1", "2"], "ripe": ["True", "False"]}
    for option in options[field]:
        with force_decisions({field: option}), record_decisions() as decisions:
            value = predictor(request="a ripe banana")[field]
        taken = str(value.level if field == "grade" else value)
        assert [d.name for d in decisions if d.field == field] == [taken] == [option]


def test_exploration_leaves_the_other_decisions_as_the_predictor_makes_them() -> None:
    predictor = judge(fruit={"weights": {"cherry": 1e9}}, grade={"cuts": [0.01, 0.02]})
    message = {"request": "a poor banana, or an excellent one"}
    alone = predictor(**message)
    assert (alone.fruit, alone.grade.level) == ("cherry", 2)  # neither is the likeliest
    with explore_decisions(1e-9, seed=0):
        assert outputs(predictor(**message)) == outputs(alone)


def test_what_a_predictor_rules_out_is_not_explored_and_not_forced() -> None:
    predictor = judge(fruit={"weights": {"banana": 0.0}}, ripe={"threshold": 0.0})
    with explore_decisions(1.0, seed=0), record_decisions() as decisions:
        found = [predictor(request="a banana") for _ in range(30)]
    assert {prediction.fruit for prediction in found} == {"apple", "cherry"}
    assert [d.name for d in decisions if d.field == "fruit"] == [prediction.fruit for prediction in found]
    assert {(d.name, d.propensity) for d in decisions if d.field == "ripe"} == {("True", 1.0)}
    with force_decisions({"fruit": "banana"}), pytest.raises(RouteError, match="rule it out"):
        predictor(request="a banana")


# Training what is behind predictors


def test_finetuning_does_without_the_rollouts_a_predictor_rules_out() -> None:
    student = Program()
    student.clerk.lm = local()
    student.clerk.fields["fruit"] = {"weights": {"cherry": 0.0}}
    optimizer = RouteFinetune(right_fruit)
    trained = optimizer.compile(student, trainset=fruit_requests(60))
    assert optimizer.report is not None
    assert optimizer.report.errors == 0
    assert score(trained, fruit_requests(30, seed=1)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("configured", [False, True])
def test_finetuning_leaves_the_students_token_encoder_as_it_was(configured: bool) -> None:
    import torch

    client, student = DecisionClient(encoder=TokenEncoder(16)), Program()
    network = client.encoder.network  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    student.clerk.lm = None if configured else client
    with dspy.context(lm=client):
        trained = RouteFinetune().compile(student, trainset=fruit_requests(30, label=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert trained.clerk.lm.encoder is not client.encoder


def test_a_predictor_that_runs_with_another_lm_is_no_matter_to_the_configured_client() -> None:
    class Writing(Program):
        def __init__(self) -> None:
            super().__init__()
            self.writer = dspy.Predict("request -> answer")

    with dspy.context(lm=local()):
        trained = RouteFinetune().compile(Writing(), trainset=fruit_requests(30, label=True))
    assert score(trained, fruit_requests(30, seed=1)) == 1.0
    assert trained.writer.lm is None
    mistaken = Writing()
    mistaken.writer.lm = local()
    with pytest.raises(RouteError, match="'answer' is a plain str"):
        RouteFinetune().compile(mistaken, trainset=fruit_requests(30, label=True))


def test_finetuning_trains_the_client_of_a_predictor_and_leaves_the_students() -> None:
    student = Program()
    student.clerk.lm = client = local()
    trained = RouteFinetune(right_fruit).compile(student, trainset=fruit_requests(60))
    assert score(trained, fruit_requests(30, seed=1)) == 1.0
    assert student.clerk.lm is client
    assert client.route is None
    assert isinstance(trained.clerk, dspy.Predict)
    again = RouteFinetune(right_fruit).compile(trained, trainset=fruit_requests(60))
    assert score(again, fruit_requests(30, seed=1)) == 1.0
    assert again.clerk.lm.route is not trained.clerk.lm.route


def test_finetuning_gives_each_predictor_a_head_where_one_client_is_configured_for_all() -> None:
    class Two(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clerk = dspy.Predict(Pick)
            self.critic = dspy.Predict(dspy.Signature({
                "fruit": (str, dspy.InputField()),
                "yellow": (bool, dspy.OutputField(desc="whether the fruit is yellow")),
            }, "Judge a fruit."))  # fmt: skip

        def forward(self, request: str) -> dspy.Prediction:
            fruit = self.clerk(request=request).fruit
            return dspy.Prediction(fruit=fruit, yellow=self.critic(fruit=fruit).yellow)

    def right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
        return prediction.fruit == example.wanted and prediction.yellow == (example.wanted == "banana")

    client = local()
    with dspy.context(lm=client):
        trained = RouteFinetune(right).compile(Two(), trainset=fruit_requests(90))
        found = [right(example, trained(**example.inputs())) for example in fruit_requests(30, seed=1)]
    assert sum(found) == 30
    assert trained.clerk.lm.route is not trained.critic.lm.route
    assert client.route is None


def test_a_head_trained_behind_a_predictor_reads_the_criteria_it_was_trained_with() -> None:
    student = Program()
    student.clerk.lm = local()
    student.clerk.set_criteria("fruit", {"apple": "pie cider", "banana": "split peel", "cherry": "stone blossom"})
    untrained = score(student, fruit_requests(30, seed=1))
    assert untrained > 0.9
    bound = student.clerk.lm.with_route(student.clerk)
    student.clerk.lm = bound
    assert score(student, fruit_requests(30, seed=1)) == untrained
    assert [option.description for option in bound.route.fields[0].options] == [
        "pie cider",
        "split peel",
        "stone blossom",
    ]


def test_logs_of_a_route_train_the_client_of_the_predictor_in_its_place(tmp_path: Path) -> None:
    class Routed(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clerk = DifferentiableRoute(Pick, encoder=bag_of_words)

        def forward(self, request: str) -> dspy.Prediction:
            return dspy.Prediction(fruit=self.clerk(request=request).fruit)

    program = Routed()
    with explore_decisions(1.0, seed=0):
        for example in fruit_requests(120):
            with record_decisions(tmp_path / "log.jsonl", program=program) as run:
                run.reward(right_fruit(example, program(**example.inputs())))
    student = Program()
    student.clerk.lm = local()
    trained = RouteFinetune().compile(student, feedback=tmp_path / "log.jsonl")
    assert score(trained, fruit_requests(30, seed=1)) > 0.9


def test_reanchor_tunes_on_top_of_a_trained_head() -> None:
    student = Program()
    student.clerk.lm = local()
    trained = RouteFinetune(right_fruit).compile(student, trainset=fruit_requests(30))
    _add_to_bias(trained.clerk.lm.route, [0.0, 0.0, -6.5])  # cherries are hardly ever served
    assert score(trained, fruit_requests(30, seed=1)) < 0.7
    anchored = ReAnchor(right_fruit, num_threads=1).compile(trained, trainset=fruit_requests(60, seed=2))
    assert score(anchored, fruit_requests(30, seed=1)) > 0.9
    assert anchored.clerk.fields["fruit"]["weights"]["cherry"] > 1
    assert _same_head(anchored, trained)


def _add_to_bias(route: Any, values: list[float]) -> None:
    import torch

    with torch.no_grad():
        route.head["fruit"].bias += torch.tensor(values)


def _same_head(one: Any, other: Any) -> bool:
    heads = [program.clerk.lm.route.head.state_dict() for program in (one, other)]
    return all(bool((heads[0][name] == heads[1][name]).all()) for name in heads[0])


# Saving


def test_a_trained_client_is_saved_with_its_program_and_loaded_in_a_new_process(tmp_path: Path) -> None:
    student = Program()
    student.clerk.lm = local(cache=False)
    trained = RouteFinetune(right_fruit).compile(student, trainset=fruit_requests(60))
    trained.save(tmp_path / "program.json")
    requests = [example.request for example in fruit_requests(30, seed=1)]
    expected = [dict(_decision(trained, request).probabilities) for request in requests]
    script = f"""
import json
from tests.clients.test_decision_client import Program, _decision, local
program = Program()
program.clerk.lm = local()  # the callable that reads requests is no part of a file
program.load({str(tmp_path / "program.json")!r}, allow_unsafe_lm_state=True)
assert program.clerk.lm.cache is False
print(json.dumps([dict(_decision(program, request).probabilities) for request in {requests!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def _decision(program: Program, request: str) -> Any:
    with record_decisions() as decisions:
        program(request=request)
    return decisions[0]


def test_loading_asks_for_the_trust_dspy_asks_for(tmp_path: Path) -> None:
    program = Program()
    program.clerk.lm = local()
    program.save(tmp_path / "program.json")
    with pytest.raises(ValueError, match="allow_unsafe_lm_state=True"):
        Program().load(tmp_path / "program.json")


@pytest.mark.parametrize("make", [lambda: TokenEncoder(16), lambda: None], ids=["token", "sentence"])
def test_an_encoder_that_settings_describe_needs_no_client_to_load_into(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    program = Program()
    program.clerk.lm = DifferentiableRoute(Pick, encoder=make()).as_lm()
    trained = RouteFinetune().compile(program, trainset=fruit_requests(30, label=True))
    trained.save(tmp_path / "program.json")
    loaded = Program()
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    for example in fruit_requests(9, seed=1):
        assert dict(_decision(loaded, example.request).probabilities) == dict(
            _decision(trained, example.request).probabilities
        )


def test_a_client_keeps_every_type_and_description_through_its_state() -> None:
    route = DifferentiableRoute(Everything, encoder=bag_of_words)
    state = json.loads(json.dumps(route.as_lm().dump_state()))
    loaded = DecisionClient.load_state(state)
    assert loaded.route is not None
    for field, own in zip(loaded.route.fields, route.fields, strict=True):
        assert (field.name, field.kind, field.options) == (own.name, own.kind, own.options)
    predictor = dspy.Predict(Everything)
    for message in MESSAGES:
        assert outputs(predictor(lm=loaded, **message)) == outputs(predictor(lm=route.as_lm(), **message))


def test_a_callable_encoder_that_is_not_at_hand_is_asked_for() -> None:
    def other(texts: list[str]) -> Any:
        return bag_of_words(texts)[:, ::-1] + 1

    state = DecisionClient(encoder=other).dump_state()
    with pytest.raises(RouteError, match="a callable that no file can hold"):
        DecisionClient.load_state(state)


def test_loading_leaves_the_encoders_of_other_clients_alone() -> None:
    def down(texts: list[str]) -> Any:
        raise ConnectionError("the embedding service is down")

    others = [DecisionClient(encoder=down) for _ in range(20)] + [DecisionClient(encoder="/no/such/model")]
    kept = local()
    assert DecisionClient.load_state(kept.dump_state()).encoder.fingerprint == kept.encoder.fingerprint
    assert all(other.encoder is not kept.encoder for other in others)


def test_clients_are_made_and_loaded_in_many_threads() -> None:
    client = local()
    state = client.dump_state()
    stopped = threading.Event()

    def copies() -> None:
        kept: list[DecisionClient] = []
        while not stopped.is_set():
            kept = [*kept[-2000:], client.copy()]

    makers = [threading.Thread(target=copies) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for maker in makers:
            maker.start()
        for _ in range(50):
            DecisionClient.load_state(state)
    finally:
        stopped.set()
        sys.setswitchinterval(interval)
        for maker in makers:
            maker.join()


def test_an_untrained_token_encoder_is_the_same_after_loading() -> None:
    client = DecisionClient(encoder=TokenEncoder(16, seed=5))
    loaded = DecisionClient.load_state(client.dump_state())
    assert loaded.encoder.encode_one("a fig").tolist() == client.encoder.encode_one("a fig").tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 9}, {"version": "1"}, {"format": "x"}, {"cache": "yes"}, {"route": {"fields": []}}, {"sha256": "0"},
        {"encoder": {"kind": "other"}, "fingerprint": {}}, {"fingerprint": {"name": 1}, "encoder": None}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    state = DifferentiableRoute(Pick, encoder=bag_of_words).as_lm().dump_state()
    with pytest.raises(RouteError):
        DecisionClient.load_state({**state, **change})
    del state["sha256"], state["_dspy_lm_class"]
    if "sha256" not in change:  # nor is one that somebody sealed after the change
        with pytest.raises(RouteError):
            DecisionClient.load_state(sealed({**state, **change}))


def test_copies_have_a_head_of_their_own_and_share_the_encoder() -> None:
    program = Program()
    program.clerk.lm = DifferentiableRoute(Pick, encoder=bag_of_words).as_lm()
    program(request="a banana")
    copied = program.deepcopy()
    assert copied.clerk.lm.route is not program.clerk.lm.route
    assert copied.clerk.lm.encoder is program.clerk.lm.encoder
    assert copied.clerk.lm.history == []
    assert program.clerk.lm.copy(rollout_id=1).route is program.clerk.lm.route


def test_two_predictors_that_share_a_client_share_it_in_a_copy() -> None:
    class Pair(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = dspy.Predict(Pick), dspy.Predict(Pick)
            self.first.lm = self.second.lm = DifferentiableRoute(Pick, encoder=bag_of_words).as_lm()

    copied = Pair().deepcopy()
    assert copied.first.lm is copied.second.lm


# What replaces a value somewhere in a client's state.
ODD = st.sampled_from([None, True, 0, -1, 10**30, 1.5, "", "x" * 1000, [], {}, [[]], {"name": 1}, "score", "noul"])


@settings(max_examples=600, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
@given(st.integers(0, 10_000), ODD)
def test_a_state_with_any_value_replaced_loads_to_a_client_or_is_refused(place: int, value: Any) -> None:
    state = json.loads(SAVED)
    places = list(_places(state))
    owner, key = places[place % len(places)]
    owner[key] = value
    with suppress(RouteError):
        # Sealed after the change, as by somebody who knows the format.
        loaded = DecisionClient.load_state(sealed(state))
        assert isinstance(loaded, DecisionClient)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _saved() -> str:
    state = DifferentiableRoute(Everything, encoder=bag_of_words).as_lm().dump_state()
    return json.dumps({name: value for name, value in state.items() if name not in ("sha256", "_dspy_lm_class")})


SAVED = _saved()
KEPT = DecisionClient(encoder=bag_of_words)  # by which the states above find their encoder
