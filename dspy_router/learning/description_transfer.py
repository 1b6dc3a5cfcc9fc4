"""What training keeps for options that are added later; `dspy_router.learning.new_options` fits and uses it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DescriptionTransfer:
    """How a new option's logits follow from its description; see `dspy_router.learning.new_options`.

    Attributes:
        center: Float32 [d], the mean training input.
        scale: Length of a new option's weights, as a multiple of a trained one's.
        offset: Added to a new option's logit.
    """

    center: np.ndarray
    scale: float
    offset: float

    def __post_init__(self) -> None:
        if self.center.ndim != 1 or not np.isfinite([*self.center, self.scale, self.offset]).all():
            raise ValueError(
                f"A transfer needs a finite center [d], scale and offset; got a center of shape {self.center.shape}, "
                f"{self.scale} and {self.offset}."
            )
