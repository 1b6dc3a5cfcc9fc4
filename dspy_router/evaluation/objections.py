"""What a log must hold for a verdict on a candidate, and what is said where it does not."""

from collections.abc import Mapping

import numpy as np

from dspy_router.evaluation.offline import OfflineEvaluation
from dspy_router.evaluation.overlap import RARELY, Overlap

EFFECTIVE_ROWS = 50  # below, a handful of rows decide the estimate, and its interval with it
UNUSUAL_ROWS = 10  # the same of decisions against what the log usually takes
UNUSUAL_SHARE = 0.01  # the most of those that the log may say less about: they move a mean reward by no more
UNSUPPORTED_SHARE = 0.05  # the most of the candidate's probability that the log may say nothing about
UNUSABLE_SHARE = 0.2  # the most rows that may lack a propensity: the others may not be like them
DOUBT = 1000.0  # evidence against the propensities: right ones are called wrong in one log of a thousand at most
SURE = 3.29  # standard errors by which a mean weight is too low, given `UNUSUAL_ROWS`: one log of a thousand, roughly


def objections(evaluation: OfflineEvaluation, set_aside: Mapping[str, int] | None = None) -> list[str]:
    """Why a log cannot judge a candidate; empty if it can.

    Args:
        evaluation: What was found in the rows that could be used.
        set_aside: How many others there were, by reason.
    """
    overlap, unusable = evaluation.overlap, sum(evaluation.unusable.values())
    found = []
    why = "; ".join(f"{reason} ({count:,} rows)" for reason, count in (set_aside or {}).items())
    if not evaluation.rows:
        found.append(f"no row of the log can be used: {why or 'there is none'}")
    if unusable > UNUSABLE_SHARE * evaluation.rows:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in evaluation.unusable.items())
        found.append(
            f"{unusable:,} of {evaluation.rows:,} rows have no propensity to weigh with ({counts}); at most "
            f"{UNUSABLE_SHARE:.0%} may lack one"
        )
    if overlap is None:
        return found
    shortages = _shortages(overlap, evaluation.rows - unusable)
    if shortages and sum((set_aside or {}).values()) > evaluation.rows:
        found.append(f"only {evaluation.rows:,} rows of the log can be used: {why}")
    found += shortages
    estimate = evaluation.estimates.get("doubly robust")
    if not found and estimate is not None and np.isnan(estimate.difference.low):
        found.append(
            f"no row contradicts another about the difference ({estimate.difference.value:+.3g}), as where all rewards "
            "are the same, so that nothing tells how sure it is"
        )
    return found


def _shortages(overlap: Overlap, rows: int) -> list[str]:
    """What the overlap of the candidate and so many rows is too little for."""
    found = []
    if not overlap.effective_rows >= EFFECTIVE_ROWS:
        found.append(
            f"the log is worth {overlap.effective_rows:.1f} rows of the candidate's own (effective sample size); at "
            f"least {EFFECTIVE_ROWS} are needed{_rows_like_these(rows, overlap.effective_rows, EFFECTIVE_ROWS)}"
        )
    if overlap.unsupported > UNSUPPORTED_SHARE:
        found.append(
            f"{overlap.unsupported:.1%} of the candidate's decisions are options that the log never took, or less than "
            f"once for {RARELY} times that the candidate would; at most {UNSUPPORTED_SHARE:.0%} may be"
        )
    if overlap.decided == 1 and overlap.mean_weight < 1 - UNUSUAL_SHARE:
        found.append(
            f"the log took no chances (every propensity is 1), and the candidate decides otherwise in "
            f"{1 - overlap.mean_weight:.1%} of the rows; let what decides now explore a little, and log that"
        )
    elif overlap.doubt >= DOUBT:
        found.append(
            f"the propensities are wrong (right ones would look so in fewer than one log of {DOUBT:,.0f}; the "
            f"importance weights average {overlap.mean_weight:.2f}): log the probability with which the option taken "
            "was taken, exploration included"
            + ("; or the candidate learned from these rows: judge it on others" if overlap.mean_weight > 1 else "")
        )
    elif overlap.unusual > UNUSUAL_SHARE and overlap.unusual_rows < UNUSUAL_ROWS:
        found.append(
            f"the log is too short for how rarely it explored: {overlap.unusual:.1%} of the candidate's decisions go "
            f"against what the log takes more than half of the time, and its {rows:,} rows say as much of these as "
            f"{overlap.unusual_rows:.1f} of the candidate's own (effective sample size); at least {UNUSUAL_ROWS} are "
            f"needed{_rows_like_these(rows, overlap.unusual_rows, UNUSUAL_ROWS)}, or more exploration"
        )
    elif 1 - overlap.mean_weight > UNSUPPORTED_SHARE + SURE * overlap.mean_weight_error:
        found.append(
            f"the importance weights average {overlap.mean_weight:.2f} where 1 is expected: the propensities are too "
            "large, or the log never takes some of the candidate's options on some inputs"
        )
    return found


def _rows_like_these(rows: int, effective: float, needed: int) -> str:
    """How long a log would have to be, to two digits."""
    if effective < 1:
        return f", so more than {rows * needed:,} rows like these"
    return f", so about {float(f'{rows * needed / effective:.2g}'):,.0f} rows like these"
