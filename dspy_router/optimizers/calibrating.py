"""After a fit: probabilities that say how often they are right, and a record of what was seen.

A fifth of a field's rows is set aside, whole examples at a time, a second head is fitted to the others, and its logits
for the fifth show how sure a head may be of what it has not seen. What is found there is applied to the head that was
fitted to all rows. Lists are calibrated in their own way: see `dspy_router.learning.list_calibration`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from scipy.special import expit

from dspy_router.folded import softmax
from dspy_router.heads import OptionHead
from dspy_router.learning.calibration import Calibration, calibrate, held_out, useful_rows
from dspy_router.learning.description_transfer import DescriptionTransfer
from dspy_router.learning.familiarity import build_reference
from dspy_router.learning.fit import fit_head
from dspy_router.learning.list_calibration import calibrate_list, description_transfer, held_out_logits, known_members
from dspy_router.learning.list_rows import ListRows
from dspy_router.learning.new_options import fit_transfer
from dspy_router.learning.reference import TEXT_LENGTH, Reference
from dspy_router.learning.reliability import Reliability, recall_at_k, reliability
from dspy_router.learning.rows import TargetRows
from dspy_router.list_heads import ListHead
from dspy_router.optimizers.learner import FieldRows
from dspy_router.training_record import TrainingRecord

Kept = TypeVar("Kept")


@dataclass(frozen=True, eq=False)
class FieldCalibration:
    """How sure a field's decisions are, and how sure they may be.

    Attributes:
        field: The output field.
        rows: Held-out rows.
        temperature: What the logits were divided by.
        at_bound: Whether that is the least or the most allowed.
        biases: Options that got a bias of their own.
        before: Reliability on the held-out rows as the fit left it.
        after: With temperature and biases.
        cross_fitted: Whether those were fitted to other rows for each, in folds; else to the same rows, which flatters.
        recall: By k, how often the right option is among the k likeliest on the held-out rows; empty for a list.
    """

    field: str
    rows: int
    temperature: float
    at_bound: bool
    biases: int
    before: Reliability
    after: Reliability
    cross_fitted: bool
    recall: Mapping[int, float]

    @property
    def basis(self) -> str:
        """What the figures rest on, in a line."""
        fitted = "calibrated in folds" if self.cross_fitted else "the same it was calibrated on"
        bound = ", at its bound" if self.at_bound else ""
        return f"{self.rows:,} held-out rows, {fitted}; temperature {self.temperature:.2f}{bound}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "field": self.field,
            "rows": self.rows,
            "temperature": self.temperature,
            "temperature_at_bound": self.at_bound,
            "biases": self.biases,
            "expected_calibration_error_before": self.before.error,
            "expected_calibration_error": self.after.error,
            "cross_fitted": self.cross_fitted,
            "reliability_before": self.before.to_dict(),
            "reliability": self.after.to_dict(),
            "recall": {str(k): share for k, share in self.recall.items()},
        }


def calibrate_routes(rows: Sequence[FieldRows], seed: int = 0) -> tuple[FieldCalibration, ...]:
    """Calibrate the heads of all fields that have enough rows, and write down what they were fitted to.

    The heads of trainable encoders stay as they are: their vectors change with them.
    """
    found = []
    for entry in rows:
        route, name = entry.route, entry.field.name
        record = (route.learned.record or TrainingRecord()).with_texts(entry.texts)
        if not route.encoder.trainable:
            calibration, reference, transfer = _calibrated(entry, record.references.get(name), seed)
            record = replace(
                record,
                references=_with(record.references, name, reference),
                transfers=_with(record.transfers, name, transfer),
            )
            found += [calibration] if calibration is not None else []
        route.learned.record = record
    return tuple(found)


def _with(found: Mapping[str, Kept], name: str, entry: Kept | None) -> dict[str, Kept]:
    others = {key: value for key, value in found.items() if key != name}
    return others if entry is None else {**others, name: entry}


@dataclass(frozen=True)
class _Seen:
    """What a head has learned from: the texts remembered of earlier fits, if it started from those, then the new ones.

    Attributes:
        texts: The n texts.
        vectors: Float32 [n, d].
        rows: What is known of each.
        remembered: How many of them are remembered.
        forgotten: How many earlier rows are not.
    """

    texts: list[str]
    vectors: np.ndarray
    rows: TargetRows
    remembered: int = 0
    forgotten: int = 0

    @classmethod
    def by(cls, entry: FieldRows, vectors: np.ndarray, rows: TargetRows, earlier: Reference | None) -> "_Seen":
        if entry.anchor is None or earlier is None:
            return cls(entry.texts, vectors, rows)
        new = {text[:TEXT_LENGTH] for text in entry.texts}
        kept = [index for index, text in enumerate(earlier.texts) if text not in new]
        labels = TargetRows.from_labels(earlier.text_options[kept], len(earlier.options))
        return cls(
            [*(earlier.texts[index] for index in kept), *entry.texts],
            np.concatenate([earlier.text_vectors[kept].astype(np.float32), vectors]),
            TargetRows.joined([labels, rows]),
            len(kept),
            earlier.rows - len(kept),
        )


def _calibrated(
    entry: FieldRows, earlier: Reference | None, seed: int
) -> tuple[FieldCalibration | None, Reference | None, DescriptionTransfer | None]:
    head = entry.route.head[entry.field.name]
    vectors = entry.route.encoder.encode(entry.texts)
    if isinstance(entry.rows, ListRows):
        assert isinstance(head, ListHead)
        transfer = description_transfer(head, vectors, entry.rows)
        return _calibrated_list(entry, head, vectors, entry.rows, seed), None, transfer
    seen = _Seen.by(entry, vectors, entry.rows, earlier)
    transfer = fit_transfer(head, seen.vectors, seen.rows, seed=seed)
    logits = head.logits(seen.vectors)
    # Of what is remembered, no head is at hand that has not learned from it.
    new = np.arange(seen.remembered, len(seen.rows))
    mask = held_out(entry.examples, seed)
    calibration = field = held = None
    if mask is not None:
        held, rest = new[mask], new[~mask]
        other = OptionHead(head.option_vectors, scale=float(head.scale))
        if entry.anchor is not None:
            entry.anchor.put_into(other)
        fit_head(other, seen.vectors[rest], seen.rows.part(rest), anchor=entry.anchor)
        logits[held] = other.logits(seen.vectors[held])
        groups = [entry.examples[row] for row in np.flatnonzero(mask)]
        calibration = calibrate(logits[held], seen.rows.part(held), groups=groups, seed=seed)
        if calibration is not None:
            field = _report(entry, calibration, logits[held], seen.rows.part(held))
            logits = calibration(logits)
            calibration.apply(head)
    reference = build_reference(
        entry.field.option_names, head.option_vectors.cpu().numpy(), seen.vectors, seen.rows, logits, seen.texts,
        held_out=None if held is None else np.isin(np.arange(len(seen.rows)), held), seed=seed,
    )  # fmt: skip
    return field, reference and replace(reference, rows=reference.rows + seen.forgotten), transfer


def _calibrated_list(
    entry: FieldRows, head: ListHead, vectors: np.ndarray, rows: ListRows, seed: int
) -> FieldCalibration | None:
    seen = held_out_logits(head, vectors, rows, anchor=entry.anchor, seed=seed)
    calibration = None if seen is None else calibrate_list(seen.logits, rows.part(seen.rows))
    if seen is None or calibration is None:
        return None
    calibration.apply(head)
    truth, weight = known_members(rows.part(seen.rows))
    known = weight > 0

    def measured(logits: np.ndarray) -> Reliability:
        within = expit(logits[known])
        return reliability(np.maximum(within, 1 - within), np.where(within >= 0.5, truth[known], 1 - truth[known]))

    return FieldCalibration(
        field=entry.field.name,
        rows=len(seen.rows),
        temperature=calibration.temperature,
        at_bound=False,
        biases=int(np.count_nonzero(calibration.bias)),
        before=measured(seen.logits),
        after=measured(calibration(seen.logits)),
        cross_fitted=False,
        recall={},
    )


def _report(entry: FieldRows, calibration: Calibration, logits: np.ndarray, rows: TargetRows) -> FieldCalibration:
    # Where rewards are graded there is no right and wrong to compare with.
    useful = useful_rows(rows)
    rows, logits = rows.part(useful), logits[useful]
    crossed = calibration.cross_fitted
    calibrated = calibration(logits) if crossed is None else crossed

    def measured(values: np.ndarray) -> Reliability:
        policy = softmax(values)
        return reliability(policy.max(axis=1), rows.worth(policy.argmax(axis=1)))

    return FieldCalibration(
        field=entry.field.name,
        rows=len(rows),
        temperature=calibration.temperature,
        at_bound=calibration.at_bound,
        biases=int(np.count_nonzero(calibration.bias)),
        before=measured(logits),
        after=measured(calibrated),
        cross_fitted=crossed is not None,
        recall=recall_at_k(calibrated, rows),
    )
