import copy

import numpy as np
import pytest
import torch

from dspy_router.heads import OptionHead, RouteHead, softmax


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
