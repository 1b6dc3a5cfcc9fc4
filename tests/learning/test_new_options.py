import numpy as np
import pytest
import torch

from dspy_router.heads import OptionHead
from dspy_router.learning.description_transfer import DescriptionTransfer
from dspy_router.learning.fit import fit_head
from dspy_router.learning.new_options import fit_transfer, with_new_options
from dspy_router.learning.rows import Objective, TargetRows

OPTIONS, NEW, DIMENSION, ROWS = 30, 6, 48, 20


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def world(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Descriptions, and inputs whose classes lie near their descriptions as a common linear map moves them."""
    random = np.random.default_rng(seed)
    descriptions = unit(random.standard_normal((OPTIONS + NEW, DIMENSION)))
    moved = unit(descriptions @ (np.eye(DIMENSION) + 0.15 * random.standard_normal((DIMENSION, DIMENSION))))
    labels = np.repeat(np.arange(OPTIONS + NEW), ROWS)
    common = unit(random.standard_normal(DIMENSION))
    inputs = unit(moved[labels] + 0.6 * common + 0.11 * random.standard_normal((len(labels), DIMENSION)))
    return descriptions, inputs, labels


def trained_on_old() -> tuple[OptionHead, np.ndarray, TargetRows, np.ndarray, np.ndarray, np.ndarray]:
    descriptions, inputs, labels = world()
    old = labels < OPTIONS
    train = old & (np.arange(len(labels)) % 4 > 0)
    rows = TargetRows.from_labels(labels[train], OPTIONS)
    head = OptionHead(torch.from_numpy(descriptions[:OPTIONS]))
    fit_head(head, inputs[train], rows)
    return head, inputs[train], rows, descriptions[OPTIONS:], inputs[~train], labels[~train]


def test_options_without_rows_are_found_beside_trained_ones() -> None:
    head, vectors, rows, new, test, labels = trained_on_old()
    transfer = fit_transfer(head, vectors, rows)
    assert transfer is not None

    def accuracies(larger: OptionHead) -> tuple[float, float]:
        right = larger.policy(test).argmax(axis=1) == labels
        return float(right[labels >= OPTIONS].mean()), float(right[labels < OPTIONS].mean())

    on_new, on_old = accuracies(with_new_options(head, new, transfer))
    assert on_new > 0.85
    assert on_old > 0.85
    # As the prior alone, their logits stand no chance against trained ones.
    assert accuracies(head.with_added(torch.from_numpy(new)))[0] < on_new - 0.2


def test_the_other_options_logits_stay_as_they_were() -> None:
    head, vectors, rows, new, test, _ = trained_on_old()
    with torch.no_grad():
        head.temperature.fill_(1.7)
    transfer = fit_transfer(head, vectors, rows)
    assert transfer is not None
    inputs = torch.from_numpy(test)
    larger = with_new_options(head, new, transfer)
    torch.testing.assert_close(larger(inputs)[:, :OPTIONS], head(inputs))
    torch.testing.assert_close(larger.without(range(OPTIONS, OPTIONS + NEW))(inputs), head(inputs))


def test_one_by_one_is_the_same_as_at_once() -> None:
    head, _, _, new, test, _ = trained_on_old()
    transfer = DescriptionTransfer(np.zeros(DIMENSION, np.float32), 0.5, 5.0)
    grown, trained = head, np.arange(OPTIONS)
    for vector in new:
        grown = with_new_options(grown, vector[None], transfer, trained=trained)
    np.testing.assert_allclose(
        grown.policy(test), with_new_options(head, new, transfer).policy(test), rtol=1e-4, atol=1e-7
    )


def test_every_row_that_singles_out_an_option_counts_whatever_its_objective() -> None:
    head, vectors, rows, *_ = trained_on_old()
    as_labels = fit_transfer(head, vectors, rows)
    rewards = TargetRows.of(Objective.REWARD, rows.target)
    unknown = TargetRows.of(Objective.LIKELIHOOD, np.ones((7, OPTIONS)))
    mixed = TargetRows.joined([rewards, unknown])
    as_rewards = fit_transfer(head, np.concatenate([vectors, vectors[:7]]), mixed)
    assert as_labels is not None
    assert as_rewards is not None
    assert (as_rewards.scale, as_rewards.offset) == (as_labels.scale, as_labels.offset)


def test_the_draws_follow_the_seed_and_the_head_is_left_alone() -> None:
    head, vectors, rows, *_ = trained_on_old()
    digest, given = head.digest, vectors.copy()
    first, second, other = (fit_transfer(head, vectors, rows, seed=seed) for seed in (3, 3, 4))
    assert first is not None
    assert second is not None
    assert other is not None
    assert (first.scale, first.offset) == (second.scale, second.offset) != (other.scale, other.offset)
    assert head.digest == digest
    assert np.array_equal(vectors, given)


def test_few_options_or_rows_say_nothing_of_new_ones() -> None:
    vectors, labels = np.eye(8, dtype=np.float32), np.arange(8)
    head = OptionHead(torch.eye(8))
    assert fit_transfer(head, vectors, TargetRows.from_labels(labels, 8)) is None  # a row an option
    twice = np.concatenate([vectors, vectors])
    assert fit_transfer(head, twice, TargetRows.from_labels(np.arange(16) % 4, 8)) is None  # four options with rows
    assert fit_transfer(head, twice, TargetRows.from_labels(np.arange(16) % 8, 8)) is not None


def test_shapes_that_do_not_fit_are_refused() -> None:
    head, transfer = OptionHead(torch.eye(3)), DescriptionTransfer(np.zeros(3, np.float32), 1.0, 0.0)
    with pytest.raises(ValueError, match="do not fit"):
        fit_transfer(head, np.eye(3, dtype=np.float32), TargetRows.from_labels(np.zeros(3, int), 4))
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        with_new_options(head, np.ones((1, 4), np.float32), transfer)
    with pytest.raises(ValueError, match=r"trained=\[1\]"):
        with_new_options(head, np.ones((1, 3), np.float32), transfer, trained=np.array([1]))
    with pytest.raises(ValueError, match="finite"):
        DescriptionTransfer(np.zeros(3, np.float32), float("nan"), 0.0)
