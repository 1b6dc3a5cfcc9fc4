import copy

import numpy as np
import pytest
import torch

from dspy_router.folded import softmax
from dspy_router.heads import OptionHead, RouteHead


def trained_head(options: int = 4, dimension: int = 6, seed: int = 0) -> OptionHead:
    torch.manual_seed(seed)
    head = OptionHead(torch.nn.functional.normalize(torch.randn(options, dimension), dim=1))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def test_untrained_head_ranks_by_cosine_to_the_descriptions() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    head = OptionHead(torch.eye(3))
    assert torch.equal(head(vectors).argmax(1), vectors.argmax(1))


def test_logits_follow_the_formula() -> None:
    head = trained_head()
    x = torch.randn(2, 6)
    t, w, m = head.option_vectors, head.weight, head.shared_map
    expected = (head.scale * ((x + x @ m) @ t.T + x @ w.T) + head.bias) / head.temperature
    torch.testing.assert_close(head(x), expected)


def test_policy_is_the_softmax_of_the_logits() -> None:
    head = trained_head()
    x = torch.randn(3, 6)
    expected = torch.softmax(head(x).double(), dim=1).detach().numpy()
    np.testing.assert_allclose(head.policy(x.numpy()), expected, rtol=1e-4)


def test_policy_sees_every_change_of_a_parameter() -> None:
    head = trained_head()
    x = np.eye(6, dtype=np.float32)
    before = head.policy(x)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    head(torch.from_numpy(x)).square().sum().backward()
    optimizer.step()
    stepped = head.policy(x)
    assert not np.allclose(before, stepped)
    head.weight.data = torch.zeros_like(head.weight)
    assert not np.allclose(stepped, head.policy(x))


def test_deepcopy_is_independent_and_keeps_what_is_frozen() -> None:
    head = trained_head()
    head.bias.requires_grad_(False)
    copied = copy.deepcopy(head)
    assert torch.equal(copied.weight, head.weight)
    assert not copied.bias.requires_grad
    with torch.no_grad():
        copied.weight.zero_()
    assert bool(head.weight.any())


def test_route_head_has_one_head_a_field_whatever_its_name() -> None:
    # `type` and `keys` are attributes of torch containers.
    heads = RouteHead(["type", "keys"], [trained_head(2), trained_head(3)])
    logits = heads(torch.zeros(1, 6))
    assert {name: tuple(tensor.shape) for name, tensor in logits.items()} == {"type": (1, 2), "keys": (1, 3)}
    assert len(list(heads.parameters())) == 6


def test_option_vectors_must_be_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        OptionHead(torch.zeros(3))


def test_softmax_survives_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([1e5, 1e5], dtype=np.float32)), [0.5, 0.5])


def test_added_options_have_the_prior_or_the_weights_they_are_given() -> None:
    head, x = trained_head(), torch.randn(5, 6)
    vectors, weights, biases = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2)
    prior = head.with_added(vectors)
    expected = head.scale * ((x + x @ head.shared_map) @ vectors.T) / head.temperature
    torch.testing.assert_close(prior(x)[:, 4:], expected)
    given = head.with_added(vectors, weights, biases)
    torch.testing.assert_close(given(x)[:, 4:], (x @ weights.T + biases) / head.temperature, rtol=1e-4, atol=1e-3)
    for larger in (prior, given):
        torch.testing.assert_close(larger(x)[:, :4], head(x))
    assert given.option_vectors.shape == (6, 6)


def test_options_are_removed_without_a_change_to_the_others() -> None:
    head, x = trained_head(), torch.randn(5, 6)
    torch.testing.assert_close(head.without([2, 0])(x), head(x)[:, [1, 3]])
    with pytest.raises(ValueError, match=r"no option at \[4\]"):
        head.without([4])
    with pytest.raises(ValueError, match="1 of 4 options left"):
        head.without([0, 1, 3])


def test_a_head_with_other_options_shares_nothing_and_keeps_what_is_frozen() -> None:
    head = trained_head()
    head.shared_map.requires_grad_(False)
    for other in (head.with_added(torch.zeros(1, 6)), head.without([0])):
        assert [parameter.requires_grad for parameter in other.parameters()] == [True, True, False]
        with torch.no_grad():
            other.shared_map.zero_()
    assert bool(head.shared_map.any())
    with pytest.raises(ValueError, match=r"must be \[m, 6\]"):
        head.with_added(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="do not fit 1 new options"):
        head.with_added(torch.zeros(1, 6), torch.zeros(2, 6))


def test_candidates_share_what_the_others_had_in_proportion() -> None:
    head, x = trained_head(), np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    candidates = np.array([True, False, True, False])
    policy = head.policy(x)
    expected = policy * candidates / (policy * candidates).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(head.policy(x, candidates), expected, rtol=1e-6)
    each = np.array([[True] * 4, candidates, ~candidates])
    np.testing.assert_allclose(head.policy(x, each)[1], expected[1], rtol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        head.policy(x, np.zeros(4, bool))
    with pytest.raises(ValueError, match="must be bool"):
        head.policy(x, np.array([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="must be bool"):
        head.policy(x, np.ones(3, bool))
