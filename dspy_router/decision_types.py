"""DSPy's experimental decision types (`Choice`, `Noul`, `Score`), as options of a route.

All contact with `dspy.adapters.types.decision` and its evidence record is here, because DSPy marks them
experimental.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import dspy
from dspy.adapters.decision import record_evidence
from dspy.adapters.types.decision import Choice, Noul, Score, decision_type
from pydantic.fields import FieldInfo

from dspy_router.options import Option, words
from dspy_router.probabilities import likeliest_option

DecisionKind = Literal["choice", "noul", "score"]  # as DSPy's decision requests name them


def decision_kind(field: FieldInfo) -> DecisionKind:
    """Which of DSPy's decision types an output field has; whatever is no `bool` and no `Score` is a choice."""
    kind = decision_type(field)
    if kind is None or issubclass(kind, Choice):
        return "choice"
    return "noul" if issubclass(kind, Noul) else "score"


def declared_options(name: str, field: FieldInfo) -> tuple[Option, ...] | None:
    """The options of a `Literal`, `bool`, `Choice`, `Noul` or `Score` output field, or None for any other type.

    A boolean without criteria is described by the field's `desc`, or by its name: against "no", a request is compared
    with "yes: whether it must be answered today". A score's options are its levels, from "0".
    """
    kind = decision_type(field)
    if kind is None:
        return None
    criteria = criteria_by_option(decision_kind(field), kind.criteria())
    if issubclass(kind, Noul):
        if not any(criteria.values()):
            desc = field.json_schema_extra["desc"]  # type: ignore[index]
            criteria = {"True": words(name) if desc in ("", f"${{{name}}}") else str(desc)}
        return (
            Option("True", criteria.get("True", ""), value=True, spoken="yes"),
            Option("False", criteria.get("False", ""), value=False, spoken="no"),
        )
    if issubclass(kind, Score):
        return tuple(
            Option(level, text, value=int(level), spoken="" if text else None) for level, text in criteria.items()
        )
    values = get_args(kind.model_fields["value"].annotation)
    return tuple(Option(str(value), criteria.get(str(value), ""), value=value) for value in values)


def criteria_by_option(kind: DecisionKind, criteria: Any) -> dict[str, str]:
    """Criteria in DSPy's form (label, "true" and "false", or a list of levels) as texts by option name."""
    if not criteria:
        return {}
    if kind == "score":
        return {str(level): criterion_text(text) for level, text in enumerate(criteria)}
    if kind == "noul":
        return {label.capitalize(): criterion_text(text) for label, text in criteria.items()}
    return {label: criterion_text(text) for label, text in criteria.items()}


def selected(
    kind: DecisionKind, probabilities: Mapping[str, float], parameters: Mapping[str, Any] | None = None
) -> str:
    """The option that probabilities select, by DSPy's rule for the decision type.

    Args:
        kind: Of the field.
        probabilities: By option name, in declaration order, to which ties go.
        parameters: A `threshold`, `cuts` or `weights` (by option name) as `dspy.Predict.fields` holds them, for
            example from `dspy.experimental.ReAnchor`; DSPy's defaults without.

    Example:
        >>> selected("choice", {"a": 0.4, "b": 0.6}), selected("choice", {"a": 0.4, "b": 0.6}, {"weights": {"b": 0.5}})
        ('b', 'a')
        >>> selected("score", {"0": 0.4, "1": 0.2, "2": 0.4})
        '1'
    """
    parameters = parameters or {}
    if kind == "noul":
        return "True" if probabilities["True"] >= parameters.get("threshold", 0.5) else "False"
    if kind == "score":
        cuts = parameters.get("cuts", [level + 0.5 for level in range(len(probabilities) - 1)])
        mean = mean_level(probabilities)
        return str(sum(mean >= cut for cut in cuts))
    likeliest = likeliest_option(probabilities)
    if "weights" not in parameters:
        return likeliest
    scores = {name: probability * parameters["weights"].get(name, 1.0) for name, probability in probabilities.items()}
    return max(scores, key=lambda name: (scores[name], name == likeliest))


def possible(
    kind: DecisionKind, options: Sequence[str], parameters: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """The options that a predictor with these parameters can take at all, whatever the probabilities.

    Example:
        >>> possible("choice", ["a", "b", "c"], {"weights": {"b": 0}}), possible("noul", ["True", "False"])
        (('a', 'c'), ('True', 'False'))
    """
    parameters = parameters or {}
    if kind == "noul" and parameters.get("threshold", 0.5) <= 0:
        return ("True",)
    weights = parameters.get("weights", {}) if kind == "choice" else {}
    return tuple(name for name in options if weights.get(name, 1.0) > 0)


def selecting(
    kind: DecisionKind, options: Sequence[str], chosen: str, parameters: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Probabilities from which a predictor with these parameters selects the chosen option, one that is possible.

    All the mass is on it, unless it is a score's level outside its own cuts: the mean is then midway between these.

    Example:
        >>> selecting("choice", ["a", "b"], "b")
        {'a': 0.0, 'b': 1.0}
        >>> selecting("score", ["0", "1", "2"], "2", {"cuts": [0.25, 0.5]})
        {'0': 0.0, '1': 0.0, '2': 1.0}
        >>> selecting("score", ["0", "1", "2"], "1", {"cuts": [0.25, 0.5]})
        {'0': 0.625, '1': 0.375, '2': 0.0}
    """
    if kind != "score":
        return {name: float(name == chosen) for name in options}
    level = int(chosen)
    cuts = (parameters or {}).get("cuts", [below + 0.5 for below in range(len(options) - 1)])
    low, high = [0.0, *cuts][level], [*cuts, math.inf][level]
    mean = float(level) if low <= level < high else (low + min(high, len(options) - 1)) / 2
    return {name: max(0.0, 1.0 - abs(mean - int(name))) for name in options}


def predictor_parameters(name: str) -> Mapping[str, Any] | None:
    """What the calling `Predict` holds in its `fields` for an output: the innermost module, as in `record_evidence`."""
    caller = (dspy.settings.caller_modules or [None])[-1]
    return caller.fields.get(name) if isinstance(caller, dspy.Predict) else None


def question_labels(question: Mapping[str, Any]) -> tuple[str, ...]:
    """The options of a decision request's question, by name."""
    if question["type"] == "noul":
        return ("True", "False")
    criteria = question["criteria"]
    return tuple(criteria) if question["type"] == "choice" else tuple(map(str, range(len(criteria))))


def asked_signature(inputs: Mapping[str, Any], questions: Mapping[str, Mapping[str, Any]]) -> type[dspy.Signature]:
    """A signature with the inputs, by name with their types, and the outputs of a decision request."""
    fields: dict[str, Any] = {name: (kind, dspy.InputField()) for name, kind in inputs.items()}
    kind: Any
    for name, question in questions.items():
        criteria: Any = question.get("criteria")
        if question["type"] == "choice":
            kind = Choice[tuple(criteria.items())]
        elif question["type"] == "score":
            kind = Score[tuple(criteria)]
        else:
            kind = Noul[tuple((label == "true", text) for label, text in criteria.items())] if criteria else bool
        fields[name] = (kind, dspy.OutputField(desc=criterion_text(question.get("instructions"))))
    return dspy.Signature(fields, "Decide.")


def mean_level(probabilities: Mapping[str, float]) -> float:
    """A score's value: the mean of its levels under the probabilities."""
    return sum(int(level) * mass for level, mass in probabilities.items()) / sum(probabilities.values())


def declared_value(field: FieldInfo, option: Option, probabilities: Mapping[str, float], confidence: float) -> Any:
    """The chosen option typed as the field declares: the bare value, or a decision object around it."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, Noul):
        probability = probabilities["True"]
        # DSPy's own definition for a threshold of 0.5: the distance from it, as a share of the largest.
        return kind(value=option.value, probability=probability, confidence=min(1.0, abs(probability - 0.5) / 0.5))
    if isinstance(kind, type) and issubclass(kind, Choice):
        return kind(value=option.value, probabilities=dict(probabilities), confidence=confidence)
    if isinstance(kind, type) and issubclass(kind, Score):
        # A level chosen from outside is a value of its own; otherwise the value is continuous.
        own = selected("score", probabilities) == option.name
        return kind(
            value=mean_level(probabilities) if own else float(option.value),
            probabilities={int(level): mass for level, mass in probabilities.items()},
            confidence=confidence,
            level=option.value,
        )
    return option.value


def plain_value(value: Any) -> Any:
    """The value inside a `Choice` or `Noul`, the level of a `Score`, or the value itself."""
    if isinstance(value, Score):
        return level_of(value.value) if value.level is None else value.level
    return value.value if isinstance(value, (Choice, Noul)) else value


def level_of(number: float) -> float:
    """The level of a score's number, by DSPy's default cuts; what is not finite has none."""
    return math.floor(number + 0.5) if math.isfinite(number) else number


def probabilities_of(value: Any) -> dict[str, float] | None:
    """Option probabilities carried by a decision value, by option name, or None if it carries none."""
    if isinstance(value, (Choice, Score)) and value.probabilities:
        return {str(label): probability for label, probability in value.probabilities.items()}
    if isinstance(value, Noul) and value.probability is not None:
        return {"True": value.probability, "False": 1.0 - value.probability}
    return None


@contextmanager
def recorded_probabilities() -> Iterator[list[tuple[str, dict[str, float]]]]:
    """Collect (output name, option probabilities) of the decision clients that run inside the block."""
    found: list[tuple[str, dict[str, float]]] = []
    with record_evidence() as log:
        yield found
    for _, name, answer in log:
        if "noul" in answer:
            found.append((name, {"True": answer["noul"], "False": 1.0 - answer["noul"]}))
        elif "probabilities" in answer:
            found.append((name, {str(label): p for label, p in answer["probabilities"].items()}))


def criterion_text(criterion: Any) -> str:
    """A criterion or an instruction as text; objects and arrays as JSON."""
    if criterion in (None, ""):
        return ""
    return criterion if isinstance(criterion, str) else json.dumps(criterion)
