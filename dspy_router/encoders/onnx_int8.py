"""An ONNX graph whose weights are stored as int8 made to multiply in int8.

Such a graph (as the export of the default model) holds int8 columns and their scales for each weight matrix, and turns
them into float32 before it multiplies: smaller on disk, but neither faster nor smaller in memory. Here each product
becomes one `MatMulNBits` of ONNX Runtime, which reads the int8 columns as they are and rounds the other factor to int8
too, 128 numbers of a word piece at a time with a scale of their own. (`onnxruntime.quantization.quantize_dynamic`
takes one scale for a whole batch, which agrees less with float32.) Tables of embeddings stay int8: the rows that are
looked up are scaled, not the table.

Rounding turns the last bits of a sum, which depend on the shape of the batch, into a difference like its own: a text's
vector alone and in a batch have a cosine of some 0.999.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

BLOCK = 128  # numbers that share a scale
INT8_ACTIVATIONS = 4  # MatMulNBits's accuracy_level
DOMAIN = "com.microsoft"


class _Quantized(NamedTuple):
    """A weight that a graph computes as `Mul(Cast(values), scales)`."""

    values: "TensorProto"
    scales: "TensorProto"


def int8_graph(file: Path) -> bytes:
    """The model of a file, serialized, with products and tables in int8; the weights are the file's own, bit for bit.

    Products of other than int8 weights by columns, or of a depth that `BLOCK` does not divide, are left as they are.
    """
    import onnx
    from onnx.helper import make_node, make_opsetid
    from onnx.numpy_helper import from_array, to_array

    model = onnx.load(file)
    graph = model.graph
    weights = _quantized_weights(graph)
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "MatMul" and (weight := weights.get(node.input[1])) and _by_columns(weight):
            depth, width = weight.values.dims
            name, blocks = weight.values.name, depth // BLOCK
            # Unsigned, with the zero at 128, and one scale a block of each column, as the operator has it.
            packed = (to_array(weight.values).T.astype(np.int16) + 128).astype(np.uint8).reshape(width, blocks, BLOCK)
            scales = np.repeat(to_array(weight.scales).reshape(width), blocks)
            graph.initializer.extend([from_array(packed, f"{name}.packed"), from_array(scales, f"{name}.scales")])
            nodes.append(
                make_node(
                    "MatMulNBits",
                    [node.input[0], f"{name}.packed", f"{name}.scales"],
                    node.output,
                    domain=DOMAIN,
                    K=depth,
                    N=width,
                    bits=8,
                    block_size=BLOCK,
                    accuracy_level=INT8_ACTIVATIONS,
                )
            )
        elif node.op_type == "Gather" and (weight := weights.get(node.input[0])) and _by_rows(weight):
            out, rows = node.output[0], node.input[1]
            nodes += [
                make_node("Gather", [weight.values.name, rows], [f"{out}.int8"]),
                make_node("Cast", [f"{out}.int8"], [f"{out}.float"], to=onnx.TensorProto.FLOAT),
                make_node("Gather", [weight.scales.name, rows], [f"{out}.scales"]),
                make_node("Mul", [f"{out}.float", f"{out}.scales"], [out]),
            ]
        else:
            nodes.append(node)
    _replace_nodes(graph, nodes)
    model.opset_import.append(make_opsetid(DOMAIN, 1))
    return model.SerializeToString()


def _quantized_weights(graph: "GraphProto") -> dict[str, _Quantized]:
    """By the name under which the graph multiplies with it."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast" and node.input[0] in stored}
    return {
        node.output[0]: _Quantized(stored[casts[node.input[0]]], stored[node.input[1]])
        for node in graph.node
        if node.op_type == "Mul" and node.input[0] in casts and node.input[1] in stored
    }


def _by_columns(weight: _Quantized) -> bool:
    shape = list(weight.values.dims)
    return _is_int8(weight) and list(weight.scales.dims) == [1, shape[1]] and shape[0] % BLOCK == 0


def _by_rows(weight: _Quantized) -> bool:
    return _is_int8(weight) and list(weight.scales.dims) == [weight.values.dims[0], 1]


def _is_int8(weight: _Quantized) -> bool:
    import onnx

    return weight.values.data_type == onnx.TensorProto.INT8 and len(weight.values.dims) == 2


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
