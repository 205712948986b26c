"""What a half-precision graph computes on a GPU, in a form that onnxruntime's CPU computes too.

onnxruntime has few half-precision kernels for CPUs: it computes such graphs in float32 and leaves out the roundings
between two of them, so that a policy would be measured five times as faithful as TensorRT runs it. `export.fidelity`
measures this form instead: float32 throughout, with a rounding behind every node that has a half-precision result, as
tensor cores have it (products of half-precision numbers, summed in float32, rounded when they are stored).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_LAYOUT = {"Reshape", "Transpose", "Concat", "Slice", "Relu", "MaxPool", "Identity"}  # their results need no rounding


def with_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in float32, rounded to half precision wherever `model` stores half precision."""
    half = _half_tensors(model)
    graph = model.graph
    nodes = [new for node in graph.node for new in _rounded(node, half)]
    constants = [
        numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        if tensor.data_type == TensorProto.FLOAT16
        else tensor
        for tensor in graph.initializer
    ]
    written = onnx.ModelProto()
    written.CopyFrom(model)
    written.graph.CopyFrom(helper.make_graph(nodes, graph.name, graph.input, graph.output, constants))
    return written


def _half_tensors(model: onnx.ModelProto) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name for value in inferred.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}


def _rounded(node: onnx.NodeProto, half: set[str]) -> Iterator[onnx.NodeProto]:
    result = node.output[0]
    if result not in half or node.op_type in _LAYOUT:
        if node.op_type == "Cast" and node.input[0] in half:
            node = helper.make_node("Identity", node.input, node.output, name=node.name)
        yield node
        return
    source = node.input[0]
    if node.op_type != "Cast":
        source = f"{result}/exact"
        exact = onnx.NodeProto()
        exact.CopyFrom(node)
        exact.output[0] = source
        yield exact
    yield helper.make_node("Cast", [source], [f"{result}/half"], to=TensorProto.FLOAT16, name=f"{result}/half")
    yield helper.make_node("Cast", [f"{result}/half"], [result], to=TensorProto.FLOAT, name=f"{result}/rounded")
