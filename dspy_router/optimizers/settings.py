"""What a `RouteFinetune` was told, for the compile that it starts."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dspy_router.errors import RouteError

if TYPE_CHECKING:
    from dspy_router.optimizers.executors import Executor

Metric = Callable[..., Any]
CostUnit = Literal["dollars", "tokens"]
AutoBudget = Literal["light", "medium", "heavy"]


@dataclass(frozen=True)
class FinetuneSettings:
    """The settings of a `RouteFinetune`; its docstring says what each means."""

    metric: Metric | None
    max_metric_calls: int | None
    auto: AutoBudget | None
    num_threads: int | None
    metric_threshold: float | None
    best_reward: float
    failure_score: float
    cost_weight: float
    cost_unit: CostUnit
    metric_noise: float | None
    restart: bool
    max_errors: int | None
    seed: int
    log_dir: Path | None
    executor: "Executor | None"


def metric_calls(settings: FinetuneSettings, decisions: int, validation: int) -> int | None:
    """The whole budget of a compile, if one is set.

    Args:
        settings: With `auto`, the budget is what `dspy.GEPA` allows itself for as many predictors as there are
            decisions.
        decisions: Fields that the program's routes decide.
        validation: Examples the result is checked on.
    """
    if settings.auto is None:
        return settings.max_metric_calls
    from dspy.teleprompt.gepa.gepa import AUTO_RUN_SETTINGS, GEPA

    # The method reads nothing of the optimizer it belongs to.
    calls: int = GEPA.auto_budget(None, decisions, AUTO_RUN_SETTINGS[settings.auto]["n"], valset_size=validation)
    return calls


def check_metric(metric: Any) -> None:
    """Refuse, before anything is spent, what can be called with no run.

    Raises:
        RouteError: If it is no `metric(example, prediction)` and no `metric(example, prediction, trace)`.

    Example:
        >>> check_metric(lambda example, prediction, trace=None: True)
        >>> check_metric(lambda gold, pred, trace, pred_name, pred_trace: True)
        Traceback (most recent call last):
        dspy_router.errors.RouteError: The metric takes (gold, pred, trace, pred_name, pred_trace), but is called as ...
    """
    if not callable(metric):
        raise RouteError(f"metric={metric!r} cannot be called; give a function metric(example, prediction).")
    if not _takes(metric, 2) and not _takes(metric, 3):
        raise RouteError(
            f"The metric takes {inspect.signature(metric)}, but is called as metric(example, prediction), or with the "
            "trace as third argument. Give the others defaults, such as pred_name=None, or wrap it: "
            "lambda example, prediction: metric(example, prediction, ...)."
        )


def verdict(metric: Metric, example: Any, prediction: Any, trace: Any = None) -> Any:
    """What a metric says of a run; of the trace, where there is one, it is told if it takes three arguments.

    Example:
        >>> verdict(lambda example, prediction: prediction == example, "a", "a", trace=[])
        True
        >>> verdict(lambda example, prediction, trace: trace, "a", "a") is None
        True
    """
    bare, traced = (example, prediction), (example, prediction, trace)
    preferred, other = (bare, traced) if trace is None else (traced, bare)
    return metric(*(preferred if _takes(metric, len(preferred)) else other))


def _takes(metric: Metric, count: int) -> bool:
    try:
        inspect.signature(metric).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # written in C, with a signature that nobody knows
        return True
    return True
