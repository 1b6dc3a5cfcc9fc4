"""`dspy.ReAct` and `RoutedAgent` on the same search-and-calculator tasks, with the same tools and the same LM.

    python benchmarks/agents.py --lm openai/qwen2.5-coder-1.5b --api-base http://127.0.0.1:8080/v1 --log agents.jsonl

Every task is run by both, in turns. An answer is right if it holds the number the task asks for; no answer, or one
that cannot be parsed, is wrong. Calls and tokens are those of the whole run, as the server counts them. With `--log`,
a run that was killed resumes and makes no run twice.

How long it takes: with a 1.5B model on one core of a busy machine a run of ReAct took 104 seconds at the median, since
it often goes on to the last step, and one of RoutedAgent 8. Forty tasks are then an hour and a quarter, `--tasks 15`
half an hour.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import dspy
from agent_tasks import Answer, planned_steps, right, routed_agent, world
from answer_log import AnswerLog, key_of
from common import print_table, quartiles
from dspy.utils.exceptions import LMError
from paired import compare_right, ratio_of_totals, wilson
from planner import add_lm, percent
from tqdm.auto import tqdm

from dspy_router import RouteFinetune
from dspy_router.agent import AgentError
from dspy_router.demo.lm_planner import ask, how_to_read, planner_lm

Metric = Callable[[dspy.Example, dspy.Prediction], bool]
COUNTED = ("seconds", "calls", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class AgentRun:
    """One task run by one agent.

    Attributes:
        hops: Tools that the task takes.
        tools: Names of the tools that were called, in order.
        answered: Whether there was an answer that could be read.
        right: Whether it is the right one.
        seconds: Wall-clock time.
        calls: LM calls.
        prompt_tokens: Over all calls.
        completion_tokens: Over all calls.
    """

    hops: int
    tools: list[str]
    answered: bool
    right: bool
    seconds: float
    calls: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """In and out."""
        return self.prompt_tokens + self.completion_tokens


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the route, run both agents on the tasks and print the tables."""
    options = command_line().parse_args(arguments)
    test, training = world(seed=0, tasks=options.tasks), world(seed=1, tasks=options.training_tasks)
    routed = RouteFinetune().compile(routed_agent(test), feedback=planned_steps(training.tasks))
    react = dspy.ReAct(Answer, test.tools, max_iters=routed.max_iters)
    tasks = [task.example.copy(tools=[tool for tool, _ in task.plan]) for task in test.tasks]
    print(f"RoutedAgent's route has learned from the plans of {options.training_tasks} tasks with other names.")
    agents = {"dspy.ReAct": react, "RoutedAgent": lambda **inputs: unwrapped(routed, **inputs)}
    report(run(agents, tasks, right, AnswerLog(options.log), options), options)


def unwrapped(agent: dspy.Module, **inputs: Any) -> dspy.Prediction:
    """The agent's answer, or the error of the LM call that stopped it, as ReAct raises it."""
    try:
        return agent(**inputs)
    except AgentError as error:
        raise error.__cause__ or error from error


def run(
    agents: Mapping[str, Callable[..., dspy.Prediction]],
    tasks: Sequence[dspy.Example],
    metric: Metric,
    log: AnswerLog,
    options: argparse.Namespace,
) -> dict[str, list[AgentRun]]:
    """Every task by every agent, in turns; which agent begins alternates."""
    runs: dict[str, list[AgentRun]] = {name: [] for name in agents}
    with planner_lm(options.lm, adapter=options.adapter, api_base=options.api_base, api_key=options.api_key):
        for number, task in enumerate(tqdm(tasks, desc="agents", unit="task")):
            for name in sorted(agents, reverse=number % 2 == 1):
                key = key_of(options.lm, options.adapter, name, dict(task.inputs()))
                record = log.get(key)
                if record is None:
                    try:
                        record = log.add(key, {"agent": name, **asdict(run_once(agents[name], task, metric))})
                    except LMError as error:
                        raise SystemExit(
                            f"{options.lm} did not answer {name} in task {number + 1}: {error}\n"
                            "With --log, the same command goes on from here."
                        ) from error
                runs[name].append(AgentRun(**{field: record[field] for field in AgentRun.__dataclass_fields__}))
    return runs


def run_once(agent: Callable[..., dspy.Prediction], task: dspy.Example, metric: Metric) -> AgentRun:
    """One run and what it took."""
    answer = ask(agent, **task.inputs())
    prediction = answer.prediction
    called = {} if prediction is None else prediction.trajectory
    return AgentRun(
        hops=len(task.tools),
        tools=[name for key, name in called.items() if key.startswith("tool_name_")],
        answered=prediction is not None,
        right=prediction is not None and metric(task, prediction),
        **{name: getattr(answer, name) for name in COUNTED},
    )


def report(runs: Mapping[str, list[AgentRun]], options: argparse.Namespace) -> None:
    """Print what each agent reaches and takes, by hops too, then the second against the first, task by task."""
    first, second = runs
    count = len(runs[first])
    print_table(
        f"{count} tasks, LM {options.lm} ({options.adapter} adapter)",
        ("agent", "right, % (95 %)", "no answer", "LM calls", "tokens in + out", "s, median (quartiles)"),
        [[name, *line(of_agent)] for name, of_agent in runs.items()],
    )
    hops = sorted({each.hops for each in runs[first]})
    print_table(
        f"The same by the tools a task takes, LM {options.lm}",
        ("tools", "agent", "right", "LM calls", "tokens"),
        [
            [depth, name, f"{sum(e.right for e in part)} of {len(part)}", f"{fmean(e.calls for e in part):.1f}",
             f"{fmean(e.tokens for e in part):,.0f}"]
            for depth in hops
            for name, of_agent in runs.items()
            for part in [[each for each in of_agent if each.hops == depth]]
        ],
    )  # fmt: skip
    pair = compare_right([each.right for each in runs[second]], [each.right for each in runs[first]])
    ratios = [
        ratio_of_totals([getattr(each, what) for each in runs[second]], [getattr(each, what) for each in runs[first]])
        for what in ("calls", "tokens", "seconds")
    ]
    print_table(
        f"{second} against {first}, the same {count} tasks in pairs, LM {options.lm}",
        ("right, points more (95 %)", "alone right", "McNemar's p", "LM calls, ratio (95 %)", "tokens", "seconds"),
        [[
            percent(pair.difference, "+"),
            f"{pair.only_first} / {pair.only_second}",
            f"{pair.p_value:.2g}",
            *(f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in ratios),
        ]],
    )  # fmt: skip
    print(f"\n{how_to_read(options.lm)}")


def line(runs: Sequence[AgentRun]) -> list[Any]:
    low, middle, high = quartiles([each.seconds for each in runs])
    return [
        percent(wilson(sum(each.right for each in runs), len(runs))),
        sum(not each.answered for each in runs),
        f"{fmean(each.calls for each in runs):.1f}",
        f"{fmean(each.prompt_tokens for each in runs):,.0f} + {fmean(each.completion_tokens for each in runs):,.0f}",
        f"{middle:.3g} ({low:.3g}-{high:.3g})",
    ]


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_lm(parser)
    parser.add_argument("--tasks", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--training-tasks", type=int, default=120, help="with other names (default: %(default)s)")
    parser.add_argument("--log", type=Path, help="JSON lines file of the runs, to resume from")
    return parser


if __name__ == "__main__":
    main()
