"""DSPy's experimental decision types (`Choice`, `Noul`), as options of a route.

All contact with `dspy.adapters.types.decision` and its evidence record is here, because DSPy marks them
experimental.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

from dspy.adapters.decision import record_evidence
from dspy.adapters.types.decision import Choice, Noul, Score, decision_type
from pydantic.fields import FieldInfo

from dspy_router.options import Option


def declared_options(field: FieldInfo) -> tuple[Option, ...] | None:
    """The options of a `Literal`, `bool`, `Choice` or `Noul` output field, or None for any other type."""
    kind = decision_type(field)
    if kind is None or issubclass(kind, Score):
        return None
    criteria = kind.criteria() or {}
    if issubclass(kind, Noul):
        return tuple(
            Option(str(value), _description(criteria.get(str(value).lower())), value=value) for value in (True, False)
        )
    values = get_args(kind.model_fields["value"].annotation)
    return tuple(Option(str(value), _description(criteria.get(str(value))), value=value) for value in values)


def declared_value(field: FieldInfo, option: Option, probabilities: Mapping[str, float], confidence: float) -> Any:
    """The chosen option typed as the field declares: the bare value, or a `Choice` or `Noul` object around it."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, Noul):
        probability = probabilities["True"]
        # DSPy's own definition for a threshold of 0.5: the distance from it, as a share of the largest.
        return kind(value=option.value, probability=probability, confidence=min(1.0, abs(probability - 0.5) / 0.5))
    if isinstance(kind, type) and issubclass(kind, Choice):
        return kind(value=option.value, probabilities=dict(probabilities), confidence=confidence)
    return option.value


def plain_value(value: Any) -> Any:
    """The value inside a `Choice` or `Noul`, or the value itself."""
    return value.value if isinstance(value, (Choice, Noul)) else value


def probabilities_of(value: Any) -> dict[str, float] | None:
    """Option probabilities carried by a decision value, by option name, or None if it carries none."""
    if isinstance(value, Choice) and value.probabilities:
        return dict(value.probabilities)
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


def _description(criterion: Any) -> str:
    if criterion in (None, ""):
        return ""
    return criterion if isinstance(criterion, str) else json.dumps(criterion)
