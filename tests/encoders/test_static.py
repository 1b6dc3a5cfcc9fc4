import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model2vec import StaticModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dspy_router import DifferentiableRoute, RouteError, StaticEncoder
from dspy_router.encoders.choose import encoder_from_settings, encoder_settings
from dspy_router.encoders.distill import distill, main, smooth_inverse_frequencies

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]"]
CONTENT = "play music song rain weather forecast the a in ##s oslo tomorrow jazz city will it"
WORDS = [*SPECIAL, *CONTENT.split(" ")]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of one small random layer, in a folder."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def static_folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static")
    main([str(folder), "--model", str(small_model)])
    return folder


def test_a_text_is_the_mean_of_its_words(static_folder: Path) -> None:
    encoder = StaticEncoder(static_folder)
    table = encoder.static_model.embedding
    vectors = encoder.encode(["play music", "music play", "Plays", "", "it"])
    assert vectors.shape == (5, 16)
    mean = table[WORDS.index("play")] + table[WORDS.index("music")]
    np.testing.assert_allclose(vectors[0], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    assert not np.allclose(vectors[2], vectors[4])
    assert not vectors[3].any()
    np.testing.assert_allclose(encoder.encode_one("play music"), vectors[0], atol=1e-6)


def test_each_word_piece_passes_alone_through_the_model(small_model: Path, static_folder: Path) -> None:
    table = StaticModel.from_pretrained(static_folder).embedding
    words = ["play", "music", "oslo", "weather"]
    found = SentenceTransformer(str(small_model), device="cpu").encode(words)
    weights = smooth_inverse_frequencies(len(WORDS) - 1)
    ids = [WORDS.index(word) for word in words]
    undone = table[ids] / weights[[number - 1 for number in ids]][:, None]  # the unused piece is left out
    # Principal components turn and shift the vectors, which keeps distances.
    distances = np.linalg.norm(found[:, None] - found, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(undone[:, None] - undone, axis=-1), distances, rtol=1e-3, atol=1e-5)
    assert not table[WORDS.index("[unused0]")].any()


def test_fewer_dimensions(small_model: Path, tmp_path: Path) -> None:
    distill(tmp_path, str(small_model), dimension=4)
    assert StaticEncoder(tmp_path).dimension == 4


def test_a_route_decides_with_it(static_folder: Path, tmp_path: Path) -> None:
    tools = {"play": "play a song", "weather": "the weather forecast"}
    route = DifferentiableRoute("text -> tool", tools=tools, encoder=StaticEncoder(static_folder))
    assert route(text="will it rain, the weather forecast in oslo").tool == "weather"
    route.save(tmp_path / "route.json")
    again = DifferentiableRoute("text -> tool", tools=tools, encoder=StaticEncoder(static_folder))
    again.load(tmp_path / "route.json")
    with pytest.raises(RouteError, match="was saved with the encoder model2vec:"):
        DifferentiableRoute("text -> tool", tools=tools).load(tmp_path / "route.json")


def test_it_is_made_again_from_its_settings_and_its_pickle(static_folder: Path) -> None:
    encoder = StaticEncoder(static_folder)
    settings = encoder_settings(encoder)
    assert settings is not None
    for other in (encoder_from_settings(settings), pickle.loads(pickle.dumps(encoder))):
        assert other.fingerprint == encoder.fingerprint
    assert encoder_from_settings(settings) is encoder_from_settings(settings)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RouteError, match=r"holds no model.safetensors. python -m dspy_router.encoders.distill"):
        StaticEncoder(tmp_path).encode_one("a text")
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(RouteError, match=r"pip install 'dspy-router\[static\]'"):
        StaticEncoder(tmp_path).encode_one("a text")
