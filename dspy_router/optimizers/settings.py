"""What a `RouteFinetune` was told, for the compile that it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dspy_router.optimizers.outcomes import CostUnit
from dspy_router.optimizers.rollouts import Metric

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
    max_errors: int | None
    seed: int
    log_dir: Path | None
