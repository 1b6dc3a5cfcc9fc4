"""Tools added to a route, and taken away: nothing is trained, and the others decide as before."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune
from dspy_router.options import words
from tests.conftest import bag_of_words
from tests.programs import FRUIT, fruit_requests, fruit_route

NAMES = ["book_flight", "send_mail", "play_song", "read_news", "set_alarm", "cook_meal", "pay_bill", "find_hotel"]


def tool_requests(names: list[str], count: int, *, seed: int = 0) -> list[Any]:
    import random

    import dspy

    draws = random.Random(seed)
    filler = [f"w{number}" for number in range(40)]
    examples = []
    for number in range(count):
        name = names[number % len(names)]
        said = [draws.choice(words(name).split()), *draws.sample(filler, 3), f"{name}hint"]
        draws.shuffle(said)
        examples.append(dspy.Example(request=" ".join(said), tool=name).with_inputs("request"))
    return examples


@pytest.fixture(scope="module")
def trained() -> DifferentiableRoute:
    route = DifferentiableRoute("request -> tool", tools=NAMES[:6], encoder=bag_of_words)
    compiled: Any = RouteFinetune().compile(route, trainset=tool_requests(NAMES[:6], 300))
    return compiled


def logits(route: DifferentiableRoute, texts: list[str]) -> np.ndarray:
    return route.logits(texts).detach().numpy()


def test_an_added_tool_is_chosen_for_its_description_and_changes_no_other(trained: DifferentiableRoute) -> None:
    route = trained.deepcopy()
    texts = [example.request for example in tool_requests(NAMES[:6], 60, seed=1)]
    before = logits(route, texts)
    route.add_tools({"pay_bill": "Pay an invoice or a bill.", "find_hotel": "Find a hotel with a free room."})
    assert route.field("tool").option_names == tuple(NAMES)
    assert np.allclose(logits(route, texts)[:, :6], before, atol=1e-5)
    assert route(request="pay the invoice or bill").tool == "pay_bill"
    old = tool_requests(NAMES[:6], 60, seed=2)
    assert np.mean([route(request=example.request).tool == example.tool for example in old]) > 0.95
    assert route.learned.record.references["tool"].options == tuple(NAMES)
    assert trained.field("tool").option_names == tuple(NAMES[:6])


def test_removed_tools_are_not_chosen_any_more(trained: DifferentiableRoute) -> None:
    route = trained.deepcopy()
    texts = [example.request for example in tool_requests(NAMES[:6], 60, seed=1)]
    before = logits(route, texts)
    route.remove_tools(["send_mail", "read_news"])
    assert route.field("tool").option_names == ("book_flight", "play_song", "set_alarm", "cook_meal")
    assert np.allclose(logits(route, texts), before[:, [0, 2, 4, 5]], atol=1e-5)
    assert route(request="send mail now").tool in route.field("tool").option_names
    assert route.score(["send mail"]).shape == (1,)


def test_a_changed_route_is_saved_with_its_tools(trained: DifferentiableRoute, tmp_path: Path) -> None:
    route = trained.deepcopy()
    route.add_tools(["pay_bill"])
    route.remove_tools(["send_mail"])
    route.save(tmp_path / "route.json")
    tools = [name for name in NAMES[:7] if name != "send_mail"]
    fresh = DifferentiableRoute("request -> tool", tools=tools, encoder=bag_of_words)
    fresh.load(tmp_path / "route.json")
    texts = [example.request for example in tool_requests(tools, 40, seed=3)]
    assert np.array_equal(logits(fresh, texts), logits(route, texts))
    assert np.array_equal(fresh.score(texts), route.score(texts))
    fresh.add_tools(["find_hotel"])  # what it takes to compare new tools with trained ones was saved too
    again = route.deepcopy()
    again.add_tools(["find_hotel"])
    assert np.array_equal(logits(fresh, texts), logits(again, texts))


def test_a_changed_route_is_loaded_into_one_changed_likewise(trained: DifferentiableRoute, tmp_path: Path) -> None:
    route = trained.deepcopy()
    route.add_tools(["pay_bill"])
    route.save(tmp_path / "route.json")
    fresh = DifferentiableRoute("request -> tool", tools=NAMES[:6], encoder=bag_of_words)
    with pytest.raises(RouteError, match=r"option 7 was 'pay_bill', here it is nothing.* again before load\(\.\.\.\)"):
        fresh.load(tmp_path / "route.json")
    fresh.add_tools(["pay_bill"])
    fresh.load(tmp_path / "route.json")
    texts = [example.request for example in tool_requests(NAMES[:7], 40, seed=3)]
    assert np.array_equal(logits(fresh, texts), logits(route, texts))


def test_an_untrained_route_takes_tools_by_their_descriptions() -> None:
    route = fruit_route()
    route.add_tools({"date": "A sweet brown fruit."})
    assert route(request="a sweet brown date").fruit == "date"
    assert route.promise is None


def test_a_guard_promises_nothing_of_other_tools() -> None:
    route: Any = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(300, label=True))
    examples = fruit_requests(400, seed=5)
    for number, example in enumerate(examples):
        example.request += f" {number}"
    route.guard(examples, metric=lambda example, prediction: prediction.fruit == example.wanted, risk=0.05)
    assert route.promise is not None
    route.add_tools(["date"])
    assert route.promise is None


def test_top_k_ranks_and_decides_nothing(trained: DifferentiableRoute) -> None:
    ranked = trained.top_k(3, request="book a flight")
    assert len(ranked) == 3
    assert next(iter(ranked)) == "book_flight"
    assert list(ranked.values()) == sorted(ranked.values(), reverse=True)
    assert set(trained.top_k(9, request="book a flight", candidates=["pay", "x"][:0] or NAMES[:2])) == set(NAMES[:2])
    with pytest.raises(RouteError, match="k=0"):
        trained.top_k(0, request="book a flight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda route: route.add_tools(["apple"]), "two options named 'apple'"),
        (lambda route: route.add_tools([]), "tools is empty"),
        (lambda route: route.remove_tools(["fig"]), r"\['fig'\] are no tools"),
        (lambda route: route.remove_tools(FRUIT[:2]), "would have 1 of 3 tools"),
        (lambda route: route.add_tools(["fig"], field="size"), "'size'"),
    ],
    ids=["twice", "none", "unknown", "too many", "field"],
)
def test_changes_that_cannot_be_made_are_named_and_change_nothing(change: Any, message: str) -> None:
    route = fruit_route()
    with pytest.raises(RouteError, match=message):
        change(route)
    assert route.field("fruit").option_names == tuple(FRUIT)


def test_a_literal_lists_its_options_itself() -> None:
    import dspy

    class Pick(dspy.Signature):
        request: str = dspy.InputField()
        fruit: Literal["apple", "fig"] = dspy.OutputField()

    with pytest.raises(RouteError, match="change the signature"):
        DifferentiableRoute(Pick, encoder=bag_of_words).add_tools(["date"])
