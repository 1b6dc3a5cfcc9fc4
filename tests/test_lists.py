"""Outputs that are lists of options: decided, declined, explained, changed, saved and overridden."""

import asyncio
import enum
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import dspy
import numpy as np
import pytest
import torch
from dspy.experimental import Choice

from dspy_router import (
    DecisionClient,
    DifferentiableRoute,
    RouteError,
    RouteFinetune,
    SentenceEncoder,
    record_decisions,
)
from dspy_router.feedback import read_feedback
from dspy_router.overrides import explore_decisions, force_decisions
from dspy_router.replace import replace_predictor
from dspy_router.shortlist import Shortlist
from dspy_router.synthesis import RequestWriter
from tests.conftest import bag_of_words
from tests.programs import FRUIT, basket_route, baskets, fruit_route, right_basket

TOPICS = "message -> topics: list[Literal['billing', 'refund', 'bug']]"


Two = Choice["a", "b"]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inspect(dspy.Signature):
    text: str = dspy.InputField()
    grades: list[Literal[1, 2, 3]] = dspy.OutputField()
    colors: list[Color] = dspy.OutputField()
    urgent: bool = dspy.OutputField()


@pytest.fixture(scope="module")
def trained() -> DifferentiableRoute:
    route: Any = RouteFinetune().compile(basket_route(), trainset=baskets(120, label=True))
    return route


def fruits(route: DifferentiableRoute, count: int = 60, seed: int = 7) -> list[list[str]]:
    return [route(request=example.request).fruits for example in baskets(count, seed=seed)]


def test_a_call_gives_a_list_and_a_probability_for_each_option() -> None:
    route = DifferentiableRoute(TOPICS, encoder=bag_of_words)
    prediction = route(message="a refund for a bug")
    assert prediction.topics == ["refund", "bug"]
    assert list(prediction.probabilities) == ["billing", "refund", "bug"]
    assert [name for name, chance in prediction.probabilities.items() if chance >= 0.5] == prediction.topics
    assert list(prediction.decisions) == ["topics[billing]", "topics[refund]", "topics[bug]"]
    decision = prediction.decisions["topics[refund]"]
    assert (decision.field, decision.name, decision.propensity) == ("topics[refund]", "True", 1.0)
    assert decision.probabilities == {
        "True": prediction.probabilities["refund"],
        "False": pytest.approx(1 - decision.confidence),
    }
    assert prediction.confidence == pytest.approx(math.prod(each.confidence for each in prediction.decisions.values()))
    assert "decision" not in prediction
    assert route(message="nothing of the kind").topics == []
    assert route(message=" ").topics == []


def test_values_are_typed_as_declared_beside_other_outputs() -> None:
    route = DifferentiableRoute(Inspect, encoder=bag_of_words)
    prediction = route(text="3 1 red blue")
    assert prediction.grades == [1, 3]
    assert prediction.colors == [Color.RED, Color.BLUE]
    assert isinstance(prediction.urgent, bool)
    assert len(prediction.decisions) == len(route.decision_fields) == 3 + 2 + 1
    assert "probabilities" not in prediction


def test_real_requests_need_several_tools_untrained(sentence_encoder: SentenceEncoder) -> None:
    def get_weather(city: str) -> None:
        """The weather forecast for a city."""

    def play_music(artist: str) -> None:
        """Play songs by an artist."""

    def book_table(place: str) -> None:
        """Book a table at a restaurant."""

    route = DifferentiableRoute(
        "request -> tools: list[str]", [get_weather, play_music, book_table], encoder=sentence_encoder
    )
    assert route(request="book a table and tell me whether it will rain").tools == ["get_weather", "book_table"]
    assert route(request="will it rain in Oslo?").tools == ["get_weather"]
    assert route(request="what is the square root of two?").tools == []


def test_batch_async_copies_and_threads_agree_with_a_call(trained: DifferentiableRoute) -> None:
    examples = baskets(20, seed=3)
    one_by_one = [trained(request=example.request).fruits for example in examples]
    assert [prediction.fruits for prediction in trained.batch(examples)] == one_by_one
    assert [prediction.fruits for prediction in trained.deepcopy().batch(examples)] == one_by_one

    async def gather() -> list[dspy.Prediction]:
        return await asyncio.gather(*(trained.acall(request=example.request) for example in examples))

    assert [prediction.fruits for prediction in asyncio.run(gather())] == one_by_one


def test_logits_are_those_decided_by_and_differentiable() -> None:
    route = basket_route()
    requests = [example.request for example in baskets(30)]
    logits = route.logits(requests)
    assert logits.shape == (30, 3)
    policy = route.head["fruits"].policy(route.encoder.encode(requests))
    assert np.allclose(torch.sigmoid(logits).detach().numpy(), policy, atol=1e-6)
    logits.sum().backward()
    assert route.head["fruits"].weight.grad is not None
    with pytest.raises(RouteError, match=r"decides \['fruits'\]"):
        route.logits(requests, field="fruits[apple]")


def test_candidates_are_the_only_ones_in_question(trained: DifferentiableRoute) -> None:
    request = "pie split stone"
    assert trained(request=request).fruits == FRUIT
    prediction = trained(request=request, candidates=["banana", "apple"])
    assert prediction.fruits == ["apple", "banana"]
    assert list(prediction.decisions) == ["fruits[apple]", "fruits[banana]"]
    assert prediction.probabilities["apple"] == pytest.approx(trained(request=request).probabilities["apple"])
    with pytest.raises(RouteError, match="'fig'"):
        trained(request=request, candidates=["fig"])
    with pytest.raises(RouteError, match="none to choose"):
        trained(request=request, candidates=[])


def test_top_k_ranks_by_the_chance_to_be_in_the_list(trained: DifferentiableRoute) -> None:
    ranked = trained.top_k(2, request="split now")
    assert next(iter(ranked)) == "banana"
    assert len(ranked) == 2


def test_explain_tells_why_each_option_is_in_the_list(trained: DifferentiableRoute) -> None:
    explanation = trained.explain(request="pie and a split")
    assert list(explanation.fields) == ["fruits[apple]", "fruits[banana]"]
    apple = explanation.fields["fruits[apple]"]
    assert (apple.option, apple.carrying[0].word, apple.change.removed) == ("True", "pie", ("pie",))
    assert "fruits[banana]: True" in str(explanation)
    assert "fruits[banana]: True" in explanation._repr_html_()
    nothing = trained.explain(request="please now")
    assert [each.option for each in nothing.fields.values()] == ["False"]


def test_tools_come_and_go() -> None:
    examples = baskets(120, label=True)
    for example in examples:  # what descriptions are worth must show
        example.request = " ".join([example.request, *example.fruits])
    route: Any = RouteFinetune().compile(basket_route(), trainset=examples)
    before = fruits(route)
    route.add_tools({"date": "sweet brown", "fig": "purple figs"})
    assert [[fruit for fruit in taken if fruit in FRUIT] for taken in fruits(route)] == before
    assert route(request="apple pie and a sweet brown date").fruits == ["apple", "date"]
    route.remove_tools(["date", "fig"])
    assert fruits(route) == before
    route.remove_tools(["apple", "banana"])
    assert route(request="cherry stone").fruits == ["cherry"]
    assert route(request="please").fruits == []
    with pytest.raises(RouteError, match="at least one"):
        route.remove_tools(["cherry"])
    with pytest.raises(RouteError, match="change the signature"):
        DifferentiableRoute(TOPICS, encoder=bag_of_words).add_tools(["date"])


def test_an_untrained_list_takes_new_tools_by_description() -> None:
    route = basket_route()
    route.add_tools({"date": "sweet brown"})
    assert route(request="sweet brown").fruits == ["date"]


def test_decisions_are_logged_and_rewarded_one_by_one(tmp_path: Path) -> None:
    route = basket_route()
    with record_decisions(tmp_path / "log.jsonl", program=route) as run:
        prediction = route(request="apple cherry")
    run.reward(1.0, decision=prediction.decisions["fruits[cherry]"].id)
    rows = read_feedback(tmp_path / "log.jsonl")
    assert [(row.route, row.field, row.candidates, row.chosen) for row in rows] == [
        ("self", f"fruits[{fruit}]", ("True", "False"), str(fruit in prediction.fruits)) for fruit in FRUIT
    ]
    assert [row.reward for row in rows] == [None, None, 1.0]


def test_decisions_can_be_made_from_outside() -> None:
    route = basket_route()
    with force_decisions({"fruits": ["cherry", "cherry"]}):
        assert route(request="apple").fruits == ["cherry"]
    with force_decisions({"fruits": []}):
        assert route(request="apple").fruits == []
    with force_decisions({"fruits[banana]": "True"}):
        assert "banana" in route(request="apple").fruits
    with force_decisions({"fruits": "apple"}), pytest.raises(RouteError, match="'apple' in place of a list"):
        route(request="apple")
    with force_decisions({"fruit": ["apple"]}), pytest.raises(RouteError, match=r"\['apple'\] is no option"):
        fruit_route()(request="apple")
    with force_decisions({"fruits": ["fig"]}), pytest.raises(RouteError, match="'fig' in 'fruits'"):
        route(request="apple")
    with explore_decisions(1.0, seed=0):
        drawn = [route(request="apple") for _ in range(60)]
    assert len({tuple(prediction.fruits) for prediction in drawn}) > 2
    assert all(0 < each.propensity < 1 for prediction in drawn for each in prediction.decisions.values())


class Planner(dspy.Module):
    def forward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(fruits=["cherry"], note="asked")


def test_a_guard_declines_lists_and_the_fallback_gives_them() -> None:
    route: Any = RouteFinetune().compile(basket_route(fallback=Planner()), trainset=baskets(120, label=True))
    calibration = baskets(300, seed=9)
    for number, example in enumerate(calibration):
        example.request += f" {number}"
    report = route.guard(calibration, metric=right_basket, risk=0.1)
    assert report.threshold is not None
    assert route.promise is not None
    kept = route(request="pie please now")
    assert (kept.fruits, kept.decisions["fruits[apple]"].abstained) == (["apple"], False)
    route.guard(calibration, metric=lambda example, prediction: False, risk=0.1)  # nothing can be promised
    declined = route(request="pie please now")
    assert (declined.fruits, declined.note) == (["cherry"], "asked")
    assert {name: (each.name, each.abstained) for name, each in declined.decisions.items()} == {
        "fruits[apple]": ("False", True), "fruits[banana]": ("False", True), "fruits[cherry]": ("True", True)
    }  # fmt: skip
    route.fallback = None
    assert route(request="pie please now").fruits is None


def test_a_score_is_the_log_probability_of_the_list(trained: DifferentiableRoute) -> None:
    prediction = trained(request="pie please")
    assert trained.score(["pie please"])[0] == pytest.approx(math.log(prediction.confidence), abs=1e-6)


def test_a_routed_predict_gives_the_list_to_its_lm(scripted_lm: Callable[..., Any]) -> None:
    planner = dspy.Predict("request -> fruits: list[Literal['apple', 'banana', 'cherry']], note: str")
    routed: Any = replace_predictor(planner, "self", keep_lm=True, encoder=bag_of_words)
    assert routed.predict.signature.signature == "request, fruits -> note"
    server = scripted_lm(lambda _: "[[ ## note ## ]]\nfresh\n\n[[ ## completed ## ]]")
    with dspy.context(lm=server.lm):
        prediction = routed(request="apple cherry")
    assert (prediction.fruits, prediction.note) == (["apple", "cherry"], "fresh")
    assert '["apple", "cherry"]' in server.requests[-1]


def test_lists_that_no_route_decides_stay_with_the_lm() -> None:
    planner = dspy.Predict("request -> fruit: Literal['apple', 'fig'], notes: list[str], sizes: list[int]")
    routed: Any = replace_predictor(planner, "self", keep_lm=True, encoder=bag_of_words)
    assert routed.predict.signature.signature == "request, fruit -> notes, sizes"


def test_a_shortlist_may_be_of_a_list() -> None:
    def apple(pie: str) -> str:
        """apple"""
        return pie

    def banana(split: str) -> str:
        """banana"""
        return split

    agent = dspy.ReAct("request -> answer", tools=[apple, banana])
    route = DifferentiableRoute("request -> tools: list[str]", tools=[apple, banana], encoder=bag_of_words)
    shortlist = Shortlist(agent, route, k=1)
    assert shortlist.tools_for(request="banana") == ("banana",)
    needs = dspy.Example(request="banana apple", tools=["apple", "banana"]).with_inputs("request")
    assert shortlist.recall([needs]).recall == {1: 0.0, 2: 1.0}


def test_what_cannot_serve_a_list_says_so() -> None:
    route = basket_route()
    with pytest.raises(RouteError, match=r"\['fruits'\] take lists.*Call the route itself"):
        route.as_lm()
    with pytest.raises(RouteError, match="'fruits' is a list: requests are written for one option"):
        RequestWriter(route)
    predictor = dspy.Predict(TOPICS)
    predictor.lm = DecisionClient(encoder=bag_of_words)
    with pytest.raises(RouteError, match=r"\['topics'\] take lists"):
        RouteFinetune().compile(predictor, trainset=[dspy.Example(message="x", topics=[]).with_inputs("message")])


@pytest.mark.parametrize(
    "annotation",
    [
        list[Two], list[bool], list[int], list, set[Literal["a", "b"]], tuple[Literal["a", "b"], ...],
        list[list[Literal["a", "b"]]], dict[str, Literal["a", "b"]], list[Two | None],
        list[Literal["a", "b"]] | None, list[Literal["a", "b"] | None],
    ],
    ids=str,
)  # fmt: skip
def test_other_collections_are_refused_by_name(annotation: Any) -> None:
    signature = dspy.Signature({"text": (str, dspy.InputField()), "kinds": (annotation, dspy.OutputField())}, "Decide.")
    with pytest.raises(RouteError, match=r"'kinds' has type .*list"):
        DifferentiableRoute(signature, encoder=bag_of_words)


def test_a_list_of_one_option_asks_whether_it_is_needed(sentence_encoder: SentenceEncoder) -> None:
    route = DifferentiableRoute(
        "request -> tools: list[str]", {"get_weather": "The weather forecast."}, encoder=sentence_encoder
    )
    assert route(request="will it rain tomorrow? I need the forecast").tools == ["get_weather"]
    assert route(request="play some jazz").tools == []


def test_saved_and_loaded_it_decides_the_same(trained: DifferentiableRoute, tmp_path: Path) -> None:
    for number, route in enumerate((basket_route(), trained)):
        path = tmp_path / f"{number}.json"
        route.save(path)
        fresh = basket_route()
        fresh.load(path)
        assert fruits(fresh) == fruits(route)
        assert fresh.learned.digest == route.learned.digest
        fresh.add_tools({"date": "sweet brown"})
        again = route.deepcopy()
        again.add_tools({"date": "sweet brown"})
        assert fresh.learned.digest == again.learned.digest


def test_a_list_and_a_choice_do_not_load_each_other(trained: DifferentiableRoute, tmp_path: Path) -> None:
    choice = DifferentiableRoute("request -> fruits", tools=FRUIT, encoder=bag_of_words)
    choice.save(tmp_path / "choice.json")
    trained.save(tmp_path / "list.json")
    with pytest.raises(RouteError, match="'fruits' as a list of options, this one as one option"):
        choice.load(tmp_path / "list.json")
    with pytest.raises(RouteError, match="'fruits' as one option, this one as a list of options"):
        basket_route().load(tmp_path / "choice.json")


def test_fifty_options_share_one_map_and_are_saved_in_one(tmp_path: Path) -> None:
    names = [f"tool {number}" for number in range(50)]
    route = DifferentiableRoute("request -> tools: list[str]", tools=names, encoder=bag_of_words)
    examples = [
        dspy.Example(request=f"tool {number % 50} please", tools=[names[number % 50]]).with_inputs("request")
        for number in range(100)
    ]
    compiled: Any = RouteFinetune().compile(route, trainset=examples)
    dimension = route.encoder.dimension
    assert sum(parameter.numel() for parameter in compiled.head.parameters()) == 50 * (dimension + 1) + dimension**2
    compiled.save(tmp_path / "route.json")
    assert json.loads((tmp_path / "route.json").read_text())["learned"]["fields"][0]["list"] is True


def test_an_optional_list_is_refused_in_either_spelling() -> None:
    with pytest.raises(RouteError, match=r"where no option fits, it is \[\]"):
        DifferentiableRoute("text -> kinds: Optional[list[Literal['a', 'b']]]", encoder=bag_of_words)
