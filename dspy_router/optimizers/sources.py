"""Where feedback comes from before any rollout is paid for: gold labels and a teacher's runs."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.parallelizer import ParallelExecutor
from tqdm.auto import tqdm

from dspy_router.agent.imitation import imitation_rows, react_episode
from dspy_router.agent.routed_agent import RoutedAgent
from dspy_router.agent.tools import require_sync
from dspy_router.decision_types import probabilities_of, recorded_probabilities
from dspy_router.decisions import Decision, recording
from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback, Source
from dspy_router.fields import DecisionField
from dspy_router.optimizers.override import Site
from dspy_router.optimizers.rollouts import Job, KeyedExample, RolloutRunner, reward_of
from dspy_router.optimizers.runs import decided_fields
from dspy_router.optimizers.settings import Metric, verdict
from dspy_router.route import DifferentiableRoute

logger = logging.getLogger(__name__)

Routes = Mapping[str, DifferentiableRoute]
SiteTexts = list[list[tuple[Site, str]]]
PROBES = 5  # examples run to see whether a route reads the example's inputs as they are


def site_texts(
    program: dspy.Module, routes: Routes, examples: Sequence[KeyedExample], num_threads: int | None
) -> SiteTexts:
    """What each route reads on each example, with the decision sites it reads it at.

    A route whose inputs are the example's own reads them directly: a few runs of the program confirm
    it, or none if the program is the route. Otherwise every example is run once, unscored, and the texts are
    those its decisions recorded.
    """
    direct = _direct_texts(routes, examples)
    if direct is not None and routes.get("self") is program:
        return direct
    runner = RolloutRunner(
        program, routes, None, num_threads=num_threads, failure_score=0.0, max_errors=len(examples) + 1
    )
    probed = min(PROBES, len(examples)) if direct is not None else 0
    runs = runner.run([Job(index) for index in range(probed)], examples, phase="observe")
    if direct is not None:
        seen = [[(decision.site, decision.text) for decision in run.decisions] for run in runs]
        if not any(seen):
            logger.warning(
                "No run of the program reached a decision of its routes (%s), so they are trained on the examples' "
                "inputs as they are.", runs[0].error or "none raised",
            )  # fmt: skip
        if not any(seen) or all(sorted(own) == sorted(found) for own, found in zip(direct, seen, strict=False)):
            return direct
    with tqdm(total=len(examples) - probed, desc="observing", unit="run", delay=2) as bar:
        rest = [Job(index) for index in range(probed, len(examples))]
        runs += runner.run(rest, examples, phase="observe", on_done=lambda _: bar.update())
    return [[(decision.site, decision.text) for decision in run.decisions] for run in runs]


def likely_texts(route: DifferentiableRoute, examples: Sequence[KeyedExample]) -> list[str | None]:
    """What a route reads on each example if its inputs are the example's own; None where they are not all there."""
    names = list(route.signature.input_fields)
    found: list[str | None] = []
    for example in examples:
        inputs = example.example.inputs()
        found.append(route.text({key: inputs[key] for key in names}) if all(key in inputs for key in names) else None)
    return found


def _direct_texts(routes: Routes, examples: Sequence[KeyedExample]) -> SiteTexts | None:
    """Sites and texts if every route reads inputs that every example has, else None."""
    sites: SiteTexts = [[] for _ in examples]
    for name, route in routes.items():
        for index, text in enumerate(likely_texts(route, examples)):
            if text is None:
                return None
            sites[index] += [(Site(name, field.name, 0), text) for field in route.decision_fields]
    return sites


def has_labels(routes: Routes, examples: Sequence[KeyedExample]) -> bool:
    """Whether any example carries an output field of any route."""
    fields = {field.name for route in routes.values() for field in route.fields}
    return any(_label(entry.example, name) is not None for entry in examples for name in fields)


def label_feedback(routes: Routes, examples: Sequence[KeyedExample], texts: SiteTexts) -> list[Feedback]:
    """One row for every decision whose example carries the decided field.

    A route that is called several times in a run is left out: one label does not say which call it is for.

    Raises:
        RouteError: If a label is no option; all such labels are named with their counts.
    """
    fields = decided_fields(routes)
    rows = []
    strays: Counter[str] = Counter()
    for entry, sites in zip(examples, texts, strict=True):
        repeated = {(site.route, site.field) for site, _ in sites if site.occurrence > 0}
        for site, text in sites:
            field = fields[site.route, site.field]
            label = _label(entry.example, field.output)
            if label is None or (site.route, site.field) in repeated:
                continue
            index = field.index_of(label)
            if index is None:
                if field.decides_first:  # of a list, which is one label
                    strays.update(field.strays(label))
                continue
            rows.append(_row(_origin(entry.example), entry.key, site, text, field, index))
    if strays:
        listed = ", ".join(f"{label} ({count})" for label, count in strays.most_common(10))
        options = sorted({name for route in routes.values() for field in route.fields for name in field.option_names})
        raise RouteError(
            f"{strays.total()} labels are no option: {listed}. The options are {options[:20]}. Correct the labels, "
            "or add the missing options."
        )
    return rows


@dataclass(frozen=True)
class TeacherFeedback:
    """What a teacher taught: its rows, and how many runs were scored, refused, failed or decided for no option."""

    rows: list[Feedback]
    scored: int
    refused: int
    failed: int
    unknown: int


def teacher_feedback(
    teacher: dspy.Module,
    program: dspy.Module,
    routes: Routes,
    examples: Sequence[KeyedExample],
    *,
    metric: Metric | None,
    metric_threshold: float | None,
    num_threads: int | None,
    max_errors: int,
) -> TeacherFeedback:
    """Run the teacher on every example and keep its decisions where its run scored well.

    A decision is found, in this order, in the teacher's own routes, in the steps of its trace that decide the
    same field from the same inputs, and in its final prediction. Probabilities are kept where the teacher
    gives them. For the steps of a `RoutedAgent` in the program the decisions are those of the trajectory or history
    in the teacher's prediction, if it gives one as `dspy.ReAct` does. As in `BootstrapFewShot`, a run is kept if it
    reaches `metric_threshold`, or without one if the metric's verdict is not zero; without a metric every run is kept.

    Raises:
        RouteError: When `max_errors` runs have raised, or tools of a `dspy.ReAct` are asynchronous: it would take
            DSPy's refusal to call them for their results, and the route would learn from that.
    """
    for _, agent in teacher.named_sub_modules(type_=dspy.ReAct):
        require_sync(agent.tools, "record runs with await teacher.acall(...) and give imitation_rows(...) as feedback=")
    counts: Counter[str] = Counter()
    errors: list[str] = []
    lock = threading.Lock()
    agents = {f"{name}.step": agent for name, agent in program.named_sub_modules(type_=RoutedAgent)}

    def one(entry: KeyedExample) -> list[Feedback]:
        example = entry.example
        if len(errors) >= max_errors:
            return []
        seen = _RouteDecisions()
        try:
            with dspy.context(trace=[]), recording(seen), recorded_probabilities() as evidence:
                prediction = teacher(**example.inputs())
                trace = list(dspy.settings.trace)
                score = 1.0 if metric is None else reward_of(verdict(metric, example, prediction, trace))
        except Exception as raised:
            with lock:
                errors.append(f"{type(raised).__name__}: {raised}")
            return []
        finally:
            bar.update()
        if score < metric_threshold if metric_threshold is not None else not score:
            with lock:
                counts["refused"] += 1
            return []
        rows = []
        for name, route in routes.items():
            if name in agents and (steps := _teacher_steps(agents[name], name, entry, prediction)):
                rows += steps
                continue
            for field in route.decision_fields:
                found = _teacher_decision(route, field, seen.decisions, trace, prediction, example, dict(evidence))
                if found is None:
                    with lock:
                        counts["unknown"] += 1
                    continue
                text, index, probabilities = found
                site = Site(name, field.name, 0)
                rows.append(_row("teacher", entry.key, site, text, field, index, score, probabilities))
        return rows

    executor = ParallelExecutor(
        num_threads=num_threads, max_errors=len(examples) + 1, disable_progress_bar=True, timeout=0
    )
    with tqdm(total=len(examples), desc="teacher", unit="run", delay=2) as bar:
        results = executor.execute(one, list(examples))
    if len(errors) >= max_errors:
        raise RouteError(f"Stopped after {len(errors)} teacher runs that raised; the last: {errors[-1]}.")
    rows = [row for found in results for row in found]
    scored = len(examples) if metric is not None else 0
    return TeacherFeedback(rows, scored, counts["refused"], len(errors), counts["unknown"])


class _RouteDecisions:
    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def record(self, route: Any, decision: Decision) -> None:
        self.decisions.append(decision)


def _teacher_steps(agent: RoutedAgent, route: str, entry: KeyedExample, prediction: Any) -> list[Feedback]:
    """A row for every step of a teacher that is an agent with the same tools; none if it is not."""
    inputs = {name: value for name, value in entry.example.inputs().items() if name in agent.signature.input_fields}
    try:
        episode = react_episode(agent.signature, inputs, prediction, task=entry.key, reward=1.0)
        return imitation_rows([episode], candidates=agent.step.fields[0].option_names, route=route)
    except RouteError:
        return []


def _teacher_decision(
    route: DifferentiableRoute,
    field: DecisionField,
    decisions: Sequence[Decision],
    trace: Sequence[tuple[Any, Mapping[str, Any], Any]],
    prediction: Any,
    example: dspy.Example,
    evidence: Mapping[str, dict[str, float]],
) -> tuple[str, int, dict[str, float] | None] | None:
    """Text, option index and probabilities of the teacher's decision for a field, or None if it made none."""
    for decision in decisions:
        if decision.field == field.name and decision.name in field.option_names:
            return decision.text, field.option_names.index(decision.name), dict(decision.probabilities)
    inputs_of = route.signature.input_fields
    steps = [(inputs, output) for _, inputs, output in trace if field.output in output]
    for inputs, output in [*steps, (example.inputs(), prediction)]:
        if not hasattr(output, "keys") or field.output not in output or any(name not in inputs for name in inputs_of):
            continue
        value = output[field.output]
        index = field.index_of(value)
        if index is not None:
            probabilities = probabilities_of(value) or evidence.get(field.name)
            return route.text({name: inputs[name] for name in inputs_of}), index, probabilities
    return None


def _row(
    source: Source,
    key: str,
    site: Site,
    text: str,
    field: DecisionField,
    index: int,
    reward: float = 1.0,
    probabilities: dict[str, float] | None = None,
) -> Feedback:
    return Feedback(
        source=source,
        example=key,
        route=site.route,
        field=site.field,
        occurrence=site.occurrence,
        text=text,
        candidates=field.option_names,
        chosen=field.option_names[index],
        propensity=None,
        reward=reward,
        probabilities=probabilities,
    )


def _origin(example: dspy.Example) -> Source:
    """Whether a label was written by an LM: `dspy_router.synthesis` says so in the example."""
    origin = "" if "origin" in example.inputs() else example.get("origin", "")
    return "synthetic" if isinstance(origin, str) and origin.startswith("synthetic/") else "label"


def _label(example: dspy.Example, name: str) -> Any:
    return None if name in example.inputs() else example.get(name)
