"""A small world for agents: search and calculator, and requests in which the words say what is needed."""

import json
import random
import re
from collections.abc import Callable, Mapping

import dspy

from dspy_router import RoutedAgent
from dspy_router.agent import Progress
from tests.conftest import bag_of_words

PEOPLE = {"Ostrel": 480, "Vand": 1200, "Pim": 36, "Lorn": 750, "Quill": 90, "Sarn": 2000}


def search(query: str) -> str:
    """Look up how many people live in a town."""
    found = [f"{town} has {people} inhabitants." for town, people in PEOPLE.items() if town in query]
    return found[0] if found else "Nothing was found."


def calculator(expression: str) -> str:
    """Work out a sum."""
    left, right = expression.split("*")
    return str(int(left) * int(right))


def doubled(progress: Progress) -> dict[str, str] | None:
    """The calculator's argument: twice the number found last."""
    numbers = re.findall(r"\d+", progress.results[-1].text) if progress.results else []
    return {"expression": f"{numbers[0]} * 2"} if numbers else None


def town_agent(**settings: object) -> RoutedAgent:
    given = {"args": {"calculator": doubled}, "encoder": bag_of_words, "max_iters": 4} | settings
    return RoutedAgent("question -> answer", tools=[search, calculator], **given)


def town_requests(count: int, *, seed: int = 0) -> list[dspy.Example]:
    """Every second one asks for twice the number; that takes the calculator as well."""
    generator = random.Random(seed)
    examples = []
    for number in range(count):
        town = generator.choice(list(PEOPLE))
        twice = number % 2 == 1
        said = " ".join(generator.sample(["please", "now", "tell", "me", "exactly", "friend"], 2))
        examples.append(
            dspy.Example(
                question=f"{'double' if twice else 'plain'} count of {town} {said}",
                wanted=str(PEOPLE[town] * (2 if twice else 1)),
                tools=["search", "calculator"] if twice else ["search"],
            ).with_inputs("question")
        )
    return examples


def tools_of(prediction: dspy.Prediction) -> list[str]:
    trajectory = prediction.trajectory
    return [value for key, value in trajectory.items() if key.startswith("tool_name_")]


def right_answer(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return prediction.answer == example.wanted


def last_number(prompt: str) -> str:
    """An LM that answers with the last number among the results."""
    results = prompt.split("[[ ## results ## ]]")[-1].split("Respond with")[0]
    numbers = re.findall(r"\d+", results.rsplit(":", 1)[-1])
    return answers(answer=numbers[-1] if numbers else "unknown")(prompt)


def answers(**fields: object) -> Callable[[str], str]:
    """An LM that always writes these fields."""
    parts = [
        f"[[ ## {name} ## ]]\n{value if isinstance(value, str) else json.dumps(value)}"
        for name, value in fields.items()
    ]
    return lambda prompt: "\n\n".join([*parts, "[[ ## completed ## ]]"])


class InOrder:
    """Takes these options, one a step; use it with `dspy_router.decisions.choosing`."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.candidates: list[list[str]] = []

    def choose(
        self, route: object, field: str, probabilities: Mapping[str, float], selected: str
    ) -> tuple[int, float] | None:
        self.candidates.append(list(probabilities))
        return list(probabilities).index(self.names.pop(0)), 1.0
