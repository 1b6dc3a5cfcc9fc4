import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
from dspy.clients.cache import Cache

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune
from dspy_router.synthesis import RequestWriter
from dspy_router.synthesis.confusion import confusion
from dspy_router.synthesis.filter import CHUNK, RequestFilter
from dspy_router.synthesis.prompts import STYLES
from tests.conftest import bag_of_words
from tests.programs import FRUIT, HINTS, OTHER, fruit_requests, fruit_route, right_fruit


def field(prompt: str, name: str) -> str:
    """The value of an input field in a prompt of DSPy's ChatAdapter."""
    return re.search(rf"\[\[ ## {name} ## \]\]\n(.*?)\n\n", prompt, re.DOTALL)[1].strip()


def answer(requests: Any) -> str:
    return f"[[ ## requests ## ]]\n{json.dumps(requests)}\n\n[[ ## completed ## ]]"


def requests_for(prompt: str) -> list[str]:
    """As many requests as the prompt asks for, with a hint to its fruit in each; a prompt decides which."""
    random_ = random.Random(prompt)
    hints = HINTS[field(prompt, "option")]
    return [" ".join([random_.choice(hints), *random_.sample(OTHER, 3)]) for _ in range(int(field(prompt, "count")))]


def write_fruit(prompt: str) -> str:
    return answer(requests_for(prompt))


def accuracy(route: dspy.Module) -> float:
    test = fruit_requests(150, seed=9)
    return sum(right_fruit(example, route(request=example.request)) for example in test) / len(test)


def said(prediction: dspy.Prediction) -> list[tuple[str, str, str]]:
    return [(example.request, example.fruit, example.origin) for example in prediction.examples]


def test_examples_have_their_input_label_and_origin(scripted_lm: Any) -> None:
    with dspy.context(lm=scripted_lm(write_fruit).lm):
        written = RequestWriter(fruit_route())(per_option=16, hard=0.25)
    report = written.report
    assert written.examples is report.examples
    assert report.options == {"apple": 16, "banana": 16, "cherry": 16}
    for example in report.examples:
        assert set(example.inputs().toDict()) == {"request"}
        assert set(example.request.split()) & set(HINTS[example.fruit])
    assert Counter(example.origin for example in report.examples) == report.origins
    assert sum(count for origin, count in report.origins.items() if origin.startswith("synthetic/hard/")) == 12
    assert {origin.removeprefix("synthetic/plain/") for origin in report.origins if "plain" in origin} == set(STYLES)
    hard = [example for example in report.examples if "hard" in example.origin]
    assert all(example.origin.removeprefix("synthetic/hard/") in {*FRUIT} - {example.fruit} for example in hard)


def test_a_route_trained_on_them_beats_the_untrained_one(scripted_lm: Any) -> None:
    route = fruit_route()
    with dspy.context(lm=scripted_lm(write_fruit).lm):
        report = RequestWriter(route)(per_option=20).report
    trained = RouteFinetune().compile(route, trainset=report.examples)
    assert accuracy(trained) > 0.95 > 0.6 > accuracy(route)


def test_every_style_serves_every_option_alike(scripted_lm: Any) -> None:
    server = scripted_lm(write_fruit)
    with dspy.context(lm=server.lm):
        RequestWriter(fruit_route())(per_option=6, hard=0.0, seed=3)
    asked = {fruit: {field(p, "style") for p in server.requests if field(p, "option") == fruit} for fruit in FRUIT}
    assert asked["apple"] == asked["banana"] == asked["cherry"]
    assert len(asked["apple"]) >= 3


def test_no_two_calls_are_the_same_and_later_ones_show_what_is_written(scripted_lm: Any) -> None:
    server = scripted_lm(write_fruit)
    with dspy.context(lm=server.lm, num_threads=1):
        report = RequestWriter(fruit_route())(per_option=40).report
    assert len(set(server.requests)) == len(server.requests) == report.calls
    last = server.requests[-1]
    shown = json.loads(field(last, "written"))
    assert shown
    assert set(shown) <= {example.request for example in report.examples if example.fruit == field(last, "option")}


def test_hard_requests_are_asked_for_the_pairs_the_route_confuses(scripted_lm: Any) -> None:
    numbers = itertools.count()

    def write(prompt: str) -> str:
        topic = "wine glass" if "wine" in field(prompt, "option") else "plough field"
        return answer([f"{topic} word{next(numbers)}" for _ in range(int(field(prompt, "count")))])

    tools = {"tractor": "plough the field", "red": "a glass of wine", "white": "a cold glass of wine"}
    route = DifferentiableRoute("request -> tool", tools=tools, encoder=bag_of_words)
    server = scripted_lm(write)
    with dspy.context(lm=server.lm, num_threads=1):
        report = RequestWriter(route)(per_option=4, hard=0.5).report
    assert {(pair.option, pair.rival) for pair in report.pairs[:2]} == {("red", "white"), ("white", "red")}
    probabilities = [pair.probability for pair in report.pairs]
    assert probabilities == sorted(probabilities, reverse=True)
    hard = [prompt for prompt in server.requests if "## rival ##" in prompt]
    assert "glass of wine" in field(hard[0], "rival")
    assert "glass of wine" in field(hard[0], "option")
    assert {example.origin for example in report.examples if example.tool == "red"} >= {"synthetic/hard/white"}


def test_near_duplicates_are_dropped_and_the_first_kept(scripted_lm: Any) -> None:
    def write(prompt: str) -> str:
        first, *others = requests_for(prompt)
        return answer([first, " ".join(reversed(first.split())), *others])  # the same bag of words

    with dspy.context(lm=scripted_lm(write).lm):
        report = RequestWriter(fruit_route())(per_option=6).report
    bags = [frozenset(example.request.split()) for example in report.examples]
    assert len(set(bags)) == len(bags)
    assert report.dropped["near-duplicate"] > 0
    assert report.dropped["more than asked for"] > 0


def test_what_is_near_the_validation_set_is_dropped(scripted_lm: Any) -> None:
    leak = "pie for me now"
    valset = [dspy.Example(request="now me for pie", wanted="apple", age=3).with_inputs("request", "age")]
    server = scripted_lm(lambda prompt: answer([leak, *requests_for(prompt)[1:]]))
    with dspy.context(lm=server.lm):
        guarded = RequestWriter(fruit_route())(per_option=6, valset=valset).report
        unguarded = RequestWriter(fruit_route())(per_option=6).report
    assert leak not in {example.request for example in guarded.examples}
    assert guarded.dropped["near the validation set"] > 0
    assert leak in {example.request for example in unguarded.examples}
    assert not any("now me for pie" in prompt for prompt in server.requests)


def test_empty_and_long_texts_are_dropped(scripted_lm: Any) -> None:
    def write(prompt: str) -> str:
        requests = requests_for(prompt)
        return answer(["  ", "pie " * 30] if field(prompt, "batch") == "1" else requests)

    with dspy.context(lm=scripted_lm(write).lm):
        report = RequestWriter(fruit_route(), max_length=100)(per_option=4, hard=0.0).report
    assert report.dropped["empty"] == 3
    assert report.dropped["too long"] == 3
    assert report.options == dict.fromkeys(FRUIT, 4)


def test_the_same_seed_gives_the_same_examples_whatever_the_threads(scripted_lm: Any) -> None:
    with dspy.context(lm=scripted_lm(write_fruit).lm):
        one = RequestWriter(fruit_route(), num_threads=1)(per_option=15, seed=4)
        many = RequestWriter(fruit_route(), num_threads=8)(per_option=15, seed=4)
        other = RequestWriter(fruit_route(), num_threads=8)(per_option=15, seed=5)
    assert said(one) == said(many)
    assert said(one) != said(other)
    assert (one.report.tokens, one.report.calls) == (many.report.tokens, many.report.calls)


def test_malformed_answers_are_counted_and_asked_for_again(scripted_lm: Any) -> None:
    def write(prompt: str) -> str:
        malformed = field(prompt, "option") == "banana" and field(prompt, "batch") == "1"
        return "I would rather not." if malformed else write_fruit(prompt)

    with dspy.context(lm=scripted_lm(write).lm):
        report = RequestWriter(fruit_route())(per_option=8).report
    assert report.errors == {"AdapterParseError": 1}
    assert report.options == dict.fromkeys(FRUIT, 8)
    assert "1 AdapterParseError" in str(report)


@pytest.mark.parametrize("threads", [1, 4])
def test_failing_calls_stop_at_max_errors(scripted_lm: Any, threads: int) -> None:
    def refuse(prompt: str) -> str:
        raise ConnectionError

    server = scripted_lm(refuse)
    server_lm = server.lm.copy(num_retries=0)
    writer = RequestWriter(fruit_route(), max_errors=3, num_threads=threads)
    with (
        dspy.context(lm=server_lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)),
        pytest.raises(RouteError, match=r"Stopped after \d LM calls that failed \(max_errors=3\); the last: \w+Error"),
    ):
        writer(per_option=20)
    assert 3 <= len(server.requests) <= 3 + threads - 1


def test_max_errors_is_dspys_setting_by_default(scripted_lm: Any) -> None:
    server = scripted_lm(lambda prompt: "no")
    with dspy.context(lm=server.lm, max_errors=2, num_threads=1), pytest.raises(RouteError, match=r"max_errors=2\)"):
        RequestWriter(fruit_route())()


def test_an_lm_that_writes_nothing_usable_is_an_error(scripted_lm: Any) -> None:
    with (
        dspy.context(lm=scripted_lm(lambda prompt: answer([""])).lm),
        pytest.raises(RouteError, match=r"No request was kept of \d+ LM calls.*'empty'"),
    ):
        RequestWriter(fruit_route())(per_option=2)


def test_an_lm_that_repeats_itself_leaves_options_short(scripted_lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = scripted_lm(lambda prompt: answer([f"{HINTS[field(prompt, 'option')][0]} now"]))
    with dspy.context(lm=server.lm):
        report = RequestWriter(fruit_route())(per_option=4, hard=0.0).report
    assert report.options == dict.fromkeys(FRUIT, 1)
    assert "options short of 4  apple 1, banana 1, cherry 1" in str(report)
    assert "3 options have fewer than 4 requests" in caplog.text


def test_usage_is_counted_once_and_reaches_dspys_tracker(scripted_lm: Any) -> None:
    for threads in (1, 4):
        server = scripted_lm(write_fruit)
        with dspy.context(lm=server.lm, track_usage=True):
            written = RequestWriter(fruit_route(), num_threads=threads)(per_option=6)
        assert written.report.tokens == 25 * len(server.requests)
        assert written.report.cost is None
        assert written.get_lm_usage()["openai/scripted"]["total_tokens"] == written.report.tokens


def test_a_known_model_has_a_cost(scripted_lm: Any) -> None:
    server = scripted_lm(write_fruit)
    with dspy.context(lm=server.lm.copy(model="openai/gpt-4.1")):
        report = RequestWriter(fruit_route())(per_option=2).report
    assert report.cost == pytest.approx(len(server.requests) * (20 * 2e-6 + 5 * 8e-6))
    assert f"{report.tokens:,} tokens, ${report.cost:.4f}" in str(report)


def test_dspys_cache_answers_a_repeated_run_and_not_another_seed(
    scripted_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Cache(enable_disk_cache=False, enable_memory_cache=True, disk_cache_dir="")
    monkeypatch.setattr(dspy, "cache", memory)
    server = scripted_lm(write_fruit)
    sent, reports = [], []
    with dspy.context(lm=server.lm.copy(cache=True)):
        for seed in (0, 0, 2):
            reports.append(RequestWriter(fruit_route())(per_option=16, seed=seed).report)
            sent.append(len(server.requests))
    assert sent[0] == sent[1] == reports[0].calls
    assert reports[1].tokens == 0
    assert reports[1].examples == reports[0].examples
    assert sent[2] - sent[1] == reports[2].calls
    assert len(set(server.requests)) < sent[2]  # some prompts are the same under both seeds


def test_the_writer_is_a_module_whose_predictors_dspy_finds_and_saves(tmp_path: Path) -> None:
    writer = RequestWriter(fruit_route())
    assert [name for name, _ in writer.named_predictors()] == ["plain", "hard"]
    demo = dspy.Example(option="apple", requests=["bake a pie"])
    writer.plain.demos = [demo]
    writer.save(tmp_path / "writer.json")
    loaded = RequestWriter(fruit_route())
    loaded.load(tmp_path / "writer.json")
    assert loaded.plain.demos[0]["requests"] == ["bake a pie"]
    assert writer.deepcopy().route.encoder is writer.route.encoder


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


class Triage(dspy.Signature):
    """Decide how a letter is handled."""

    letter: str = dspy.InputField()
    mood: Mood = dspy.OutputField()
    urgent: bool = dspy.OutputField(desc="whether it must be answered today")


def test_one_field_of_several_is_written_for_and_labels_are_typed(scripted_lm: Any, tmp_path: Path) -> None:
    def write(prompt: str) -> str:
        word = field(prompt, "option")
        return answer([f"{word} {random.Random(prompt).random()}" for _ in range(int(field(prompt, "count")))])

    route = DifferentiableRoute(Triage, encoder=bag_of_words)
    server = scripted_lm(write)
    with dspy.context(lm=server.lm):
        urgent = RequestWriter(route, field="urgent")(per_option=4).report
        mood = RequestWriter(route, field="mood")(per_option=4).report
    assert {example.urgent for example in urgent.examples} == {True, False}
    assert {example.mood for example in mood.examples} == {Mood.GOOD, Mood.BAD}
    assert any("urgent: whether it must be answered today" in prompt for prompt in server.requests)
    optimizer = RouteFinetune()
    optimizer.compile(route, trainset=urgent.examples + mood.examples)
    assert optimizer.report.rows == {"synthetic": 16}
    lines = mood.save(tmp_path / "mood.jsonl").read_text(encoding="utf-8").splitlines()
    read = [dspy.Example(**json.loads(line)).with_inputs("letter") for line in lines]
    assert [route.fields[0].index_of(example.mood) for example in read] == [
        route.fields[0].index_of(example.mood) for example in mood.examples
    ]
    assert [example.inputs() for example in read] == [example.inputs() for example in mood.examples]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RequestWriter(DifferentiableRoute(Triage, encoder=bag_of_words)), r"field=None.*name one of them"),
        (
            lambda: RequestWriter(DifferentiableRoute(Triage, encoder=bag_of_words), field="mod"),
            r"field='mod': this route decides \['mood', 'urgent'\]",
        ),
        (
            lambda: RequestWriter(DifferentiableRoute("question, history -> yes: bool", encoder=bag_of_words)),
            r"inputs are \['question', 'history'\].*one text input",
        ),
        (
            lambda: RequestWriter(DifferentiableRoute("hints: list[str] -> yes: bool", encoder=bag_of_words)),
            r"inputs are \['hints'\]",
        ),
        (
            lambda: RequestWriter(DifferentiableRoute("origin -> yes: bool", encoder=bag_of_words)),
            r"a field 'origin'",
        ),
        (lambda: RequestWriter(fruit_route(), max_similarity=2), r"max_similarity=2"),
        (lambda: RequestWriter(fruit_route())(per_option=0), r"per_option=0"),
        (lambda: RequestWriter(fruit_route())(hard=2), r"hard=2"),
        (
            lambda: RequestWriter(fruit_route())(valset=[dspy.Example(question="a pie?").with_inputs("question")]),
            r"has no 'request'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        make()


def test_the_report_renders_as_text_and_html(scripted_lm: Any) -> None:
    with dspy.context(lm=scripted_lm(write_fruit).lm):
        report = RequestWriter(fruit_route())(per_option=8).report
    for part in ("24 of 24", "6 hard", "terse", "LM calls", "price unknown", "seed 0"):
        assert part in str(report)
        assert part in report._repr_html_()
    assert report._repr_html_().startswith("<table>")


def test_texts_are_compared_across_chunks_as_within_one() -> None:
    random_ = np.random.default_rng(0)
    vectors = {str(number): vector for number, vector in enumerate(random_.standard_normal((2 * CHUNK + 9, 3)))}
    unit = {text: vector / np.linalg.norm(vector) for text, vector in vectors.items()}
    texts = list(unit)

    def encode(chosen: Any) -> np.ndarray:
        return np.array([unit[text] for text in chosen]).reshape(-1, 3)

    kept: list[str] = []
    for text in texts:
        if not kept or (encode(kept) @ unit[text]).max() <= 0.98:
            kept.append(text)
    reasons = RequestFilter(encode, [], max_similarity=0.98, max_length=9).judge(texts)
    assert [text for text, reason in zip(texts, reasons, strict=True) if reason is None] == kept
    assert 9 < len(kept) < len(texts)


def test_confusion_is_the_mean_probability_of_the_wrong_options() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]])
    expected = [[0, 0.3, 0.1], [0, 0, 0], [0.3, 0.3, 0]]
    np.testing.assert_allclose(confusion(probabilities, [0, 0, 1, 2]), expected)
