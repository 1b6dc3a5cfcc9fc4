"""A search-and-calculator program planned by an LLM, by `dspy.ReAct` and by a route: what each costs and gets right.

    python benchmarks/article.py [--lm MODEL [--api-base URL]] [--price-as gpt-4o-mini] [--picture context_growth.png]

Without `--lm`, a server on loopback answers as a planner that makes no mistake, so quality is the route's alone and
seconds are the programs' own. Tokens are counted from the prompts as they were sent, with litellm's tokenizer, and
priced as those of `--price-as`. The route has learned from the plans of tasks with other names.

The second table and the picture follow a trail of one to ten pages, with the same tool and the same plans for
`dspy.ReAct` and for the route.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy
import litellm
from agent_tasks import Answer, Task, World, planned_steps, right, routed_agent, world
from common import print_table, quartiles
from scripted_lm import scripted_lm
from tqdm.auto import tqdm

from dspy_router import RoutedAgent, RouteFinetune
from dspy_router.agent import Progress
from dspy_router.costs import call_cost

TASKS, TRAINING_TASKS, STEPS = 40, 120, 6
DEPTHS = range(1, 11)


class Planned(dspy.Module):
    """The program as it is usually written: an LLM plans each call and writes its input, then answers."""

    def __init__(self, tools: Sequence[Callable[..., str]]) -> None:
        super().__init__()
        self.tools = {tool.__name__: tool for tool in tools}
        told = "; ".join(f"{name}: {tool.__doc__}" for name, tool in self.tools.items())
        self.planner = dspy.Predict(
            dspy.Signature(
                {
                    "question": (str, dspy.InputField()),
                    "results": (str, dspy.InputField(desc="what the tools gave so far")),
                    "next_tool": (Literal[(*self.tools, "finish")], dspy.OutputField()),
                    "tool_input": (str, dspy.OutputField(desc="empty for finish")),
                },
                f"Choose the tool to call next, or finish if the results answer the question. {told}",
            )
        )
        self.answer = dspy.Predict(Answer.append("results", dspy.InputField(), type_=str))

    def forward(self, question: str) -> dspy.Prediction:
        """Plan, call, and answer."""
        results = ""
        for _ in range(STEPS):
            plan = self.planner(question=question, results=results)
            if plan.next_tool == "finish":
                break
            try:
                result = self.tools[plan.next_tool](plan.tool_input)
            except Exception as error:
                result = str(error)
            results += f"{plan.next_tool}({plan.tool_input}): {result}\n"
        return self.answer(question=question, results=results)


@dataclass(frozen=True)
class Run:
    """What one run of a program took.

    Attributes:
        prompts: Tokens of each LM call's prompt.
        written: Tokens that the LM wrote.
        seconds: Of the whole run.
        right: Whether the answer was.
        results: Tokens of the results in the last prompt, where they are an input of their own.
    """

    prompts: tuple[int, ...]
    written: int
    seconds: float
    right: bool
    results: int


def main() -> None:
    """Print both tables and draw the picture."""
    arguments = _arguments()
    tasks = world(seed=0, tasks=TASKS)
    followed = trails(seed=0)
    with planner_lm(arguments, [*tasks.tasks, *followed.tasks]) as lm:
        print_table(
            f"{TASKS} search-and-calculator tasks of 1 to 3 calls, {lm.model}, priced as {arguments.price_as}",
            (
                "planned by",
                "LM calls",
                "tokens in",
                "tokens out",
                "$ per 1,000",
                "seconds: median (quartiles)",
                "right, %",
            ),
            [programs_row(*entry, tasks, lm, arguments.price_as) for entry in programs(tasks).items()],
        )
        growth = context_growth(followed, lm, arguments.price_as)
    print_table(
        "One trail of so many calls: prompt tokens of the whole run, and of its last prompt",
        ("calls", "ReAct: LM calls", "all", "last", "route: LM calls", "all", "last", "less results", "route / ReAct"),
        [
            [str(depth), str(len(react.prompts)), str(sum(react.prompts)), str(react.prompts[-1]),
             str(len(routed.prompts)), str(sum(routed.prompts)), str(routed.prompts[-1]),
             str(routed.prompts[-1] - routed.results), f"{sum(routed.prompts) / sum(react.prompts):.3f}"]
            for depth, (react, routed) in zip(DEPTHS, growth, strict=True)
        ],
    )  # fmt: skip
    draw(growth, arguments.picture)


def programs(tasks: World) -> dict[str, dspy.Module]:
    """The same program three times, by who plans it."""
    training = world(seed=1, tasks=TRAINING_TASKS)
    return {
        "an LLM, dspy.Predict": Planned(tasks.tools),
        "an LLM, dspy.ReAct": dspy.ReAct(Answer, tasks.tools, max_iters=STEPS),
        "a route, untrained": routed_agent(tasks),
        "a route": trained(routed_agent(tasks), training),
    }


def trained(agent: RoutedAgent, training: World) -> RoutedAgent:
    """The agent, taught by the plans of the training tasks."""
    return RouteFinetune().compile(agent, feedback=planned_steps(training.tasks))  # type: ignore[return-value]


def programs_row(name: str, program: dspy.Module, tasks: World, lm: dspy.LM, model: str) -> list[str]:
    """One program's line of the first table."""
    runs = [measured(program, task, lm, model) for task in tqdm(tasks.tasks, desc=name, unit="task", delay=2)]
    read, written = fmean(sum(run.prompts) for run in runs), fmean(run.written for run in runs)
    price = call_cost(model, round(1000 * read), round(1000 * written))
    low, middle, high = quartiles([run.seconds for run in runs])
    return [
        name,
        f"{fmean(len(run.prompts) for run in runs):.2f}",
        f"{read:.0f}",
        f"{written:.0f}",
        "unknown" if price is None else f"{price:.3f}",
        f"{middle:.3f} ({low:.3f}-{high:.3f})",
        f"{100 * fmean(run.right for run in runs):.1f}",
    ]


def measured(program: dspy.Module, task: Task, lm: dspy.LM, model: str) -> Run:
    """Run a program on a task and count what went to the LM and came back; a run that raises is wrong."""
    lm.history.clear()
    with dspy.context(lm=lm, trace=[]):
        started = time.perf_counter()
        try:
            prediction = program(**task.example.inputs())
        except Exception as error:
            prediction = dspy.Prediction(answer=f"none: {type(error).__name__}")
        seconds = time.perf_counter() - started
        results = dspy.settings.trace[-1][1].get("results", "") if dspy.settings.trace else ""
    return Run(
        prompts=tuple(litellm.token_counter(model=model, messages=entry["messages"]) for entry in lm.history),
        written=sum(litellm.token_counter(model=model, text=text) for entry in lm.history for text in entry["outputs"]),
        seconds=seconds,
        right=right(task.example, prediction),
        results=litellm.token_counter(model=model, text=results) if results else 0,
    )


def trails(*, seed: int) -> World:
    """Trails of one to ten pages, each of which names the next, and the tasks to follow them."""
    pages: dict[str, str] = {}
    tasks = []
    for depth in DEPTHS:
        places = [f"Stone{chr(ord('A') + step)}{10 * seed + depth}" for step in range(depth)]
        treasure = str(100 * seed + 7 * depth)
        own = {place: f"The trail leads on to {after}." for place, after in pairwise(places)}
        own[places[-1]] = f"The trail ends here, with treasure number {treasure}."
        question = f"Which number has the treasure at the end of the trail that begins at {places[0]}?"
        queries = [question, *(own[place] for place in places[:-1])]
        plan = tuple(("search", {"query": query}) for query in queries)
        tasks.append(Task(question, treasure, plan, tuple(own.values())))
        pages |= own
    return World(pages, tuple(tasks))


def context_growth(tasks: World, lm: dspy.LM, model: str) -> list[tuple[Run, Run]]:
    """For each trail the run of `dspy.ReAct` and of a route that has learned from other trails."""
    steps = max(DEPTHS) + 1
    react = dspy.ReAct(Answer, tasks.tools, max_iters=steps)

    def next_page(progress: Progress) -> dict[str, str]:
        return {"query": progress.results[-1].text if progress.results else progress.request}

    sources = {"search": next_page, "calculator": "lm"}
    agent = trained(RoutedAgent(Answer, tasks.tools, max_iters=steps, args=sources), trails(seed=1))
    return [(measured(react, task, lm, model), measured(agent, task, lm, model)) for task in tasks.tasks]


def draw(growth: Sequence[tuple[Run, Run]], path: str) -> None:
    """Prompt tokens by depth, of whole runs and of their longest prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for axis, title, tokens in zip(
        axes, ("all prompts of a run", "the longest prompt of a run"), (sum, max), strict=True
    ):
        for name, side in (("dspy.ReAct", 0), ("RoutedAgent", 1)):
            axis.plot(list(DEPTHS), [tokens(run[side].prompts) for run in growth], marker="o", label=name)
        axis.set(title=title, xlabel="tool calls", ylabel="tokens", ylim=(0, None), xticks=list(DEPTHS))
        axis.legend()
    figure.savefig(path, dpi=150)
    print(f"\nThe picture is in {path}.")


@contextmanager
def planner_lm(arguments: argparse.Namespace, tasks: Sequence[Task]) -> Iterator[dspy.LM]:
    """The LM that was asked for, or the scripted one."""
    if arguments.lm:
        key = {"api_key": os.environ.get("OPENAI_API_KEY", "none")} if arguments.api_base else {}
        yield dspy.LM(
            arguments.lm, api_base=arguments.api_base, temperature=0.0, max_tokens=500, cache=False, **key
        )  # fmt: skip
        return
    with scripted_lm(tasks) as lm:
        yield lm


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", help="any litellm model, in place of the scripted one")
    parser.add_argument("--api-base")
    parser.add_argument("--price-as", default="gpt-4o-mini", help="the model whose tokenizer and prices count")
    parser.add_argument("--picture", default="context_growth.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
