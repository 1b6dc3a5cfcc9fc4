"""Minimising a fit's objective: on all rows at once, or where they are very many in small batches.

The objective is a sum over rows and a penalty. L-BFGS takes a few dozen passes over the rows, however many these are.
Adam (Kingma and Ba 2015) on batches drawn without replacement, with a learning rate that falls to zero along a cosine
(Loshchilov and Hutter 2017), takes hundreds of steps a pass where rows are many, and then needs few passes.

Measured on synthetic rows of 384 dimensions, 150 options, in CPU time: of 250,000 rows six passes come within 0.8 % of
L-BFGS's objective in a third of its time, three within 3 %; of 60,000, five only within 2 %, and L-BFGS started from
there takes as many passes as from the descriptions. Learning rates of 0.06 and 0.1 end higher, as do batches of 4,096.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dspy_router.threads import threads_for

BLOCK = 5  # L-BFGS iterations a step
BATCH = 1024
EPOCHS = 6
LEARNING_RATE = 0.03

Share = Callable[[slice | Tensor], Tensor]


def full_batch(
    parameters: Sequence[Tensor], share: Share, penalty: Callable[[], Tensor], parts: Sequence[slice], work: int
) -> Iterator[float]:
    """Minimise with L-BFGS, without end; yields, after each step, the objective as it was before.

    Args:
        parameters: Changed in place.
        share: What some rows add to the objective.
        penalty: What no row is needed for.
        parts: All rows, so many at a time as there is memory for.
        work: Multiplications of a pass.
    """
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=BLOCK, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-6,
        tolerance_change=0.0,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        # Part by part, so that memory does not grow with what lies between the logits and the loss.
        total = torch.zeros(())
        for part in parts:
            value = share(part)
            value.backward()
            total += value.detach()
        pulled = penalty()
        pulled.backward()
        return total + pulled.detach()

    while True:
        with threads_for(work):
            objective = float(optimizer.step(closure))
        yield objective


def mini_batches(
    parameters: Sequence[Tensor], share: Share, penalty: Callable[[], Tensor], rows: int, work: int
) -> Iterator[float]:
    """Minimise with Adam in `EPOCHS` passes; yields, after each, the mean objective of its batches.

    The arguments are those of `full_batch`, for so many rows. Batches are the same in every run.
    """
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, betas=(0.9, 0.99))
    count = math.ceil(rows / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * count)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        total = 0.0
        with threads_for(work // count):
            for batch in torch.randperm(rows, generator=generator).split(BATCH):
                optimizer.zero_grad()
                objective = share(batch) * (rows / len(batch)) + penalty()
                objective.backward()
                optimizer.step()
                schedule.step()
                total += float(objective.detach())
        yield total / count
