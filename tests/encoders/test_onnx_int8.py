from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

from dspy_router import OnnxEncoder
from dspy_router.encoders.onnx_int8 import int8_graph

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


IDS = np.random.default_rng(1).integers(0, 50, (4, 7))


def test_products_and_tables_stay_int8_and_give_the_same(tmp_path: Path) -> None:
    file = lookup_and_product(tmp_path / "model.onnx", depth=256)
    model = int8_graph(file)
    assert operators(model) == ["Gather", "Cast", "Gather", "Mul", "MatMulNBits"]
    assert {tensor.data_type for tensor in onnx.load_from_string(model).graph.initializer} == {
        FLOAT, INT8, onnx.TensorProto.UINT8,
    }  # fmt: skip
    expected, found = run(str(file), IDS), run(model, IDS)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9995


def test_a_rows_product_does_not_depend_on_the_others(tmp_path: Path) -> None:
    model = int8_graph(lookup_and_product(tmp_path / "model.onnx", depth=256))
    together = run(model, IDS)
    alone = np.concatenate([run(model, ids[None]) for ids in IDS])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("depth", "scales_by"), [(100, "columns"), (256, "rows")])
def test_other_products_are_left_as_they_are(tmp_path: Path, depth: int, scales_by: str) -> None:
    file = lookup_and_product(tmp_path / "model.onnx", depth, scales_by)
    model = int8_graph(file)
    assert operators(model)[-3:] == ["Cast", "Mul", "MatMul"]
    np.testing.assert_allclose(run(model, IDS), run(str(file), IDS), rtol=1e-5, atol=1e-6)


def test_all_products_with_the_default_models_weights_are_in_int8() -> None:
    from dspy_router.encoders import onnx as encoder

    found = operators(int8_graph(encoder._files(encoder.DEFAULT_MODEL)[0]))
    assert found.count("MatMulNBits") == 36  # six layers of six
    assert found.count("MatMul") == 12  # of attention, which has no weights
    one, other = OnnxEncoder(arithmetic="int8"), OnnxEncoder()
    texts = ["will it rain in Oslo tomorrow?", "put on some jazz", "transfer 500 dollars to my savings account"]
    assert (one.encode(texts) * other.encode(texts)).sum(axis=1).min() > 0.995
