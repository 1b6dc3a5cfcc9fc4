"""The torch module behind `TokenEncoder`."""

import math

import torch
from torch import Tensor, nn


class TokenNetwork(nn.Module):
    """Embedding, one recurrent or attention layer, mean over the tokens, linear, unit length.

    Args:
        dimension: Width of every layer and of the output.
        layer: `"gru"` or `"attention"`.
        vocabulary: Rows of the embedding; id 0 is padding.
        seed: Of the initial weights; torch's global generator is left as it was.
    """

    def __init__(self, dimension: int, layer: str, vocabulary: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, dimension, padding_idx=0)
            self.layer: nn.Module = (
                nn.GRU(dimension, dimension // 2, batch_first=True, bidirectional=True)
                if layer == "gru"
                else nn.TransformerEncoderLayer(dimension, 4, 2 * dimension, dropout=0.1, batch_first=True)
            )
            self.linear = nn.Linear(dimension, dimension)
        self.dropout = nn.Dropout(0.3)

    def forward(self, ids: Tensor) -> Tensor:
        """Unit vectors [n, dimension] of token ids [n, l]."""
        present = ids != 0
        embedded = self.dropout(self.embedding(ids))
        if isinstance(self.layer, nn.GRU):
            lengths = present.sum(1).clamp(min=1)
            packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            hidden, _ = nn.utils.rnn.pad_packed_sequence(
                self.layer(packed)[0], batch_first=True, total_length=ids.shape[1]
            )
        else:
            attended = present.clone()
            attended[:, 0] = True  # a row that is all padding must attend to something
            hidden = self.layer(embedded + sinusoids(ids.shape[1], embedded.shape[2]), src_key_padding_mask=~attended)
        weights = present.unsqueeze(2).float()
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return nn.functional.normalize(self.linear(self.dropout(pooled)), dim=1)


def sinusoids(length: int, dimension: int) -> Tensor:
    """Position vectors [length, dimension] (Vaswani et al., 2017, section 3.5)."""
    frequencies = torch.exp(torch.arange(0, dimension, 2) * (-math.log(10_000.0) / dimension))
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).reshape(length, dimension)
