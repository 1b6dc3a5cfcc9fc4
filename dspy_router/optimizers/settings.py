"""What a `RouteFinetune` was told, for the compile that it starts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
