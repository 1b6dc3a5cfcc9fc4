import numpy as np
import pytest
import torch

from dspy_router import scan
from dspy_router.heads import OptionHead


def unit(rows: int, dimension: int = 24, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def trained(options: int = 5000) -> OptionHead:
    torch.manual_seed(0)
    head = OptionHead(torch.from_numpy(unit(options)))
    with torch.no_grad():
        head.weight.normal_(std=0.3)
        head.bias.normal_(std=0.5)
    return head


def test_the_scan_decides_as_full_precision_does_and_keeps_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    head, inputs = trained(), unit(200, seed=1)
    expected = head.logits(inputs)
    monkeypatch.setattr(scan, "FEWEST", 1000)
    head.folded().__dict__.pop("_scan", None)
    found = np.stack([head.logits(vector) for vector in inputs])
    assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(found.max(axis=1), expected.max(axis=1), rtol=1e-5)
    weights = head.folded().weights
    bound = scan.ROUNDING * np.linalg.norm(weights, axis=1)
    error = np.abs(found - expected)
    assert error.max() > 1e-4  # it was the scan
    assert (error <= bound).all()
    np.testing.assert_allclose(
        np.exp(found).sum(axis=1), np.exp(expected).sum(axis=1), rtol=1e-3
    )  # what the softmax divides by
    assert head.logits(inputs[:1]).shape == (1, 5000)


def test_options_too_near_for_half_precision_are_told_apart() -> None:
    vector = unit(1)[0]
    weights = np.repeat(vector[None], 50, axis=0)
    weights[7] *= np.float32(1 + 1e-5)
    found = scan.HalfPrecisionScan(np.concatenate([weights, unit(1000, seed=2)]), np.zeros(1050, np.float32))
    assert found.logits(vector).argmax() == 7


def test_a_tie_of_all_options_goes_to_the_first() -> None:
    biases = np.zeros(300, np.float32)
    assert scan.HalfPrecisionScan(unit(300), biases).logits(np.zeros(24, np.float32)).argmax() == 0


def test_weights_beyond_the_range_of_half_precision_are_not_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "FEWEST", 2)
    assert scan.scan_of(np.ones((300, 2), np.float32), np.zeros(300, np.float32)) is not None
    assert scan.scan_of(np.full((300, 2), -1e5, np.float32), np.zeros(300, np.float32)) is None
