"""An ONNX graph whose weights are stored as int8 made to multiply in int8.

Such a graph (as the export of the default model) holds int8 columns and their scales for each weight matrix, and turns
them into float32 before it multiplies: smaller on disk, but neither faster nor smaller in memory. Here the product's
other factor, the word pieces' vectors, is rounded to uint8 too, and ONNX Runtime multiplies integers. Each word piece's
vector x has its own scale s and zero point z, as the numbers of a few are many times those of others
(`onnxruntime.quantization.quantize_dynamic` takes one scale for a whole batch, which agrees less with float32):

    q = round(x / s) + z,  s = (max(x, 0) - min(x, 0)) / 255,  z = round(-min(x, 0) / s)
    x W = s (q W - z (1 W)),  where 1 W are the sums of W's columns

ONNX Runtime's product knows one zero point for a whole batch. So z goes in as further columns of q, and W gets rows
that add up to -(1 W): the same integers, in one product. Tables of embeddings stay int8: the rows that are looked up
are scaled, not the table.

Sums of integers are exact, and each word piece is rounded by its own numbers alone: a text's vector is the same alone
and in any batch, as long as ONNX Runtime's float32 sums are, in attention and layer norms.
"""

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

# ONNX's local functions, which ONNX Runtime puts in place of their calls.
DOMAIN, OURS = "com.microsoft", "dspy_router"
FUNCTIONS = (
    """<domain: "dspy_router", opset_import: ["": 17]>
    Quantize <flat, zero_columns> (x) => (q, scale) {
        none = Constant <value_float = 0.0> ()
        one = Constant <value_float = 1.0> ()
        levels = Constant <value_float = 255.0> ()
        first_level = Constant <value = uint8 {0}> ()
        row = Constant <value_ints = [-1]> ()
        rows = Constant <value_ints: ints = @flat> ()
        columns = Constant <value_ints: ints = @zero_columns> ()

        most = ReduceMax <axes = [-1]> (x)
        least = ReduceMin <axes = [-1]> (x)
        above = Max (most, none)
        below = Min (least, none)
        range = Sub (above, below)
        scale = Div (range, levels)
        steps_below = Div (below, scale)
        zero = Neg (steps_below)
        z = QuantizeLinear (zero, one, first_level)

        words = Reshape (x, rows)
        scales = Reshape (scale, row)
        zeros = Reshape (z, row)
        rounded = QuantizeLinear <axis = 0> (words, scales, zeros)
        shape = Shape (x)
        shaped = Reshape (rounded, shape)
        repeated = Expand (z, columns)
        q = Concat <axis = -1> (shaped, repeated)
    }""",
    """<domain: "dspy_router", opset_import: ["": 17, "com.microsoft": 1]>
    Multiply (q, scale, weight, weight_scales) => (product) {
        one = Constant <value_float = 1.0> ()
        unscaled = com.microsoft.MatMulIntegerToFloat (q, weight, one, weight_scales)
        product = Mul (unscaled, scale)
    }""",
    """<domain: "dspy_router", opset_import: ["": 17]>
    LookUp (table, scales, ids) => (rows) {
        integers = Gather (table, ids)
        unscaled = Cast <to = 1> (integers)
        scale = Gather (scales, ids)
        rows = Mul (unscaled, scale)
    }""",
)
LARGEST = 127  # of an int8 weight
# ONNX Runtime's setting by which weights become uint8, whose products are slower and never overflow.
PRECISE = ("session.x64quantprecision", "1")


class _Quantized(NamedTuple):
    """A weight that a graph computes as `Mul(Cast(values), scales)`."""

    values: "TensorProto"
    scales: "TensorProto"

    @property
    def is_by_columns(self) -> bool:
        return list(self.scales.dims) == [1, self.values.dims[1]]

    @property
    def is_by_rows(self) -> bool:
        return list(self.scales.dims) == [self.values.dims[0], 1]


def int8_graph(file: Path) -> bytes:
    """The model of a file, serialized, with products and tables in int8; the weights are the file's own, bit for bit.

    Products with other than int8 weights by columns are left as they are. A GELU that is written out becomes one node.
    """
    import onnx
    from onnx.helper import make_node, make_opsetid
    from onnx.numpy_helper import from_array, to_array
    from onnx.parser import parse_function

    model = onnx.load(file)
    graph = model.graph
    weights = _quantized_weights(graph)
    products = {node.output[0]: (node, weight) for node in graph.node if (weight := _column_weight(node, weights))}
    zero_columns: dict[str, int] = {}  # of each products' other factor, by its name
    for node, weight in products.values():
        words = node.input[0]
        zero_columns[words] = max(zero_columns.get(words, 0), _rows_for_sums(to_array(weight.values)))
    nodes: list[NodeProto] = []
    quantized: set[str] = set()
    for node in graph.node:
        if node.output[0] in products:
            words, (_, weight) = node.input[0], products[node.output[0]]
            name, columns, depth = weight.values.name, zero_columns[words], weight.values.dims[0]
            if words not in quantized:
                quantized.add(words)
                made = [f"{words}.q", f"{words}.scale"]
                rounding = make_node("Quantize", [words], made, domain=OURS, flat=[-1, depth], zero_columns=[columns])
                nodes.append(rounding)
            extended = _with_rows_for_sums(to_array(weight.values), columns)
            scales = to_array(weight.scales).reshape(-1)
            graph.initializer.extend([from_array(extended, f"{name}.extended"), from_array(scales, f"{name}.scales")])
            given = [f"{words}.q", f"{words}.scale", f"{name}.extended", f"{name}.scales"]
            nodes.append(make_node("Multiply", given, node.output, domain=OURS))
        elif node.op_type == "Gather" and (table := weights.get(node.input[0])) and table.is_by_rows:
            given = [table.values.name, table.scales.name, node.input[1]]
            nodes.append(make_node("LookUp", given, node.output, domain=OURS))
        else:
            nodes.append(node)
    _replace_nodes(graph, _with_gelu(nodes, graph))
    model.functions.extend(parse_function(function) for function in FUNCTIONS)
    model.opset_import.extend([make_opsetid(DOMAIN, 1), make_opsetid(OURS, 1)])
    return model.SerializeToString()


def _column_weight(node: "NodeProto", weights: dict[str, _Quantized]) -> _Quantized | None:
    """The weight that a node multiplies with, if it is int8 by columns."""
    weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
    return weight if weight is not None and weight.is_by_columns else None


@cache
def products_overflow() -> bool:
    """Whether this processor's product of uint8 and int8 cuts large sums off, as without VNNI it does."""
    import onnxruntime
    from onnx import TensorProto
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
    from onnx.numpy_helper import from_array

    depth, width = 64, 32
    graph = make_graph(
        [make_node("MatMulInteger", ["q", "weight"], ["sums"])],
        "largest_sums",
        [make_tensor_value_info("q", TensorProto.UINT8, [depth, depth])],
        [make_tensor_value_info("sums", TensorProto.INT32, [depth, width])],
        [from_array(np.full((depth, width), LARGEST, np.int8), "weight")],
    )
    model = make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"q": np.full((depth, depth), 255, np.uint8)})
    return bool((sums != depth * 255 * LARGEST).any())


def _quantized_weights(graph: "GraphProto") -> dict[str, _Quantized]:
    """By the name under which the graph multiplies with it."""
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    casts = {
        node.output[0]: stored[node.input[0]]
        for node in graph.node
        if node.op_type == "Cast"
        and (tensor := stored.get(node.input[0]))
        and tensor.data_type == onnx.TensorProto.INT8
        and len(tensor.dims) == 2
    }
    return {
        node.output[0]: _Quantized(casts[node.input[0]], stored[node.input[1]])
        for node in graph.node
        if node.op_type == "Mul" and node.input[0] in casts and node.input[1] in stored
    }


def _rows_for_sums(weight: np.ndarray) -> int:
    """How many int8 rows it takes to add up to the sums of an int8 [k, n] weight's columns."""
    largest = int(np.abs(weight.sum(axis=0, dtype=np.int64)).max())
    return max(1, -(-largest // LARGEST))


def _with_rows_for_sums(weight: np.ndarray, count: int) -> np.ndarray:
    """Int8 [k + count, n]: a weight, and rows that add up to minus the sums of its columns."""
    share, rest = np.divmod(-weight.sum(axis=0, dtype=np.int64), count)
    return np.concatenate([weight, (share + (np.arange(count)[:, None] < rest)).astype(np.int8)])


def _with_gelu(nodes: "list[NodeProto]", graph: "GraphProto") -> "list[NodeProto]":
    """The nodes with each `x * (0.5 * (erf(x / sqrt 2) + 1))`, as PyTorch exports it, in one; its parts are left."""
    from onnx.helper import make_node
    from onnx.numpy_helper import to_array

    makers = {output: node for node in nodes for output in node.output}
    numbers = {tensor.name: float(to_array(tensor)) for tensor in graph.initializer if not tensor.dims}

    def operand(of: str, operator: str, number: float) -> str:
        """What the node that makes `of` applies the operator and the number to; empty if it is another node."""
        node = makers.get(of)
        if node is None or node.op_type != operator:
            return ""
        others = [name for name in node.input if not math.isclose(numbers.get(name, math.nan), number, rel_tol=1e-6)]
        return others[0] if len(others) == 1 else ""

    def normal_share(of: str) -> str:
        erf = makers.get(operand(operand(of, "Mul", 0.5), "Add", 1.0))
        return operand(erf.input[0], "Div", math.sqrt(2)) if erf is not None and erf.op_type == "Erf" else ""

    return [
        make_node("Gelu", [node.input[0]], node.output, domain=DOMAIN)
        if node.op_type == "Mul" and node.input[0] == normal_share(node.input[1])
        else node
        for node in nodes
    ]


def _replace_nodes(graph: "GraphProto", nodes: "list[NodeProto]") -> None:
    """Put nodes in place of the graph's; what nobody reads any longer goes."""
    used = {output.name for output in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):  # they are sorted: a node stands before those that read it
        if used & set(node.output):
            used |= set(node.input)
            kept.insert(0, node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    # In a new graph first, as protobuf's lists own what is in them.
    fresh = type(graph)(node=kept, initializer=tensors)
    del graph.node[:], graph.initializer[:]
    graph.MergeFrom(fresh)
