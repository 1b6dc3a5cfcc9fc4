"""Search-and-calculator tasks of one to three calls over a made-up encyclopedia, with exact answers.

Two worlds are made from different names, so that nothing of the test tasks is seen in training: `world(seed=0)` and
`world(seed=1)`. Both ask in the same ways, so a route need only learn what an answer takes, not the facts.
"""

import ast
import operator
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import dspy

from dspy_router import RoutedAgent
from dspy_router.agent import Progress, StepState
from dspy_router.agent.imitation import Episode, Step, imitation_rows
from dspy_router.feedback import Feedback

Plan = tuple[tuple[str, dict[str, str]], ...]


class Answer(dspy.Signature):
    """Answer the question with a number or a name alone."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField(desc="a number or a name")


@dataclass(frozen=True)
class Task:
    """A question, its exact answer, and the calls by which an ideal planner finds it, with their results."""

    question: str
    answer: str
    plan: Plan
    results: tuple[str, ...]

    @property
    def example(self) -> dspy.Example:
        """The task for DSPy."""
        return dspy.Example(question=self.question, wanted=self.answer).with_inputs("question")


@dataclass(frozen=True)
class World:
    """The pages of an encyclopedia by title, and tasks about them."""

    pages: Mapping[str, str]
    tasks: tuple[Task, ...]

    def search(self, query: str) -> str:
        """Look up the encyclopedia's page on whatever the query names: a country, a city, a company or a person."""
        found = [title for title in self.pages if re.search(rf"\b{title}\b", query)]
        return self.pages[min(found, key=query.index)] if found else "The encyclopedia has no page on that."

    @property
    def tools(self) -> list[Callable[..., str]]:
        """The two tools of every program."""
        return [self.search, calculator]


def calculator(expression: str) -> str:
    """Work out a sum written with + - * / and brackets."""
    return f"{_value(ast.parse(expression.replace(',', '').strip(), mode='eval').body):.12g}"


def next_query(progress: Progress) -> dict[str, str]:
    """What a search is for: what the question names, then the capital or founder that the last page names."""
    named = re.search(r"(?:Capital|Founder): (\w+)", progress.results[-1].text) if progress.results else None
    return {"query": named.group(1) if named else progress.request}


def routed_agent(world: World, **settings: object) -> RoutedAgent:
    """The agent that a developer would write: searches need no LM, sums are written by one."""
    return RoutedAgent(Answer, world.tools, max_iters=6, args={"search": next_query, "calculator": "lm"}, **settings)


def planned_steps(tasks: Iterable[Task]) -> list[Feedback]:
    """What the tasks' plans say of each step: rows to learn from."""
    episodes = []
    for number, task in enumerate(tasks):
        state, steps = StepState(task.question), []
        for (tool, _), result in zip(task.plan, task.results, strict=True):
            steps.append(Step(state, tool))
            state = state.after(tool, result)
        episodes.append(Episode(str(number), str(number), 1.0, (*steps, Step(state, "finish"))))
    return imitation_rows(episodes, candidates=("search", "calculator", "finish"))


def right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the answer is right: its last number, or the name somewhere in it."""
    answer, wanted = str(prediction.answer), example.wanted
    if not wanted[0].isdigit():
        return wanted.lower() in answer.lower()
    numbers = re.findall(r"\d+(?:\.\d+)?", answer.replace(",", ""))
    return bool(numbers) and float(numbers[-1]) == float(wanted)


def world(*, seed: int, tasks: int) -> World:
    """An encyclopedia and that many tasks, the kinds of `KINDS` in turn."""
    generator = random.Random(seed)
    names = _names(generator, seed)
    pages: dict[str, str] = {}
    made = []
    for number in range(tasks):
        facts = _Facts(generator, names, pages)
        question, plan = KINDS[number % len(KINDS)](facts)
        results = []
        for tool, arguments in plan:
            results.append((calculator if tool == "calculator" else World(pages, ()).search)(**arguments))
        answer = results[-1] if plan[-1][0] == "calculator" else facts.asked
        made.append(Task(question, answer, plan, tuple(results)))
    return World(pages, tuple(made))


class _Facts:
    """Pages of a country, its capital, a company and its founder, written as they are asked for."""

    def __init__(self, generator: random.Random, names: list[str], pages: dict[str, str]) -> None:
        self.draw = generator
        self.country, self.city, self.company, self.person = (names.pop() for _ in range(4))
        self.people = 12 * generator.randint(500, 9_000)
        self.founded = generator.randint(1100, 1890)
        self.staff = 12 * generator.randint(5, 400)
        self.born = generator.randint(1900, 1945)
        self.asked = ""
        area = generator.randint(9, 99) * 10
        pages[self.country] = f"{self.country} is a country on the coast. Capital: {self.city}. Area: {area} km2."
        pages[self.city] = f"{self.city} is a city on a river. Founded in {self.founded}. Inhabitants: {self.people}."
        lamps = f"{self.company} is a company that makes lamps."
        pages[self.company] = f"{lamps} Founder: {self.person}. Employees: {self.staff}."
        pages[self.person] = f"{self.person} is an engineer. Born in {self.born}. Children: {generator.randint(1, 6)}."
        self.pages = pages

    def say(self, *wordings: str) -> str:
        """One of the ways to ask."""
        return self.draw.choice(wordings)

    def look_up(self, question: str, asked: object, *, through: str | None = None) -> tuple[str, Plan]:
        """A question that one page answers, or the page of what the first one names."""
        self.asked = str(asked)
        plan: Plan = (("search", {"query": question}),)
        if through is not None:
            plan += (("search", {"query": through}),)
        return question, plan

    def work_out(self, question: str, expression: str, *, through: str | None = None) -> tuple[str, Plan]:
        """A question that takes a sum after the look-up."""
        _, plan = self.look_up(question, "", through=through)
        return question, (*plan, ("calculator", {"expression": expression}))


def _inhabitants(f: _Facts) -> tuple[str, Plan]:
    question = f.say(f"How many people live in {f.city}?", f"What is the population of {f.city}?")
    return f.look_up(question, f.people)


def _capitals_inhabitants(f: _Facts) -> tuple[str, Plan]:
    question = f.say(
        f"How many people live in the capital of {f.country}?", f"What is the population of {f.country}'s capital?"
    )
    return f.look_up(question, f.people, through=f.city)


def _share_of_capital(f: _Facts) -> tuple[str, Plan]:
    parts, word = f.draw.choice([(2, "half"), (3, "a third of"), (4, "a quarter of")])
    question = f.say(
        f"What is {word} the population of the capital of {f.country}?",
        f"How many people are {word} those who live in {f.country}'s capital?",
    )
    return f.work_out(question, f"{f.people} / {parts}", through=f.city)


def _founder(f: _Facts) -> tuple[str, Plan]:
    return f.look_up(f.say(f"Who founded {f.company}?", f"Who is the founder of {f.company}?"), f.person)


def _founders_birth(f: _Facts) -> tuple[str, Plan]:
    question = f.say(
        f"In which year was the founder of {f.company} born?", f"What is the birth year of {f.company}'s founder?"
    )
    return f.look_up(question, f.born, through=f.person)


def _founders_age(f: _Facts) -> tuple[str, Plan]:
    year = f.draw.randint(1950, 1990)
    question = f.say(
        f"How old was the founder of {f.company} in {year}?", f"What was the age of {f.company}'s founder in {year}?"
    )
    return f.work_out(question, f"{year} - {f.born}", through=f.person)


def _founded(f: _Facts) -> tuple[str, Plan]:
    question = f.say(f"When was {f.city} founded?", f"In which year was {f.city} founded?")
    return f.look_up(question, f.founded)


def _staff_multiplied(f: _Facts) -> tuple[str, Plan]:
    times = f.draw.randint(3, 9)
    question = f.say(
        f"What is {times} times the number of employees of {f.company}?",
        f"How many employees are {times} times as many as {f.company} has?",
    )
    return f.work_out(question, f"{f.staff} * {times}")


def _age(f: _Facts) -> tuple[str, Plan]:
    year = f.draw.randint(1950, 1990)
    question = f.say(f"How old was {f.person} in {year}?", f"What was the age of {f.person} in {year}?")
    return f.work_out(question, f"{year} - {f.born}")


def _sum(f: _Facts) -> tuple[str, Plan]:
    left, right_ = f.draw.randint(12, 99), f.draw.randint(12, 99)
    question = f.say(f"What is {left} times {right_}?", f"How much is {left} multiplied by {right_}?")
    return question, (("calculator", {"expression": f"{left} * {right_}"}),)


KINDS = (
    _inhabitants, _capitals_inhabitants, _share_of_capital, _founder, _founders_birth, _founders_age, _founded,
    _staff_multiplied, _age, _sum,
)  # fmt: skip

_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError(f"{ast.unparse(node)!r} is no arithmetic with + - * /.")


def _names(generator: random.Random, seed: int) -> list[str]:
    """Invented names; those of another seed begin with other letters."""
    starts = ["Va", "Os", "Lo", "Qui", "Sa", "Pi"] if seed % 2 == 0 else ["Be", "Tu", "Gra", "Ne", "Mo", "Do"]
    middles = ["dri", "tre", "mel", "no", "ran", "ki", "bu", "sto"]
    ends = ["a", "el", "ix", "or", "und", "ish", "em", "ak", "eth", "ono", "ur", "il"]
    names = [start + middle + end for start in starts for middle in middles for end in ends]
    generator.shuffle(names)
    return names
