"""A language model as planner beside a route, on the same requests with the same options and descriptions.

    python benchmarks/planner.py --lm openai/gpt-4.1-mini --log answers.jsonl
    python benchmarks/planner.py --lm openai/qwen2.5-coder-1.5b --api-base http://127.0.0.1:8080/v1 --adapter schema

The LM plans through `dspy.Predict`, whose instructions list each option with its description and arguments. The route
decides by the same descriptions, untrained, and on SNIPS and CLINC150 also after it has learned from a few labels an
option, as a user would train it; the LM is shown none. Ten of CLINC150's intents are drawn, names being all that is
known of them. On BFCL every request has functions of its own: nothing can be learned, and the route's time is then that
of reading them too, as the LM's is.

Each request is decided by both, in turns, so that both meet the same load of the machine. The route's encoder keeps
no cache here. An answer that cannot be parsed counts as wrong. With `--log`, a run that was killed resumes and asks
nothing twice: answers are found again by LM, adapter and prompt.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import dspy
import numpy as np
from answer_log import AnswerLog, key_of
from common import Row, print_table, quartiles, read, sample_per_label
from dspy.utils.exceptions import LMError
from paired import Interval, bootstrapped, compare_right, wilson
from quality import labelled
from tqdm.auto import tqdm
from unseen_options import requests as function_requests

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder
from dspy_router.costs import call_cost
from dspy_router.demo.assistant import TOOLS
from dspy_router.demo.lm_planner import AdapterName, ask, how_to_read, planner_lm
from dspy_router.options import parse_tools

INSTRUCTIONS = "Choose the tool that does what the user's request asks for."
OPTIONS_DRAWN = 10  # of CLINC150's intents


@dataclass(frozen=True)
class Question:
    """A request, the tools it may go to, and the right one's name."""

    request: str
    tools: tuple[Any, ...]
    answer: str


@dataclass(frozen=True)
class Task:
    """What is asked, and the labelled rows that a route may learn from, if there are any."""

    title: str
    questions: list[Question]
    labelled: list[Row]


@dataclass(frozen=True)
class Planned:
    """One request as the LM and the route decided it in turns; `tool` is None where no answer could be parsed."""

    tool: str | None
    seconds: float
    route_seconds: float
    calls: int
    prompt_tokens: int
    completion_tokens: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for and print the tables."""
    options = command_line().parse_args(arguments)
    encoder, log = SentenceEncoder(cache_size=0), AnswerLog(options.log)
    for name in [options.only] if options.only else TASKS:
        task = TASKS[name](options)
        report(task, options, *run(task, options, encoder, log))


def add_lm(parser: argparse.ArgumentParser) -> None:
    """The options by which an LM is reached."""
    parser.add_argument("--lm", required=True, help="a litellm name")
    parser.add_argument("--api-base", help="address of an OpenAI-compatible server")
    parser.add_argument("--api-key", help="key, where one is needed and the environment has none")
    parser.add_argument("--adapter", choices=get_args(AdapterName), default="json", help="default: %(default)s")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_lm(parser)
    parser.add_argument("--only", choices=TASKS, help="one data set")
    parser.add_argument("--requests", type=int, default=200, help="requests a data set (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=20, help="labels an option (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws requests, labels and intents")
    parser.add_argument("--log", type=Path, help="JSON lines file of the LM's answers, to resume from")
    return parser


def snips(options: argparse.Namespace) -> Task:
    test, train = labelled("snips", "test"), sample_per_label(labelled("snips", "train"), options.labels, options.seed)
    return Task(f"SNIPS, {len(TOOLS)} tools", questions(test, tuple(TOOLS), options), train)


def clinc150(options: argparse.Namespace) -> Task:
    train = read("clinc150", "train")
    intents = random.Random(options.seed).sample(sorted({row.label for row in train}), OPTIONS_DRAWN)
    test = [row for row in read("clinc150", "test") if row.label in intents]
    shown = sample_per_label([row for row in train if row.label in intents], options.labels, options.seed)
    return Task(f"CLINC150, {OPTIONS_DRAWN} intents drawn", questions(test, tuple(intents), options), shown)


def bfcl(options: argparse.Namespace) -> Task:
    rows = drawn(function_requests("live_multiple"), options)
    asked = [Question(row["text"], tuple(row["functions"]), row["answer"]) for row in rows]
    return Task("BFCL live_multiple, each request's own functions", asked, [])


TASKS = {"snips": snips, "clinc150": clinc150, "bfcl": bfcl}


def questions(rows: Sequence[Row], tools: tuple[Any, ...], options: argparse.Namespace) -> list[Question]:
    return [Question(row.text, tools, row.label) for row in drawn(rows, options)]


def drawn(rows: Sequence[Any], options: argparse.Namespace) -> list[Any]:
    """The first of the rows in an order of their own for the seed: more requests begin with those of fewer."""
    return random.Random(options.seed).sample(list(rows), len(rows))[: options.requests]


def signature(tools: tuple[Any, ...]) -> type[dspy.Signature]:
    """One signature for both: the LM reads of a tool what the route's encoder reads, under the tool's exact name."""
    options = parse_tools(tools)
    listing = "\n".join(f"- {replace(option, spoken=option.name).text}" for option in options)
    names = Literal[tuple(option.name for option in options)]
    fields = {"request": (str, dspy.InputField()), "tool": (names, dspy.OutputField())}
    return dspy.Signature(fields, f"{INSTRUCTIONS}\n\nTools:\n{listing}")


def routes(task: Task, options: argparse.Namespace, encoder: SentenceEncoder) -> dict[str, list[DifferentiableRoute]]:
    """The routes to compare, by name: for every question the one that decides it. The last is the one that is timed."""
    if not task.labelled:
        return {
            "route, by the descriptions": [
                DifferentiableRoute(signature(question.tools), question.tools, encoder=encoder)
                for question in task.questions
            ]
        }
    tools, count = task.questions[0].tools, len(task.questions)
    untrained = DifferentiableRoute(signature(tools), tools, encoder=encoder)
    trainset = [dspy.Example(request=row.text, tool=row.label).with_inputs("request") for row in task.labelled]
    trained = RouteFinetune().compile(untrained, trainset=trainset)
    name = f"route, {options.labels} labels an option"
    return {"route, by the descriptions": [untrained] * count, name: [trained] * count}


def run(
    task: Task, options: argparse.Namespace, encoder: SentenceEncoder, log: AnswerLog
) -> tuple[list[Planned], dict[str, list[str]]]:
    """What the LM and the routes choose for every question."""
    deciders = routes(task, options, encoder)
    (*_, timed) = deciders.values()
    timed[0].encoder.encode(["warm up"])
    planned = []
    with planner_lm(options.lm, adapter=options.adapter, api_base=options.api_base, api_key=options.api_key):
        turns = zip(task.questions, timed, strict=True)
        for number, (question, route) in enumerate(tqdm(turns, desc=task.title, unit="request", total=len(timed))):
            planner = dspy.Predict(signature(question.tools))
            names = [option.name for option in route.fields[0].options]
            key = key_of(options.lm, options.adapter, planner.signature.instructions, names, question.request)
            record = log.get(key)
            if record is None:
                try:
                    found = take_turns(planner, route, question.request, route_first=number % 2 == 1)
                except LMError as error:
                    raise SystemExit(
                        f"{options.lm} did not answer request {number + 1} of {task.title}: {error}\n"
                        "With --log, the same command goes on from here."
                    ) from error
                record = log.add(key, {"task": task.title, "request": question.request, **asdict(found)})
            planned.append(Planned(**{name: record[name] for name in Planned.__dataclass_fields__}))
    chosen = {
        name: [route(request=question.request).tool for question, route in zip(task.questions, each, strict=True)]
        for name, each in deciders.items()
    }
    return planned, chosen


def take_turns(planner: dspy.Predict, route: DifferentiableRoute, request: str, *, route_first: bool) -> Planned:
    """One request, decided by both."""

    def timed_route() -> float:
        started = time.perf_counter()
        route(request=request)
        return time.perf_counter() - started

    before = timed_route() if route_first else None
    answer = ask(planner, request=request)
    return Planned(
        tool=None if answer.prediction is None else answer.prediction.tool,
        seconds=answer.seconds,
        route_seconds=timed_route() if before is None else before,
        calls=answer.calls,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )


def report(task: Task, options: argparse.Namespace, planned: list[Planned], chosen: dict[str, list[str]]) -> None:
    """Print how often each is right and what it takes, then the routes against the LM, request by request."""
    count = len(planned)
    right = {name: marks(task, each) for name, each in chosen.items()}
    by_lm = marks(task, [plan.tool for plan in planned])
    of_lm, of_route = [plan.seconds for plan in planned], [plan.route_seconds for plan in planned]
    tokens = [fmean(getattr(plan, kind) for plan in planned) for kind in ("prompt_tokens", "completion_tokens")]
    prices = [call_cost(options.lm, plan.prompt_tokens, plan.completion_tokens) for plan in planned]
    timed = list(right)[-1]
    lines = [
        [
            options.lm,
            percent(wilson(sum(by_lm), count)),
            sum(plan.tool is None for plan in planned),
            spread(of_lm),
            f"{fmean(plan.calls for plan in planned):.2f}",
            " + ".join(f"{mean:,.0f}" for mean in tokens),
            f"{1e3 * fmean(prices):.3f}" if all(prices) else "unknown",
        ],
        *(
            [name, percent(wilson(sum(marked), count)), 0, spread(of_route) if name == timed else "", "0", "0", "0"]
            for name, marked in right.items()
        ),
    ]
    print_table(
        f"{task.title}: {count} requests, planned by {options.lm} ({options.adapter} adapter) and by routes",
        ("planner", "right, % (95 %)", "no answer", "s, median (quartiles)", "calls", "tokens in + out", "$ per 1,000"),
        lines,
    )
    pairs = {name: compare_right(marked, by_lm, seed=options.seed) for name, marked in right.items()}
    print_table(
        f"The same {count} requests in pairs, against {options.lm}",
        ("", "right, points more (95 %)", "alone right: it / the LM", "McNemar's p", "time, median ratio (95 %)"),
        [
            [
                name,
                percent(pair.difference, "+"),
                f"{pair.only_first} / {pair.only_second}",
                f"{pair.p_value:.2g}",
                times(bootstrapped(np.median, np.divide(of_lm, of_route), seed=options.seed)) if name == timed else "",
            ]
            for name, pair in pairs.items()
        ],
    )
    print(f"\n{how_to_read(options.lm)}")


def marks(task: Task, chosen: Sequence[str | None]) -> list[bool]:
    return [choice == question.answer for choice, question in zip(chosen, task.questions, strict=True)]


def percent(share: Interval, sign: str = "") -> str:
    return f"{100 * share.value:{sign}.1f} ({100 * share.low:{sign}.1f} to {100 * share.high:{sign}.1f})"


def times(ratio: Interval) -> str:
    return f"LM {ratio.value:,.0f} ({ratio.low:,.0f} to {ratio.high:,.0f}) times the route's"


def spread(seconds: Sequence[float]) -> str:
    low, middle, high = quartiles(seconds)
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


if __name__ == "__main__":
    main()
