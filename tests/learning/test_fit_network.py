import numpy as np
import pytest
import torch

from dspy_router.encoders.token import TokenEncoder
from dspy_router.heads import OptionHead
from dspy_router.learning.fit_network import NetworkTask, fit_network
from dspy_router.learning.rows import TargetRows

TEXTS = [
    f"{subject} {verb}" for subject in ("the cat", "a dog", "my bird", "one fish") for verb in ("sleeps", "runs")
] * 8
LABELS = np.array([0, 1] * (len(TEXTS) // 2))


@pytest.mark.parametrize("layer", ["gru", "attention"])
def test_network_and_head_learn_together(layer: str) -> None:
    encoder = TokenEncoder(32, layer=layer)
    head = OptionHead(torch.zeros(2, 32))
    before = encoder.encode(["the cat sleeps"])
    epochs = fit_network(
        encoder.network, [NetworkTask(head, encoder.token_ids(TEXTS), TargetRows.from_labels(LABELS, 2))]
    )
    assert 0 < epochs <= 40
    assert not np.allclose(before, encoder.encode(["the cat sleeps"]))
    assert head.policy(encoder.encode(["a cat sleeps", "the bird runs"])).argmax(1).tolist() == [0, 1]


def test_a_seed_repeats_the_fit_and_leaves_torch_alone() -> None:
    results = []
    for _ in range(2):
        encoder, head = TokenEncoder(32), OptionHead(torch.zeros(2, 32))
        state = torch.random.get_rng_state()
        fit_network(encoder.network, [NetworkTask(head, encoder.token_ids(TEXTS), TargetRows.from_labels(LABELS, 2))])
        assert torch.equal(state, torch.random.get_rng_state())
        results.append(head.weight.detach().clone())
    assert torch.equal(*results)


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        fit_network(TokenEncoder(32).network, [])
