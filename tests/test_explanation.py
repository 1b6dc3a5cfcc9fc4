"""An explanation says what the head computes: nothing in it is a guess, and it decides nothing."""

import json
from itertools import combinations
from typing import Any, Literal

import dspy
import numpy as np
import pytest
from dspy.adapters.types.decision import Score

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, SentenceEncoder, record_decisions
from dspy_router.agent.state import StepState
from dspy_router.encoders.function import FunctionEncoder
from dspy_router.encoders.step import StepEncoder
from dspy_router.explaining import MOST_REMOVED, MOST_WORDS, NEIGHBOURS, head_space, without, word_spans
from dspy_router.explanation import Explanation, FieldExplanation
from tests.conftest import bag_of_words
from tests.programs import FRUIT, HINTS, fruit_requests, fruit_route, order_route, right_fruit

Grade = Score["poor work", "fair work", "excellent work"]
TOOLS = {
    "get_weather": "The weather forecast for a place: rain, sun, wind and temperature.",
    "play_music": "Play a song, an album or an artist.",
    "book_restaurant": "Book a table at a restaurant.",
    "rate_book": "Give a book some stars.",
}


@pytest.fixture(scope="module")
def trained() -> DifferentiableRoute:
    return RouteFinetune().compile(fruit_route(), trainset=fruit_requests(600, label=True))  # type: ignore[return-value]


def of_fruit(route: DifferentiableRoute, request: str, **settings: Any) -> FieldExplanation:
    return route.explain(request=request, **settings).fields["fruit"]


def test_the_word_rain_carries_the_choice_of_the_weather(sentence_encoder: SentenceEncoder) -> None:
    route = DifferentiableRoute("request -> tool", tools=TOOLS, encoder=sentence_encoder)
    explained = route.explain(request="Will it rain in Oslo tomorrow?").fields["tool"]
    assert explained.option == "get_weather"
    assert explained.carrying[0].word == "rain"
    assert explained.carrying[0].effect > 1
    assert explained.neighbours[0].option == "get_weather"
    assert "The weather forecast" in explained.neighbours[0].text
    assert not any(near.trained for near in explained.neighbours)
    assert explained.familiarity is None


def test_a_words_effect_is_what_the_log_odds_lose_without_it(trained: DifferentiableRoute) -> None:
    explained = of_fruit(trained, "pie please now, a")
    assert explained.option == "apple"
    assert [word.word for word in explained.words] == ["pie", "please", "now", "a"]
    texts = ["pie please now, a", "please now, a", "pie now, a", "pie please , a", "pie please now,"]
    logits = trained.logits(texts).detach().numpy()
    margins = logits[:, 0] - logits[:, FRUIT.index(str(explained.runner_up))]
    assert explained.margin == pytest.approx(margins[0], abs=1e-4)
    assert np.allclose([word.effect for word in explained.words], margins[0] - margins[1:], atol=1e-4)
    assert explained.carrying[0].word == "pie"


@pytest.mark.parametrize(
    "request_", ["pie please now a", "pie cider please", "split the peel for me", "stone now a pie"]
)
def test_what_would_have_changed_it_is_the_fewest_words(trained: DifferentiableRoute, request_: str) -> None:
    explained = of_fruit(trained, request_)
    assert explained.change is not None
    removed = explained.change.removed
    words = request_.split()
    left = trained(request=" ".join(word for word in words if word not in removed))
    assert (left.fruit, left.confidence) == (
        explained.change.option,
        pytest.approx(explained.change.probability, rel=1e-5),
    )
    assert left.fruit != explained.option
    for size in range(1, len(removed)):
        for fewer in combinations(words, size):
            assert trained(request=" ".join(w for w in words if w not in fewer)).fruit == explained.option


def test_words_that_say_the_same_must_go_together(trained: DifferentiableRoute) -> None:
    explained = of_fruit(trained, "pie cider please")
    assert explained.change is not None
    assert explained.change.removed == ("pie", "cider")
    assert "Without 'pie', 'cider' it would be" in " ".join(explained.sentences)


def test_where_no_removal_changes_it_that_is_said(trained: DifferentiableRoute) -> None:
    explained = of_fruit(trained, "pie cider pie cider")
    assert explained.change is None
    assert explained.tried == ("pie", "cider", "pie", "cider")
    assert "without any one word" in explained.sentences[-1]
    two = of_fruit(trained, "pie cider")  # together they are all there is
    assert (two.change, two.tried) == (None, ())
    assert two.sentences[-1] == "It stays without any one word."
    alone = of_fruit(trained, "pie")
    assert (alone.change, alone.tried) == (None, ())
    assert alone.words[0].effect > 0
    assert len(alone.sentences) == 2


def test_the_nearest_texts_are_training_texts_of_the_same_kind(trained: DifferentiableRoute) -> None:
    explained = of_fruit(trained, "pie please now a")
    assert len({near.text for near in explained.neighbours}) == NEIGHBOURS
    assert all(near.trained and near.option == "apple" and "pie" in near.text.split() for near in explained.neighbours)
    similarities = [near.similarity for near in explained.neighbours]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] == pytest.approx(1, abs=1e-3)  # trained on, but for the words' order
    strange = of_fruit(trained, "violin comet sock")
    assert explained.familiarity is not None
    assert strange.familiarity is not None
    assert strange.familiarity < explained.familiarity - 1


def test_near_is_what_is_alike_in_words_and_in_what_the_head_makes_of_them() -> None:
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [-0.8, 0.6]])
    mapped = head_space(vectors, np.array([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 4.0]]))
    assert np.allclose(mapped @ mapped[0], [1.0, 0.9, -0.1, 0.1])
    # What the softmax ignores does not count.
    assert np.allclose(mapped, head_space(vectors, np.array([[9.0, 6.0], [9.0, 8.0], [4.0, 5.0], [6.0, 5.0]])))


def test_an_option_added_later_stands_there_with_its_description(trained: DifferentiableRoute) -> None:
    route = trained.deepcopy()
    route.add_tools({"date": "A sweet brown fruit of the palm."})
    explained = of_fruit(route, "a sweet brown fruit of the palm")
    described = [near for near in explained.neighbours if not near.trained]
    assert [(near.option, "sweet brown" in near.text) for near in described] == [("date", True)]
    assert "(description) date" in str(route.explain(request="a sweet brown fruit of the palm"))


def test_what_the_guard_would_do_is_said(trained: DifferentiableRoute) -> None:
    route = trained.deepcopy()
    assert route.explain(request="pie").abstains is None
    assert "no guard is set" in str(route.explain(request="pie"))
    examples = fruit_requests(400, seed=5)
    for number, example in enumerate(examples):
        example.request += f" {number}"
    report = route.guard(examples, metric=right_fruit, risk=0.05)
    for request, abstains in (("pie please now a 7", False), ("violin comet sock bridge", True)):
        explanation, prediction = route.explain(request=request), route(request=request)
        assert explanation.abstains is prediction.decision.abstained is abstains
        assert explanation.score == pytest.approx(prediction.decision.score)
        assert explanation.threshold == report.threshold
    assert "declines, being below the guard's threshold" in str(explanation)
    nothing = route.guard(examples, metric=lambda example, prediction: 0.0)
    assert nothing.threshold is None
    assert "declines every request" in str(route.explain(request="pie please now a 7"))


def test_nothing_is_decided(trained: DifferentiableRoute) -> None:
    with record_decisions() as decisions:
        trained.explain(request="pie please now a")
    assert decisions == []


def test_only_candidates_count(trained: DifferentiableRoute) -> None:
    explained = of_fruit(trained, "pie please split", candidates=["banana", "cherry"])
    assert explained.option == "banana"
    assert list(explained.likeliest) == ["banana", "cherry"]
    assert sum(explained.likeliest.values()) == pytest.approx(1)
    assert {near.option for near in explained.neighbours} <= {"banana", "cherry"}
    alone = of_fruit(trained, "pie please", candidates=["cherry"])
    assert (alone.option, alone.runner_up, alone.margin, alone.words, alone.change) == ("cherry", None, None, (), None)
    assert alone.sentences == ("fruit: cherry, the only candidate.",)
    with pytest.raises(RouteError, match="'fig'"):
        trained.explain(request="pie", candidates=["fig"])


def test_every_field_has_its_section() -> None:
    explanation = order_route().explain(request="a large banana")
    assert {name: found.option for name, found in explanation.fields.items()} == {"fruit": "banana", "size": "large"}
    assert explanation.fields["fruit"].carrying[0].word == "banana"
    assert explanation.fields["size"].carrying[0].word == "large"
    assert str(explanation).count("Likeliest options") == 2
    assert "size: large; log-odds against small: +" in str(explanation)


def test_scores_and_booleans_are_explained_as_they_are_selected() -> None:
    class Judge(dspy.Signature):
        text: str = dspy.InputField()
        stars: Grade = dspy.OutputField()
        urgent: bool = dspy.OutputField()

    route = DifferentiableRoute(Judge, encoder=bag_of_words)
    prediction, explanation = route(text="poor or excellent urgent"), route.explain(text="poor or excellent urgent")
    assert explanation.fields["stars"].option == prediction.decisions["stars"].name
    assert explanation.fields["urgent"].option == prediction.decisions["urgent"].name == "True"


@pytest.mark.parametrize("text", ["", " \n", "?!"])
def test_a_text_without_words_is_explained_without_them(trained: DifferentiableRoute, text: str) -> None:
    explanation = trained.explain(request=text)
    explained = explanation.fields["fruit"]
    assert (explained.words, explained.change, explained.tried) == ((), None, ())
    assert sum(explained.likeliest.values()) == pytest.approx(1)
    assert bool(explained.neighbours) is bool(text.strip())
    assert ("There is no text" in str(explanation)) is not bool(text.strip())
    assert "<table>" in explanation._repr_html_()


def test_a_long_text_costs_no_more_batches_and_the_second_time_nothing() -> None:
    encoded: list[str] = []

    def counting(texts: list[str]) -> np.ndarray:
        encoded.extend(texts)
        return bag_of_words(texts)

    route = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=FunctionEncoder(counting))
    route(request="pie")
    encoded.clear()
    text = " ".join(f"word{number}" for number in range(1000)) + " apple " * 50
    explained = of_fruit(route, text)
    assert len(explained.words) <= MOST_WORDS
    assert " ".join(word.word for word in explained.words).split() == text.split()
    assert explained.carrying[0].word.split().count("apple") > 20
    assert max(map(len, str(route.explain(request=text)).splitlines()[1:])) < 300
    assert len(encoded) <= 1 + MOST_WORDS + 2**MOST_REMOVED
    encoded.clear()
    assert of_fruit(route, text) == explained
    assert encoded == []


@pytest.mark.parametrize("length", [1, 20])
def test_what_is_left_of_an_agents_state_is_a_state(length: int) -> None:
    asked, found = 'Who said "calls: false"?\n\tAnna ' * length, "Anna's friend\u0001 Ruth did. " * length
    text = StepState(asked).after("search", found, failed=True).to_text()
    spans = word_spans(text, ["state"])
    said = " ".join(text[start:end] for start, end in spans)
    if length == 1:
        assert said == "Who said calls false Anna Anna's friend Ruth did search"
    assert len(spans) <= MOST_WORDS + 3
    for span in spans:
        left = StepState.from_text(without(text, [span]))
        assert left is not None
        assert left.failed
    assert StepState.from_text(without(text, spans)) == StepState.from_text(without(text, spans[::-1]))
    route = DifferentiableRoute(
        "state -> tool", tools=["search", "finish"], encoder=StepEncoder(bag_of_words, ["search"])
    )
    assert [word.word for word in route.explain(state=text).fields["tool"].words] == [text[slice(*s)] for s in spans]


def test_names_of_inputs_are_no_words() -> None:
    class Pick(dspy.Signature):
        place: str = dspy.InputField()
        request: str = dspy.InputField()
        fruit: Literal["apple", "banana"] = dspy.OutputField()

    explained = (
        DifferentiableRoute(Pick, encoder=bag_of_words).explain(place="Oslo", request="one apple").fields["fruit"]
    )
    assert [word.word for word in explained.words] == ["Oslo", "one", "apple"]
    assert word_spans("place: here") == [(0, 5), (7, 11)]
    assert without("a  b c", [(0, 1), (5, 6)]) == "b"


def test_texts_are_escaped_in_html(trained: DifferentiableRoute) -> None:
    html = trained.explain(request="<script>pie</script> & <b>")._repr_html_()
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;" in html
    route = DifferentiableRoute("request -> tool", tools={"<i>one": "<u>a", "two": "b"}, encoder=bag_of_words)
    html = route.explain(request="one <i>")._repr_html_()
    assert "<i>" not in html
    assert "<u>" not in html


def test_it_goes_to_json(trained: DifferentiableRoute) -> None:
    explanation: Explanation = trained.explain(request="pie please now a")
    state = json.loads(json.dumps(explanation.to_dict()))
    assert state["fields"]["fruit"]["option"] == "apple"
    assert state["fields"]["fruit"]["words"][0]["word"] == "pie"
    assert set(HINTS) == set(state["fields"]["fruit"]["likeliest"])
