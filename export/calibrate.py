"""How large the tensors of a network become on recorded observations: what int8 divides into its steps.

`export.fidelity.lower` asks for it, `export.quantize` uses it. The range of a tensor reaches to the largest magnitude
that was seen. Measured on the virtual cell's ACT, that is at least as faithful as leaving out what is rare: clipping at
the 99.99th percentile more than doubles the largest error of an action, and the range of least squared error doubles
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from device.arrays import Array


def largest_magnitudes(
    model: onnx.ModelProto, tensors: Sequence[str], feeds: Iterable[Mapping[str, Array]], threads: int
) -> dict[str, float]:
    """Tensor -> its largest magnitude over `feeds`, each of which holds the graph's inputs of one run."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    results = [f"{tensor}/largest" for tensor in tensors]
    for tensor, result in zip(tensors, results, strict=True):
        watched.graph.node.append(helper.make_node("Abs", [tensor], [f"{result}/abs"]))
        watched.graph.node.append(helper.make_node("ReduceMax", [f"{result}/abs"], [result], keepdims=0))
        watched.graph.output.append(helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, ()))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    seen = [session.run(results, {name: feed[name] for name in names}) for feed in feeds]
    return dict(zip(tensors, np.max(np.array(seen, np.float64), axis=0).tolist(), strict=True))
