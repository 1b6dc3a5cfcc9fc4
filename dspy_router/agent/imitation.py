"""From recorded runs of an agent to feedback that a route learns its steps from.

    episodes = [react_episode(agent.signature, example.inputs(), prediction, task="17", reward=1.0), ...]
    train, test = split_by_task(episodes, seed=0)
    trained = RouteFinetune().compile(program, feedback=imitation_rows(train, candidates=names))

Steps of one run, and runs of one task, resemble one another: what is measured on some of them after learning from the
others says little of a new task. So episodes are split by task, never by step.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.signatures.signature import ensure_signature

from dspy_router.agent.progress import Progress, ToolResult, as_text
from dspy_router.agent.state import StepState
from dspy_router.agent.tools import FINISH
from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback

SUBMIT = "submit"  # how dspy.ReActV2 finishes


@dataclass(frozen=True)
class Step:
    """What was chosen, and the state it was chosen in."""

    state: StepState
    chosen: str


@dataclass(frozen=True)
class Episode:
    """A recorded run.

    Attributes:
        task: What the run was about; episodes are split by it.
        run: Key of the run, different for each.
        reward: What the run earned, in [0, 1].
        steps: In order.

    Raises:
        RouteError: If the reward is outside [0, 1].
    """

    task: str
    run: str
    reward: float
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.reward <= 1:
            raise RouteError(f"The run {self.run!r} has reward {self.reward!r}; expected a number in [0, 1].")


def imitation_rows(
    episodes: Iterable[Episode],
    *,
    candidates: Sequence[str],
    field: str = "next_tool",
    route: str = "",
    failed: float = 0.5,
) -> list[Feedback]:
    """A teacher's row for every step, weighted by its run's reward r: failed + (1 - failed) · r.

    The rows of a task have it for their example, so that `RouteFinetune` calibrates on other tasks than it fits.

    A run may fail by one wrong step among many right ones. On tau-bench's airline dialogues, where six runs in ten
    failed, leaving those out costs 9 points on steps that call a tool (`benchmarks/tau_bench.py`); at half the weight
    nothing is lost.

    Args:
        episodes: Recorded runs.
        candidates: The route's options: the tools. `"finish"` is one of them where a step chose it.
        field: The output field that the route decides.
        route: The route's name in its program, if several decide such a field.
        failed: What a step counts whose run earned nothing, in [0, 1]; 1 weights no run. Rows without weight are left
            out.

    Raises:
        RouteError: If `failed` is outside [0, 1], or a step chose none of the candidates.

    Example:
        >>> steps = (Step(StepState("How far?"), "map"), Step(StepState("How far?").after("map", "12 km"), "finish"))
        >>> rows = imitation_rows([Episode("1", "1/0", 0.5, steps)], candidates=["map"], failed=0.2)
        >>> [(row.chosen, round(row.weight, 1)) for row in rows]
        [('map', 0.6), ('finish', 0.6)]
    """
    if not 0 <= failed <= 1:
        raise RouteError(f"failed={failed!r} is no weight of failed runs; give a number in [0, 1].")
    episodes, names = list(episodes), tuple(candidates)
    if FINISH not in names and any(step.chosen == FINISH for episode in episodes for step in episode.steps):
        names = (*names, FINISH)
    rows = []
    for episode in episodes:
        weight = failed + (1 - failed) * episode.reward
        for number, step in enumerate(episode.steps if weight else ()):
            if step.chosen not in names:
                raise RouteError(
                    f"Step {number} of the run {episode.run!r} chose {step.chosen!r}, which is no candidate: "
                    f"{list(names)}. Give the names of all tools."
                )
            rows.append(
                Feedback(
                    source="teacher",
                    example=episode.task,
                    route=route,
                    field=field,
                    text=step.state.to_text(),
                    candidates=names,
                    chosen=step.chosen,
                    propensity=None,
                    reward=episode.reward,
                    occurrence=number,
                    run=episode.run,
                    weight=weight,
                )
            )
    return rows


def split_by_task(
    episodes: Sequence[Episode], *, share: float = 0.2, seed: int = 0
) -> tuple[list[Episode], list[Episode]]:
    """Two parts of episodes that have no task in common: to learn from, and to test on.

    Args:
        episodes: Of at least two tasks.
        share: Of the tasks, in the second part; at least one task is in each.
        seed: Of the draw.

    Raises:
        RouteError: If there are fewer than two tasks, or the share is not in (0, 1).

    Example:
        >>> episodes = [Episode(task, f"{task}/{trial}", 1.0, ()) for task in "abcde" for trial in range(4)]
        >>> train, test = split_by_task(episodes)
        >>> len(train), len(test), {episode.task for episode in train} & {episode.task for episode in test}
        (16, 4, set())
    """
    tasks = sorted({episode.task for episode in episodes})
    if len(tasks) < 2 or not 0 < share < 1:
        raise RouteError(f"{len(tasks)} tasks and share={share!r}: expected at least two and a number in (0, 1).")
    count = min(max(round(share * len(tasks)), 1), len(tasks) - 1)
    tested = set(random.Random(seed).sample(tasks, count))
    return (
        [episode for episode in episodes if episode.task not in tested],
        [episode for episode in episodes if episode.task in tested],
    )


def react_episode(
    signature: str | type[dspy.Signature],
    inputs: Mapping[str, Any],
    prediction: Mapping[str, Any] | dspy.Prediction,
    *,
    task: str,
    reward: float | dspy.Prediction,
    run: str = "",
) -> Episode:
    """A run of `dspy.ReAct`, `dspy.ReActV2` or `RoutedAgent`, with the states that `RoutedAgent` would have been in.

    Calls that were made at once count as made one after another.

    Args:
        signature: The agent's.
        inputs: What it was called with.
        prediction: What it gave, or the same as a mapping: its `trajectory`, or of `dspy.ReActV2` its `history`.
        task: What the run was about.
        reward: What it earned, in [0, 1]: a number, a bool or a metric's prediction with `score`.
        run: Key of the run; by default the task, for tasks with one run each.

    Raises:
        RouteError: If the prediction has neither, or its trajectory was cut to fit a context window.
    """
    calls = _react_v2_calls(prediction["history"], inputs) if "history" in prediction else _react_calls(prediction)
    progress = Progress.start(ensure_signature(signature), dict(inputs))
    steps = []
    for name, arguments, value, failed in calls:
        finished = name in (FINISH, SUBMIT)
        steps.append(Step(progress.state, FINISH if finished else name))
        if finished:
            break
        progress = progress.after(ToolResult(name, arguments, value, as_text(value), failed))
    return Episode(task, run or task, float(reward), tuple(steps))


_Call = tuple[str, Mapping[str, Any], Any, bool]  # name, arguments, result, whether it failed


def _react_calls(prediction: Mapping[str, Any]) -> list[_Call]:
    if "trajectory" not in prediction:
        advice = ' A trajectory alone is given as {"trajectory": ...}.' if "tool_name_0" in prediction else ""
        raise RouteError(
            f"The prediction has neither a trajectory nor a history, only {list(prediction.keys())}.{advice}"
        )
    trajectory = prediction["trajectory"]
    numbers = sorted(int(key.removeprefix("tool_name_")) for key in trajectory if re.fullmatch(r"tool_name_\d+", key))
    if numbers != list(range(len(numbers))):
        raise RouteError(
            f"The trajectory holds the steps {numbers}: it was cut to fit a context window, so the states of its steps "
            "are not known. Leave it out."
        )
    calls = []
    for number in numbers:
        name, value = trajectory[f"tool_name_{number}"], trajectory.get(f"observation_{number}", "")
        failed = isinstance(value, str) and value.startswith(f"Execution error in {name}:")
        calls.append((name, trajectory.get(f"tool_args_{number}") or {}, value, failed))
    return calls


def _react_v2_calls(history: Any, inputs: Mapping[str, Any]) -> list[_Call]:
    messages = history["messages"] if isinstance(history, Mapping) else history.messages
    calls: list[_Call] = []
    for message in messages:
        if any(name in message for name in inputs):  # a run begins; those before it were handed over as history
            calls = []
        made = dspy.ToolCalls.model_validate(message.get("tool_calls") or {"tool_calls": []})
        results = made.tool_call_results.tool_call_results if made.tool_call_results else []
        for number, call in enumerate(made.tool_calls):
            result = results[number] if number < len(results) else None
            value, failed = (result.value, result.is_error) if result else ("", False)
            calls.append((call.name, call.args or {}, value, failed))
    return calls
