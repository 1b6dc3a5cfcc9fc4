"""The torch head: sentence vectors and option vectors in, logits over options out.

One head covers zero-shot, few-shot and full data. For an input vector x and an option vector t_o,

    logits(x)[o] = (s · (x·(I + M)·t_o + x·w_o) + b_o) / temperature

where t_o is frozen (the encoded description), and w_o, b_o and the map M shared by all options are
learned and zero at the start. Untrained, the head ranks options by cosine similarity to their
descriptions. The map is what options learn from one another: it also serves an option added later.

A route decides with `dspy_router.folded.FoldedHead`, the same in numpy.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dspy_router.folded import PRIOR_SCALE, ZERO_SHOT_TEMPERATURE, FoldedHead


class OptionHead(nn.Module):
    """Logits over the options of one field.

    Args:
        option_vectors: Float tensor [k, d], one unit vector an option, in declaration order.
        scale: How much a description weighs against what is learned, s above. Positive.
        temperature: Divides the logits. Positive; smaller is more confident.

    Example:
        >>> head = OptionHead(torch.eye(3))
        >>> head(torch.tensor([[0.0, 1.0, 0.0]])).argmax().item()
        1
    """

    fewest: ClassVar[int] = 2  # options
    folded_form: ClassVar[type[FoldedHead]] = FoldedHead
    fused_steps: ClassVar[int] = 0  # of all optimizers
    option_vectors: Tensor
    scale: Tensor
    temperature: Tensor

    def __init__(
        self, option_vectors: Tensor, *, scale: float = PRIOR_SCALE, temperature: float = ZERO_SHOT_TEMPERATURE
    ) -> None:
        super().__init__()
        if option_vectors.ndim != 2:
            raise ValueError(f"option_vectors must be [options, dimension], got shape {tuple(option_vectors.shape)}.")
        count, dimension = option_vectors.shape
        self.register_buffer("option_vectors", option_vectors.detach().clone().float())
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.weight = nn.Parameter(torch.zeros(count, dimension))
        self.bias = nn.Parameter(torch.zeros(count))
        self.shared_map = nn.Parameter(torch.zeros(dimension, dimension))
        self._folded: tuple[tuple[int, ...], FoldedHead] | None = None

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits [n, k] of input vectors [n, d]; differentiable in the head's parameters."""
        weights, biases = self.linear()
        return vectors @ weights.T + biases

    def linear(self) -> tuple[Tensor, Tensor]:
        """The head as one linear layer: weights [k, d] and biases [k], temperature included."""
        prior = self.option_vectors + self.option_vectors @ self.shared_map.T
        return self.scale * (prior + self.weight) / self.temperature, self.bias / self.temperature

    def policy(self, vectors: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
        """Probabilities [n, k], float64, of input vectors [n, d]; see `FoldedHead`.

        Parameters that are changed through `.data`, which torch does not count as a change, are seen only after
        another change: use `torch.no_grad()`.
        """
        return self.folded().policy(vectors, candidates)

    def chosen(self, vectors: np.ndarray) -> np.ndarray:
        """Int [n]: the likeliest options for vectors [n, d]; of a list bool [n, k]."""
        return self.folded().chosen(vectors)

    def begin_training(self) -> None:
        """Take the form in which a head is fitted."""
        self.temperature.fill_(1.0)

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """Logits [n, k] of input vectors [n, d], from the folded head: no gradient."""
        return self.folded().logits(vectors)

    @property
    def digest(self) -> str:
        """Two heads with one digest have the same policy."""
        return self.folded().digest

    def folded(self) -> FoldedHead:
        """The head as it decides; folded again only after a parameter has changed."""
        version = self._changes()
        if self._folded is None or self._folded[0] != version:
            parameters = {name: _array(tensor) for name, tensor in self.state_dict().items()}
            self._folded = version, self.folded_form(parameters)
        return self._folded[1]

    @classmethod
    def unfolded(cls, folded: FoldedHead) -> "OptionHead":
        """The torch form of a head, with parameters of its own."""
        with torch.inference_mode(False):  # whose tensors could never be trained, nor their changes seen
            parameters = {name: torch.tensor(value) for name, value in folded.parameters.items()}
            head = cls(parameters["option_vectors"])
            head.load_state_dict(parameters)
        return head

    def with_added(
        self, option_vectors: Tensor, weights: Tensor | None = None, biases: Tensor | None = None
    ) -> "OptionHead":
        """A head with m more options behind the others, whose logits stay exactly as they were.

        Args:
            option_vectors: Float [m, d], the descriptions' unit vectors.
            weights: Float [m, d]: the new logits are x · weights + biases, over the temperature. By default they have
                their descriptions as the prior.
            biases: Float [m]; zero by default.

        Raises:
            ValueError: If the shapes do not fit.

        Example:
            >>> head = OptionHead(torch.eye(2, 3)).with_added(torch.eye(3)[2:])
            >>> head(torch.eye(3)).argmax(dim=1).tolist()
            [0, 1, 2]
        """
        count, dimension = len(option_vectors), self.option_vectors.shape[1]
        if option_vectors.shape != (count, dimension):
            raise ValueError(f"New options must be [m, {dimension}], got shape {tuple(option_vectors.shape)}.")
        with torch.no_grad():
            option_vectors = option_vectors.to(self.option_vectors)
            prior = option_vectors + option_vectors @ self.shared_map.T
            own = torch.zeros_like(prior) if weights is None else weights.to(prior) / self.scale - prior
            bias = self.bias.new_zeros(count) if biases is None else biases.to(self.bias)
            if own.shape != prior.shape or bias.shape != (count,):
                raise ValueError(
                    f"Weights {tuple(own.shape)} and biases {tuple(bias.shape)} do not fit {count} new options."
                )
            return self._of(
                torch.cat([self.option_vectors, option_vectors]),
                torch.cat([self.weight, own]),
                torch.cat([self.bias, bias]),
            )

    def without(self, options: Sequence[int]) -> "OptionHead":
        """A head without the options at these indices; the logits of the others stay exactly as they were.

        Raises:
            ValueError: If an index is none of an option, or fewer than two options would be left (one, in a list).

        Example:
            >>> OptionHead(torch.eye(3)).without([1])(torch.eye(3)).argmax(dim=1).tolist()
            [0, 0, 1]
        """
        count = len(self.bias)
        if wrong := [option for option in options if not 0 <= option < count]:
            raise ValueError(f"There is no option at {wrong}: there are {count}.")
        kept = [option for option in range(count) if option not in set(options)]
        if len(kept) < self.fewest:
            raise ValueError(f"Without {sorted(set(options))} there would be {len(kept)} of {count} options left.")
        with torch.no_grad():
            return self._of(self.option_vectors[kept], self.weight[kept], self.bias[kept])

    def _of(self, option_vectors: Tensor, weight: Tensor, bias: Tensor) -> "OptionHead":
        """A head over other options, with this one's map, scale and temperature; nothing is shared."""
        other = self._like(option_vectors)
        for name, value in (("weight", weight), ("bias", bias), ("shared_map", self.shared_map)):
            own, parameter = getattr(self, name), nn.Parameter(value.detach().clone())
            setattr(other, name, parameter.requires_grad_(own.requires_grad))
        return other.train(self.training)

    def _like(self, option_vectors: Tensor) -> "OptionHead":
        """An untrained head over other options with this one's settings."""
        other = type(self)(option_vectors)
        for name, buffer in self.named_buffers():
            if name != "option_vectors":
                other.get_buffer(name).copy_(buffer)
        return other

    def _changes(self) -> tuple[int, ...]:
        """Another one after every change of a parameter or buffer that torch counts, and every fused step."""
        tensors = [tensor for tensor in (*self._parameters.values(), *self._buffers.values()) if tensor is not None]
        addresses, versions = (tensor.data_ptr() for tensor in tensors), (tensor._version for tensor in tensors)
        return (OptionHead.fused_steps, *addresses, *versions)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}

    def __deepcopy__(self, memo: dict[int, object]) -> "OptionHead":
        copied = type(self)(self.option_vectors)
        copied.load_state_dict(self.state_dict())
        for own, other in zip(self.parameters(), copied.parameters(), strict=True):
            other.requires_grad_(own.requires_grad)
        memo[id(self)] = copied
        return copied.train(self.training)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    found: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has none
    return found


def _count_fused_step(optimizer: Optimizer, *arguments: Any) -> None:
    if any(group.get("fused") for group in optimizer.param_groups):
        OptionHead.fused_steps += 1


register_optimizer_step_post_hook(_count_fused_step)  # torch does not count what a fused step changes


class RouteHead(nn.Module):
    """The heads of a route, one a field, over one input vector.

    Indexable by field name. Called with vectors [n, d] it gives the logits of every field, by name.
    """

    def __init__(self, fields: Sequence[str], heads: Sequence[OptionHead]) -> None:
        super().__init__()
        self.fields = tuple(fields)
        self.heads = nn.ModuleList(heads)

    def __getitem__(self, field: str) -> OptionHead:
        head = self.heads[self.fields.index(field)]
        assert isinstance(head, OptionHead)
        return head

    def forward(self, vectors: Tensor) -> dict[str, Tensor]:
        """Logits [n, k] of every field, by name, of vectors [n, d]."""
        return {field: self[field](vectors) for field in self.fields}
