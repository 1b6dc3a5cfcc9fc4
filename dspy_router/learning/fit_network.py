"""Fitting a trainable token network and the heads on it, together, by mini-batches."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dspy_router.heads import OptionHead
from dspy_router.learning.list_rows import ListRows
from dspy_router.learning.rows import TargetRows
from dspy_router.threads import threads_for


@dataclass(frozen=True)
class NetworkFitSettings:
    """How a network is fitted: AdamW on shuffled mini-batches, stopped early on held-out rows.

    Attributes:
        epochs: Most passes over the rows.
        batch_size: Rows a step.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        patience: Stop after so many epochs in which the held-out loss did not fall.
        held_out: Share of the rows that stop the fit, where no validation rows are given.
        seed: Of the split, the shuffling and dropout.
    """

    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    patience: int = 4
    held_out: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class NetworkTask:
    """One head on the network and the rows it learns from: token ids, int64 [n, l], and n rows."""

    head: OptionHead
    ids: Tensor
    rows: TargetRows | ListRows


def fit_network(
    network: nn.Module,
    tasks: Sequence[NetworkTask],
    *,
    settings: NetworkFitSettings | None = None,
    on_epoch: Callable[[int], object] | None = None,
) -> int:
    """Fit a network (token ids to unit vectors) and its heads in place; the best epoch's weights are kept.

    Args:
        network: The module shared by the tasks.
        tasks: At least one, each with at least one row.
        settings: Defaults to `NetworkFitSettings()`.
        on_epoch: Called with 1 after each epoch, e.g. a progress bar's `update`.

    Returns:
        Epochs run.

    Raises:
        ValueError: If there is no task, or one has no row.
    """
    if not tasks or any(len(task.rows) == 0 for task in tasks):
        raise ValueError("fit_network needs at least one task, each with at least one row.")
    settings = settings or NetworkFitSettings()
    generator = np.random.default_rng(settings.seed)
    modules = nn.ModuleList([network, *(task.head for task in tasks)])
    for task in tasks:
        task.head.begin_training()
    optimizer = torch.optim.AdamW(modules.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    splits = [_split(len(task.rows), settings.held_out, generator) for task in tasks]
    losses = [task.rows.loss() for task in tasks]
    best, worse, epochs = (float("inf"), copy.deepcopy(modules.state_dict())), 0, 0
    with torch.random.fork_rng(devices=[]), threads_for(0):
        torch.manual_seed(settings.seed)
        while epochs < settings.epochs:
            epochs += 1
            modules.train()
            for number, start in _batches([len(train) for train, _ in splits], settings.batch_size, generator):
                task, train = tasks[number], splits[number][0]
                if start == 0:
                    generator.shuffle(train)
                index = torch.from_numpy(train[start : start + settings.batch_size])
                optimizer.zero_grad()
                losses[number](task.head(network(task.ids[index])), index).backward()
                optimizer.step()
            modules.eval()
            with torch.no_grad():
                held_out = [torch.from_numpy(split[1]) for split in splits]
                value = sum(
                    float(loss(task.head(network(task.ids[index])), index))
                    for task, loss, index in zip(tasks, losses, held_out, strict=True)
                )
            if on_epoch is not None:
                on_epoch(1)
            if value < best[0]:
                best, worse = (value, copy.deepcopy(modules.state_dict())), 0
            else:
                worse += 1
                if worse >= settings.patience:
                    break
    modules.load_state_dict(best[1])
    modules.eval()
    return epochs


def _split(count: int, share: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to hold out; fewer than ten rows serve as both."""
    order = generator.permutation(count)
    if count < 10:
        return order, order.copy()
    cut = max(1, int(count * share))
    return order[cut:], order[:cut]


def _batches(counts: Sequence[int], size: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """(task, start) of every mini-batch of an epoch; the tasks' batches are interleaved, each in order."""
    turns = generator.permutation(
        np.concatenate([np.full(-(-count // size), task) for task, count in enumerate(counts)])
    )
    started = dict.fromkeys(range(len(counts)), 0)
    batches = []
    for task in turns.tolist():
        batches.append((task, started[task]))
        started[task] += size
    return batches
