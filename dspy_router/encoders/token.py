"""A small trainable network on tokens, for those who want no pre-trained model at all.

Embedding, then one recurrent or attention layer, then a linear layer: the controller of the article this
package grew from, with the softmax in the head. It is the one encoder that `RouteFinetune` trains.
"""

import copy
import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from dspy_router.encoders.base import Encoder, Fingerprint, encodable
from dspy_router.errors import RouteError

if TYPE_CHECKING:
    import numpy as np
    import torch

_TOKEN = re.compile(r"\w+|[^\w\s]")


class TokenEncoder(Encoder):
    """Trainable token encoder: hashed words, one layer, unit vectors.

    Words are lower-cased and hashed into `vocabulary` rows, so there is no vocabulary to build or to save and
    no unknown word. Unlike the frozen encoders it is part of what is trained: `deepcopy` copies it, a
    program's saved state holds its weights, and nothing is cached. Before training its vectors mean little;
    give it labels or a teacher first.

    Args:
        dimension: Length of a vector.
        layer: `"gru"` (bidirectional) or `"attention"` (one transformer layer with sinusoidal positions).
        vocabulary: Rows of the embedding table.
        max_tokens: Longer texts are cut there.
        seed: Of the initial weights.
    """

    trainable = True

    def __init__(
        self,
        dimension: int = 128,
        *,
        layer: Literal["gru", "attention"] = "gru",
        vocabulary: int = 8192,
        max_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(cache_size=0)
        if layer not in ("gru", "attention"):
            raise RouteError(f"layer={layer!r} is unknown; give 'gru' or 'attention'.")
        if dimension < 8 or dimension % 8:
            raise RouteError(f"dimension={dimension} must be a positive multiple of 8.")
        self.size = dimension
        self.layer = layer
        self.vocabulary = vocabulary
        self.max_tokens = max_tokens
        self.seed = seed
        self._network: torch.nn.Module | None = None

    @property
    def network(self) -> "torch.nn.Module":
        """The torch module: token ids [n, l] (0 is padding) to unit vectors [n, dimension]."""
        if self._network is None:
            from dspy_router.encoders.token_network import TokenNetwork

            self._network = TokenNetwork(self.size, self.layer, self.vocabulary, self.seed)
        return self._network

    def take_weights(self, weights: "Mapping[str, np.ndarray]", route: Any) -> None:
        """Take over the weights that were saved with a route, of the names and shapes of `network`'s.

        Args:
            weights: The network's saved state, float32.
            route: The `RouteParameter` they were saved with.

        Raises:
            RouteError: If another route that uses this encoder was loaded with other weights: its head would be lost.
        """
        import torch

        state = {name: torch.tensor(weight) for name, weight in weights.items()}
        if not all(torch.equal(tensor, state[name]) for name, tensor in self.network.state_dict().items()):
            if self._loaded and route.origin not in self._loaded:
                raise RouteError(
                    f"{self!r} is shared by routes that were saved with different weights of it, so one of their heads "
                    "would be lost. Give each of these routes a TokenEncoder of its own, or train and save them as one "
                    "program."
                )
            self._loaded.clear()
        self.network.load_state_dict(state)
        self._loaded[route.origin] = route

    def token_ids(self, texts: list[str]) -> "torch.Tensor":
        """Hashed token ids, int64 [n, l], padded with 0; texts without a token get one padding id."""
        import torch

        rows = [
            [_hashed(token, self.vocabulary) for token in _TOKEN.findall(encodable(text).lower())[: self.max_tokens]]
            for text in texts
        ]
        ids = torch.zeros(len(rows), max(1, *map(len, rows)) if rows else 1, dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        return ids

    def _reset_runtime(self) -> None:
        super()._reset_runtime()
        # The routes whose saved weights the network was loaded with, by origin: the same in a program's copies.
        self._loaded: WeakValueDictionary[str, Any] = WeakValueDictionary()

    def _encode_batch(self, texts: list[str]) -> "np.ndarray":
        import torch

        network = self.network.eval()
        with torch.inference_mode():
            vectors: np.ndarray = network(self.token_ids(texts)).numpy()
        return vectors

    def _fingerprint(self) -> Fingerprint:
        # The weights are trained and saved with the route, so only the architecture identifies the encoder.
        name = f"TokenEncoder(layer={self.layer}, vocabulary={self.vocabulary}, max_tokens={self.max_tokens})"
        return Fingerprint(name, "", "", self.size)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenEncoder":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._loaded.update(self._loaded)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        kept = ("size", "layer", "vocabulary", "max_tokens", "seed", "cache_size", "_network")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()

    def __repr__(self) -> str:
        return f"TokenEncoder({self.size}, layer={self.layer!r})"


@lru_cache(maxsize=65_536)
def _hashed(token: str, vocabulary: int) -> int:
    digest = hashlib.blake2b(token.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (vocabulary - 1)
