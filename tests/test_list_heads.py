import copy

import numpy as np
import pytest
import torch

from dspy_router.folded_lists import FAIR_SHARE, NO_FIT
from dspy_router.list_heads import ListHead


def vectors(count: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture
def head() -> ListHead:
    return ListHead(torch.from_numpy(vectors(5)))


def fitted(head: ListHead) -> ListHead:
    head = copy.deepcopy(head)
    head.begin_training()
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
        head.bias.fill_(-1.0)
    return head


def test_an_untrained_head_takes_every_option_with_a_fair_share(head: ListHead) -> None:
    inputs = vectors(40, seed=1)
    cosines = np.concatenate([inputs @ head.option_vectors.numpy().T, np.full((40, 1), NO_FIT)], axis=1)
    shares = np.exp(20 * cosines) / np.exp(20 * cosines).sum(axis=1, keepdims=True)
    assert np.array_equal(head.chosen(inputs), shares[:, :-1] >= FAIR_SHARE)
    assert np.allclose(head.policy(inputs), shares[:, :-1] / (shares[:, :-1] + FAIR_SHARE), atol=1e-5)


def test_a_trained_head_decides_each_option_by_itself(head: ListHead) -> None:
    inputs = vectors(40, seed=1)
    trained = fitted(head)
    policy = trained.policy(inputs)
    assert np.allclose(policy, 1 / (1 + np.exp(-trained(torch.from_numpy(inputs)).detach().numpy())), atol=1e-5)
    assert np.allclose(trained.without([0, 1]).policy(inputs), policy[:, 2:], atol=1e-6)
    assert np.allclose(
        trained.with_added(torch.from_numpy(vectors(2, seed=3))).policy(inputs)[:, :5], policy, atol=1e-6
    )


@pytest.mark.parametrize("trained", [False, True])
def test_torch_and_numpy_agree_and_copies_keep_the_form(head: ListHead, trained: bool) -> None:
    head = fitted(head) if trained else head
    inputs = vectors(20, seed=2)
    logits = head(torch.from_numpy(inputs)).detach().numpy()
    assert np.allclose(head.logits(inputs), logits, atol=1e-4)
    for same in (copy.deepcopy(head), ListHead.unfolded(head.folded())):
        assert np.array_equal(same.policy(inputs), head.policy(inputs))
        assert same.digest == head.digest


def test_the_digest_tells_the_two_forms_apart(head: ListHead) -> None:
    other = copy.deepcopy(head)
    with torch.no_grad():
        other.apart.fill_(1.0)
    assert other.digest != head.digest


def test_candidates_are_compared_with_one_another_alone(head: ListHead) -> None:
    mask = np.array([True, False, True, False, False])
    inputs = vectors(20, seed=2)
    masked = head.policy(inputs, mask)
    assert not masked[:, ~mask].any()
    assert np.allclose(masked[:, mask], head.without([1, 3, 4]).policy(inputs), atol=1e-6)
    assert np.array_equal(fitted(head).policy(inputs, mask)[:, mask], fitted(head).policy(inputs)[:, mask])
    with pytest.raises(ValueError, match="No option is a candidate"):
        head.policy(inputs, np.zeros(5, bool))


def test_certainty_is_the_log_probability_of_what_is_chosen(head: ListHead) -> None:
    inputs = vectors(10, seed=4)
    policy = head.policy(inputs)
    assert np.allclose(
        head.folded().certainty(inputs), np.log(np.where(head.chosen(inputs), policy, 1 - policy)).sum(axis=1)
    )


def test_one_option_may_be_left_but_not_none(head: ListHead) -> None:
    assert head.without([0, 1, 2, 3]).policy(vectors(3)).shape == (3, 1)
    with pytest.raises(ValueError, match="0 of 5 options left"):
        head.without(range(5))
