"""Small programs and data that several tests use."""

import asyncio
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


class Order(dspy.Signature):
    """Take an order."""

    request: str = dspy.InputField()
    fruit: Literal["apple", "banana", "cherry"] = dspy.OutputField()
    size: Size = dspy.OutputField()


def order_route() -> DifferentiableRoute:
    """A route that decides two fields at once."""
    return DifferentiableRoute(Order, encoder=bag_of_words)


class Basket(dspy.Module):
    """Many calls of one route in a run, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.clerk = fruit_route()

    def texts(self, request: str) -> list[str]:
        return [f"{request} {word}" for word in ("first", "second", "third", "fourth")]

    def forward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(fruits=[self.clerk(request=text).fruit for text in self.texts(request)])


class ThreadedBasket(Basket):
    """The same calls in threads."""

    def forward(self, request: str) -> dspy.Prediction:
        pairs = [(self.clerk, {"request": text}) for text in self.texts(request)]
        found = dspy.Parallel(num_threads=4, disable_progress_bar=True)(pairs)
        return dspy.Prediction(fruits=[prediction.fruit for prediction in found])


class AsyncBasket(Basket):
    """The same calls in tasks."""

    async def aforward(self, request: str) -> dspy.Prediction:
        found = await asyncio.gather(*(self.clerk.acall(request=text) for text in self.texts(request)))
        return dspy.Prediction(fruits=[prediction.fruit for prediction in found])

    def forward(self, request: str) -> dspy.Prediction:
        return asyncio.run(self.aforward(request))


class Market(dspy.Module):
    """Routes in a list, in a dict and in a module of their own, and one that decides two fields."""

    def __init__(self) -> None:
        super().__init__()
        self.stalls = [fruit_route(), fruit_route()]
        self.carts = {"east": fruit_route()}
        self.shop = Shop()
        self.orders = order_route()

    def forward(self, request: str) -> dspy.Prediction:
        order = self.orders(request=request)
        callees = [*self.stalls, self.carts["east"], self.shop]
        return dspy.Prediction(
            fruits=[callee(request=request).fruit for callee in callees], order=(order.fruit, order.size)
        )


class Wrapping(dspy.Module):
    """Two decisions a run, the second on another text than the first; `right_order` is its metric."""

    def __init__(self) -> None:
        super().__init__()
        self.clerk = fruit_route()
        self.packer = DifferentiableRoute("parcel -> size: Literal['small', 'large']", encoder=bag_of_words)

    def forward(self, request: str) -> dspy.Prediction:
        fruit = self.clerk(request=request).fruit
        return dspy.Prediction(fruit=fruit, size=self.packer(parcel=f"wrapped {request}").size)


def orders(count: int, *, seed: int = 0) -> list[dspy.Example]:
    """Requests with a hidden right fruit and a hidden right size."""
    return [
        dspy.Example(
            request=f"{example.request} {'tiny' if number % 2 else 'huge'}",
            wanted=example.wanted,
            wanted_size="small" if number % 2 else "large",
        ).with_inputs("request")
        for number, example in enumerate(fruit_requests(count, seed=seed))
    ]


def right_order(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return prediction.fruit == example.wanted and prediction.size == example.wanted_size


def basket_route(**settings: object) -> DifferentiableRoute:
    """A route that decides any number of fruits."""
    return DifferentiableRoute("request -> fruits: list[str]", tools=FRUIT, encoder=bag_of_words, **settings)


def baskets(count: int, *, seed: int = 0, label: bool = False) -> list[dspy.Example]:
    """Requests for none, one or several fruits, which are `wanted`; with `label`, the route's output field as well."""
    random_ = random.Random(seed)
    examples = []
    for _ in range(count):
        wanted = [fruit for fruit in FRUIT if random_.random() < 0.4]
        said = [random_.choice(HINTS[fruit]) for fruit in wanted] + random_.sample(OTHER, 3)
        random_.shuffle(said)
        fields = {"request": " ".join(said), "wanted": wanted} | ({"fruits": wanted} if label else {})
        examples.append(dspy.Example(**fields).with_inputs("request"))
    return examples


def right_basket(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return prediction.fruits == example.wanted
