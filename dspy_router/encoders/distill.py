"""Distil a sentence-transformers model into static embeddings, in a minute on a CPU and without a network.

    python -m dspy_router.encoders.distill FOLDER [--model NAME_OR_FOLDER]

Model2Vec's recipe (Tulkens and van Dongen 2024, "Model2Vec: Fast State-of-the-Art Static Embeddings"): every word
piece passes alone through the model; principal components take away what all of them share; each vector is weighted by
a / (a + p), the smooth inverse frequency of Arora et al. 2017 ("A Simple but Tough-to-Beat Baseline for Sentence
Embeddings"), where p is the piece's probability by Zipf's law, as a vocabulary is ordered by frequency.

It is written out here because model2vec's own `distill` needs an older transformers than this package's tests run with;
what it writes is a model2vec model like any other.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from dspy_router.encoders.sentence import SentenceEncoder
from dspy_router.encoders.weights import DEFAULT_MODEL

SMOOTHING = 1e-4  # a above: model2vec's
PIECES_A_BATCH = 256
UNUSED = re.compile(r"\[unused\d+\]")


def distill(folder: str | Path, model: str = DEFAULT_MODEL, *, dimension: int | None = None) -> None:
    """Write a static model.

    Args:
        folder: Where to.
        model: Name or folder of a sentence-transformers model with a fast tokenizer.
        dimension: Of the vectors; as many as the model's own by default.

    Raises:
        RouteError: If the model cannot be loaded.
    """
    import torch
    from model2vec import StaticModel
    from sklearn.decomposition import PCA
    from tokenizers import Tokenizer

    transformer = SentenceEncoder(model).transformer
    pieces = transformer.tokenizer.get_vocab()
    ids = sorted(number for piece, number in pieces.items() if not UNUSED.fullmatch(piece))
    start, end = transformer.tokenizer("")["input_ids"]
    vectors = []
    with torch.inference_mode():
        for first in tqdm(range(0, len(ids), PIECES_A_BATCH), desc="word pieces", unit="batch"):
            batch = torch.tensor([[start, piece, end] for piece in ids[first : first + PIECES_A_BATCH]])
            features = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
            vectors.append(transformer(features)["sentence_embedding"].numpy())
    found = np.concatenate(vectors)
    components = PCA(dimension or min(found.shape), svd_solver="full").fit_transform(found)
    weighted = components * smooth_inverse_frequencies(len(ids))[:, None]
    table = np.zeros((len(pieces), components.shape[1]), np.float32)
    table[ids] = weighted
    tokenizer = Tokenizer.from_str(transformer.tokenizer.backend_tokenizer.to_str())
    StaticModel(table, tokenizer, normalize=True, base_model_name=model).save_pretrained(folder)


def smooth_inverse_frequencies(count: int) -> np.ndarray:
    """Float64 [count]: the weights a / (a + p) of word pieces ordered by frequency, where p is Zipf's.

    Example:
        >>> smooth_inverse_frequencies(3).round(6)
        array([0.000217, 0.000325, 0.000433])
    """
    ranks = 1 / np.arange(2, count + 2)
    weights: np.ndarray = SMOOTHING / (SMOOTHING + ranks / ranks.sum())
    return weights


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m dspy_router.encoders.distill", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="where to write the static model")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder of a sentence-transformers model")
    parser.add_argument("--dimension", type=int, help="of the vectors; the model's own by default")
    given = parser.parse_args(arguments)
    distill(given.folder, given.model, dimension=given.dimension)


if __name__ == "__main__":
    main()
