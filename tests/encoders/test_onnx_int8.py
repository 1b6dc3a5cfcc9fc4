import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array

from dspy_router import OnnxEncoder
from dspy_router.encoders import onnx_int8
from dspy_router.encoders.onnx_int8 import PRECISE, int8_graph

FLOAT, INT8, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT64


def lookup_and_product(path: Path, depth: int, scales_by: str = "columns") -> Path:
    """A graph that looks up rows of an int8 table and multiplies them with an int8 matrix, both made float before."""
    rng = np.random.default_rng(0)
    table, weight = (rng.integers(-127, 128, shape, np.int8) for shape in ((50, depth), (depth, 30)))
    shape = {"columns": (1, 30), "rows": (depth, 1)}[scales_by]
    tensors = {
        "table": table,
        "table_scales": rng.random((50, 1), np.float32) / 100,
        "weight": weight,
        "weight_scales": rng.random(shape, np.float32) / 100,
    }
    nodes = [
        make_node("Cast", ["table"], ["table_float"], to=FLOAT),
        make_node("Mul", ["table_float", "table_scales"], ["table_scaled"]),
        make_node("Gather", ["table_scaled", "ids"], ["rows"]),
        make_node("Cast", ["weight"], ["weight_float"], to=FLOAT),
        make_node("Mul", ["weight_float", "weight_scales"], ["weight_scaled"]),
        make_node("MatMul", ["rows", "weight_scaled"], ["out"]),
    ]
    graph = make_graph(
        nodes,
        "lookup_and_product",
        [make_tensor_value_info("ids", INT64, ["n", "length"])],
        [make_tensor_value_info("out", FLOAT, ["n", "length", 30])],
        [from_array(value, name) for name, value in tensors.items()],
    )
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=10), path)
    return path


def run(model: str | bytes, ids: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"ids": ids})[0]


def operators(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


def gelu(x: str, out: str) -> list[onnx.NodeProto]:
    """As PyTorch exports it, with the numbers `root`, `one` and `half`."""
    return [
        make_node("Div", [x, "root"], [f"{x}.scaled"]),
        make_node("Erf", [f"{x}.scaled"], [f"{x}.erf"]),
        make_node("Add", [f"{x}.erf", "one"], [f"{x}.above"]),
        make_node("Mul", ["half", f"{x}.above"], [f"{x}.share"]),
        make_node("Mul", [x, f"{x}.share"], [out]),
    ]


IDS = np.random.default_rng(1).integers(0, 50, (4, 7))


@pytest.mark.parametrize("depth", [100, 256])
def test_products_and_tables_stay_int8_and_give_the_same(tmp_path: Path, depth: int) -> None:
    file = lookup_and_product(tmp_path / "model.onnx", depth)
    model = int8_graph(file)
    assert operators(model) == ["LookUp", "Quantize", "Multiply"]
    stored = {tensor.name: tensor for tensor in onnx.load_from_string(model).graph.initializer}
    assert {name for name, tensor in stored.items() if tensor.data_type == INT8} == {"table", "weight.extended"}
    assert len(stored) == 4  # and their scales
    extended, weight = to_array(stored["weight.extended"]).astype(int), stored_weight(file)
    assert (extended[:depth] == weight).all()
    assert not extended.sum(axis=0).any()
    expected, found = run(str(file), IDS), run(model, IDS)
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9999


def stored_weight(file: Path) -> np.ndarray:
    return next(to_array(tensor) for tensor in onnx.load(file).graph.initializer if tensor.name == "weight")


def test_each_word_has_a_scale_and_a_zero_of_its_own(tmp_path: Path) -> None:
    """A word piece with numbers a thousand times as large, or all above 0, or all 0, takes nothing from the others."""
    words = np.random.default_rng(2).standard_normal((2, 4, 256)).astype(np.float32)
    words[0, 1] *= 1000
    words[0, 2] += 50
    words[1, 0], words[1, 1], words[1, 2] = 0, 3, -3
    weight = np.random.default_rng(3).integers(-127, 128, (256, 30)).astype(np.int8)
    weight[:, 0] = 127  # the largest sum a column can have
    file = product(tmp_path / "model.onnx", weight)
    expected = run_product(str(file), words)
    found = run_product(int8_graph(file), words)
    step = (np.maximum(words, 0).max(axis=-1) - np.minimum(words, 0).min(axis=-1)) / 255
    bound = step[..., None] * 0.51 * np.abs(weight.astype(float) / 100).sum(axis=0)
    assert (np.abs(found - expected) <= bound + 1e-3).all()
    assert not found[1, 0].any()
    np.testing.assert_allclose(found[1, 1:3], expected[1, 1:3], rtol=1e-4, atol=1e-3)


def product(path: Path, weight: np.ndarray) -> Path:
    """A graph that multiplies `words` with an int8 matrix, whose scales are 0.01."""
    nodes = [
        make_node("Cast", ["weight"], ["weight_float"], to=FLOAT),
        make_node("Mul", ["weight_float", "weight_scales"], ["weight_scaled"]),
        make_node("MatMul", ["words", "weight_scaled"], ["out"]),
    ]
    depth, width = weight.shape
    graph = make_graph(
        nodes,
        "product",
        [make_tensor_value_info("words", FLOAT, ["n", "length", depth])],
        [make_tensor_value_info("out", FLOAT, ["n", "length", width])],
        [from_array(weight, "weight"), from_array(np.full((1, width), 0.01, np.float32), "weight_scales")],
    )
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=10), path)
    return path


def run_product(model: str | bytes, words: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"words": words})[0]


def test_a_rows_product_does_not_depend_on_the_others(tmp_path: Path) -> None:
    model = int8_graph(lookup_and_product(tmp_path / "model.onnx", depth=256))
    together = run(model, IDS)
    alone = np.concatenate([run(model, ids[None]) for ids in IDS])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_products_with_other_scales_are_left_as_they_are(tmp_path: Path) -> None:
    file = lookup_and_product(tmp_path / "model.onnx", depth=256, scales_by="rows")
    model = int8_graph(file)
    assert operators(model)[-3:] == ["Cast", "Mul", "MatMul"]
    np.testing.assert_allclose(run(model, IDS), run(str(file), IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("half", "found"), [(0.5, ["Gelu"]), (0.6, ["Div", "Erf", "Add", "Mul", "Mul"])])
def test_a_gelu_that_is_written_out_becomes_one_node_and_nothing_else_does(
    tmp_path: Path, half: float, found: list[str]
) -> None:
    numbers = {"root": math.sqrt(2), "one": 1.0, "half": half}
    graph = make_graph(
        gelu("words", "out"),
        "gelu",
        [make_tensor_value_info("words", FLOAT, ["n"])],
        [make_tensor_value_info("out", FLOAT, ["n"])],
        [from_array(np.float32(value), name) for name, value in numbers.items()],
    )
    file = tmp_path / "model.onnx"
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=10), file)
    assert operators(int8_graph(file)) == found
    words = np.linspace(-4, 4, 50, dtype=np.float32)
    np.testing.assert_allclose(run_product(int8_graph(file), words), run_product(str(file), words), atol=1e-6)


def test_all_products_with_the_default_models_weights_are_in_int8() -> None:
    from dspy_router.encoders import onnx as encoder

    found = operators(int8_graph(encoder._files(encoder.DEFAULT_MODEL)[0]))
    assert found.count("Multiply") == 36  # six layers of six
    assert found.count("Quantize") == 24  # queries, keys and values have the same input
    assert found.count("MatMul") == 12  # of attention, which has no weights
    assert found.count("Gelu") == 6
    one, other = OnnxEncoder(arithmetic="int8"), OnnxEncoder()
    texts = ["will it rain in Oslo tomorrow?", "put on some jazz", "transfer 500 dollars to my savings account"]
    assert (one.encode(texts) * other.encode(texts)).sum(axis=1).min() > 0.998


def test_a_texts_vector_is_the_same_alone_and_in_any_batch() -> None:
    texts = ["put on some jazz", "will it rain in Oslo tomorrow, and if so, from when on?", "a", "how do I " * 20]
    encoder = OnnxEncoder(arithmetic="int8", cache_size=0)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    model = encoder._model
    padded = model.vectors([model.tokenizer.encode(text) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), alone, atol=1e-6)
    np.testing.assert_allclose(padded / np.linalg.norm(padded, axis=1, keepdims=True), alone, atol=1e-6)


def test_a_processor_whose_products_overflow_takes_precise_ones_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = ["will it rain in Oslo tomorrow?", "put on some jazz"]
    found = OnnxEncoder(arithmetic="int8").encode(texts)
    monkeypatch.setattr(onnx_int8, "products_overflow", lambda: True)
    encoder = OnnxEncoder(arithmetic="int8")
    np.testing.assert_allclose(encoder.encode(texts), found, atol=1e-5)
    name, value = PRECISE
    assert encoder._model.session.get_session_options().get_session_config_entry(name) == value
