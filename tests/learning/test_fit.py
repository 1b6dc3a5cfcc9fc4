import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dspy_router.heads import OptionHead
from dspy_router.learning import fit, minimizing
from dspy_router.learning.fit import Anchor, FitSettings, fit_head
from dspy_router.learning.rows import Objective, TargetRows


def clusters(rows: int, options: int = 4, dimension: int = 16, noise: float = 0.4, seed: int = 0):
    """Unit vectors around option centres that share a large common part, with labels; and those centres."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((options, dimension)) + 2.0
    labels = random.integers(options, size=rows)
    vectors = centers[labels] + noise * 3 * random.standard_normal((rows, dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), labels, (centers / np.linalg.norm(centers, axis=1, keepdims=True)).astype("f4")


def accuracy(head: OptionHead, vectors: np.ndarray, labels: np.ndarray) -> float:
    return float((head.policy(vectors).argmax(1) == labels).mean())


def test_fit_is_as_good_as_logistic_regression() -> None:
    vectors, labels, _ = clusters(400)
    test_vectors, test_labels, _ = clusters(2000, seed=1)
    head = OptionHead(torch.zeros(4, 16))
    fit_head(head, vectors, TargetRows.from_labels(labels, 4))
    peer = LogisticRegression(C=10).fit(vectors, labels).score(test_vectors, test_labels)
    assert accuracy(head, test_vectors, test_labels) > peer - 0.01


def test_the_objective_is_convex_so_the_start_does_not_matter() -> None:
    vectors, labels, centers = clusters(200)
    settings = FitSettings(max_iterations=400, tolerance=1e-9)
    policies = []
    for start in (0.0, 1.0):
        head = OptionHead(torch.from_numpy(centers))
        torch.nn.init.constant_(head.weight, start)
        fit_head(head, vectors, TargetRows.from_labels(labels, 4), settings=settings)
        policies.append(head.policy(vectors))
    np.testing.assert_allclose(*policies, atol=5e-3)


def test_failures_alone_teach_the_option_that_is_left() -> None:
    vectors, labels, _ = clusters(300)
    possible = np.ones((300, 4), dtype=bool)
    random = np.random.default_rng(0)
    for row, label in enumerate(labels):
        possible[row, random.permutation([option for option in range(4) if option != label])[:2]] = False
    rows = TargetRows.of(Objective.LIKELIHOOD, possible)
    head = OptionHead(torch.zeros(4, 16))
    fit_head(head, vectors, rows)
    assert accuracy(head, vectors, labels) > 0.9


def test_soft_targets_are_matched() -> None:
    vectors = np.eye(2, 8, dtype=np.float32).repeat(50, axis=0)
    soft = np.array([[0.8, 0.2], [0.3, 0.7]], np.float32).repeat(50, axis=0)
    rows = TargetRows.of(Objective.DISTRIBUTION, soft)
    head = OptionHead(torch.zeros(2, 8))
    fit_head(head, vectors, rows)
    np.testing.assert_allclose(head.policy(vectors), soft, atol=0.03)


def test_weights_count_as_repeated_rows() -> None:
    vectors, labels, centers = clusters(60)
    settings = FitSettings(max_iterations=400, tolerance=1e-9)
    weight = np.where(np.arange(60) < 20, 3.0, 1.0).astype(np.float32)
    rows = TargetRows.from_labels(labels, 4)
    weighted, repeated = OptionHead(torch.from_numpy(centers)), OptionHead(torch.from_numpy(centers))
    fit_head(weighted, vectors, TargetRows.of(Objective.LIKELIHOOD, rows.target, weight), settings=settings)
    index = np.repeat(np.arange(60), weight.astype(int))
    fit_head(repeated, vectors[index], TargetRows.from_labels(labels[index], 4), settings=settings)
    np.testing.assert_allclose(weighted.policy(vectors), repeated.policy(vectors), atol=5e-3)


def test_validation_rows_stop_the_fit_and_keep_the_best() -> None:
    vectors, labels, _ = clusters(40, noise=1.5)
    held_vectors, held_labels, _ = clusters(400, noise=1.5, seed=5)
    held_rows = TargetRows.from_labels(held_labels, 4)
    loose = FitSettings(penalty=1e-6, max_iterations=300, tolerance=0.0)
    free, stopped = OptionHead(torch.zeros(4, 16)), OptionHead(torch.zeros(4, 16))
    long = fit_head(free, vectors, TargetRows.from_labels(labels, 4), settings=loose)
    short = fit_head(
        stopped, vectors, TargetRows.from_labels(labels, 4), validation=(held_vectors, held_rows), settings=loose
    )
    assert short.iterations < long.iterations

    def loss(head: OptionHead) -> float:
        with torch.no_grad():
            return float(held_rows.loss()(head(torch.from_numpy(held_vectors))))

    assert loss(stopped) < loss(free)
    assert short.validation_loss == pytest.approx(loss(stopped), rel=1e-3)


def test_the_shared_map_serves_an_option_without_rows() -> None:
    # Inputs are a fixed rotation of the descriptions: learned on some options, it holds for the others.
    random = np.random.default_rng(3)
    descriptions = np.linalg.qr(random.standard_normal((16, 16)))[0][:12].astype(np.float32)
    rotation = np.linalg.qr(random.standard_normal((16, 16)))[0].astype(np.float32)
    seen = np.arange(10).repeat(20)
    vectors = descriptions[seen] @ rotation + 0.05 * random.standard_normal((200, 16)).astype(np.float32)
    head = OptionHead(torch.from_numpy(descriptions))
    fit_head(head, vectors, TargetRows.from_labels(seen, 12))
    mapped = (
        torch.from_numpy(descriptions @ rotation) @ (torch.eye(16) + head.shared_map.detach()) @ head.option_vectors.T
    )
    assert mapped[:10].argmax(1).tolist() == list(range(10))


def test_the_map_is_fitted_where_descriptions_are_and_is_zero_beside_them() -> None:
    vectors, labels, centers = clusters(60)
    head = OptionHead(torch.from_numpy(centers))
    with torch.no_grad():
        head.shared_map.normal_()
    fit_head(head, vectors, TargetRows.from_labels(labels, 4))
    span = np.linalg.qr(centers.T)[0]
    learned = head.shared_map.detach().numpy()
    assert np.abs(learned).max() > 1e-3
    np.testing.assert_allclose(learned @ span @ span.T, learned, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 3])
def test_rows_and_vectors_must_match(rows: int) -> None:
    with pytest.raises(ValueError, match=f"2 vectors and {rows} rows"):
        fit_head(OptionHead(torch.eye(2)), np.eye(2, dtype=np.float32), TargetRows.from_labels(np.zeros(rows, int), 2))


def test_target_rows_check_their_shapes() -> None:
    with pytest.raises(ValueError, match="Shapes do not fit"):
        TargetRows(np.ones((2, 3), np.float32), np.zeros(3, np.int8), np.ones(2, np.float32))


def test_two_halves_one_after_the_other_teach_as_much_as_both_at_once() -> None:
    vectors, labels, centers = clusters(120, options=12, noise=0.6)
    test_vectors, test_labels, _ = clusters(3000, options=12, noise=0.6, seed=1)
    together, first = OptionHead(torch.from_numpy(centers)), OptionHead(torch.from_numpy(centers))
    fit_head(together, vectors, TargetRows.from_labels(labels, 12))
    fit_head(first, vectors[:60], TargetRows.from_labels(labels[:60], 12))
    half = accuracy(first, test_vectors, test_labels)
    fit_head(first, vectors[60:], TargetRows.from_labels(labels[60:], 12), anchor=Anchor.of(first, 60))
    both = accuracy(first, test_vectors, test_labels)
    assert both > half
    assert both > accuracy(together, test_vectors, test_labels) - 0.03


def test_an_anchored_head_keeps_what_the_new_rows_do_not_speak_of_and_learns_what_they_do() -> None:
    vectors, labels, _ = clusters(400, dimension=64, noise=0.3)
    head = OptionHead(torch.zeros(4, 64))
    fit_head(head, vectors, TargetRows.from_labels(labels, 4))
    new = np.flatnonzero(labels == 0)[:60]
    anchor = Anchor.of(head, 400)
    fit_head(head, vectors[new], TargetRows.from_labels(np.ones(len(new), int), 4), anchor=anchor)  # 0 is 1 from now on
    old = labels > 1
    assert accuracy(head, vectors[old], labels[old]) > 0.95
    zero = labels == 0
    assert accuracy(head, vectors[zero], np.ones(zero.sum(), int)) > 0.9


def test_an_anchor_takes_the_temperature_into_the_weights() -> None:
    vectors, labels, centers = clusters(100)
    head = OptionHead(torch.from_numpy(centers))
    fit_head(head, vectors, TargetRows.from_labels(labels, 4))
    with torch.no_grad():
        head.temperature.fill_(3.0)
    before = head.policy(vectors)
    Anchor.of(head, 100).put_into(head)
    assert float(head.temperature) == 1.0
    np.testing.assert_allclose(head.policy(vectors), before, atol=1e-5)


def test_small_batches_come_near_the_optimum_of_all_rows_and_repeat_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels, centers = clusters(10_000)
    rows = TargetRows.from_labels(labels, 4)
    whole, batched, again = (OptionHead(torch.from_numpy(centers)) for _ in range(3))
    exact = fit_head(whole, vectors, rows)
    monkeypatch.setattr(fit, "MINI_BATCHES_FROM", 10_000)
    monkeypatch.setattr(minimizing, "BATCH", 64)
    held_out = (vectors[:500], rows.part(np.arange(500)))
    near = fit_head(batched, vectors, rows, validation=held_out)
    assert near.iterations == minimizing.EPOCHS
    assert near.objective == pytest.approx(exact.objective, rel=0.02)
    assert near.validation_loss is not None
    assert accuracy(batched, vectors, labels) == pytest.approx(accuracy(whole, vectors, labels), abs=0.01)
    fit_head(again, vectors, rows, validation=held_out)
    assert torch.equal(again.weight, batched.weight)


def test_a_fit_takes_as_many_rows_at_a_time_as_their_logits_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels, centers = clusters(300)
    rows = TargetRows.from_labels(labels, 4)
    whole, parted = OptionHead(torch.from_numpy(centers)), OptionHead(torch.from_numpy(centers))
    fit_head(whole, vectors, rows)
    monkeypatch.setattr(fit, "PART_LOGITS", 100)
    fit_head(parted, vectors, rows)
    np.testing.assert_allclose(whole.policy(vectors), parted.policy(vectors), atol=1e-3)
