"""Small programs and data that several tests use."""

import random
from typing import Literal

import dspy

from dspy_router import DifferentiableRoute
from tests.conftest import bag_of_words

FRUIT = ["apple", "banana", "cherry"]
OTHER = ["please", "now", "a", "the", "fresh", "ripe", "for", "me"]
# The words by which a request gives its fruit away; no description says them, so they must be learned.
HINTS = {"apple": ["pie", "cider"], "banana": ["split", "peel"], "cherry": ["stone", "blossom"]}


def fruit_route(**settings: object) -> DifferentiableRoute:
    return DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=bag_of_words, **settings)


def fruit_requests(count: int, *, seed: int = 0, label: bool = False) -> list[dspy.Example]:
    """Requests with a hidden right fruit, `wanted`; with `label`, the route's own output field as well."""
    random_ = random.Random(seed)
    examples = []
    for number in range(count):
        fruit = FRUIT[number % len(FRUIT)]
        said = [*random_.sample(HINTS[fruit], 1), *random_.sample(OTHER, 3)]
        fields = {"request": " ".join(said), "wanted": fruit} | ({"fruit": fruit} if label else {})
        examples.append(dspy.Example(**fields).with_inputs("request"))
    return examples


def right_fruit(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return prediction.fruit == example.wanted


class Shop(dspy.Module):
    """A program around a route: it reads the request, and serves what the route chose."""

    def __init__(self, route: dspy.Module | None = None) -> None:
        super().__init__()
        self.clerk = route or fruit_route()

    def forward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(fruit=self.clerk(request=request).fruit)


class PlannedShop(dspy.Module):
    """The same with an LM planner."""

    def __init__(self) -> None:
        super().__init__()
        self.clerk = dspy.Predict(dspy.Signature("request -> fruit: Literal['apple', 'banana', 'cherry']"))

    def forward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(fruit=self.clerk(request=request).fruit)


def fruit_of(text: str) -> str:
    """The fruit that a prompt's request hints at, for scripted planners."""
    request = text.split("[[ ## request ## ]]")[-1]
    return next(fruit for fruit, hints in HINTS.items() if any(hint in request.split() for hint in hints))


Size = Literal["small", "large"]
