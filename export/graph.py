"""Writes a network down as ONNX: the second executor of `Operations`, beside PyTorch.

Opset 17, which onnxruntime 1.18 and TensorRT 10.3 (JetPack 6) both take, and static shapes with one observation, so
that an engine builder has nothing to guess. Inputs are raw frames and joints under the robot's names, the output is
`action`. Weights may be stored in half precision: a Cast, folded when the model is loaded, restores float32 before
anything is computed, so only the file shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.normalize import Normalizer
from export.operations import Array

OPSET = 17
IR_VERSION = 8
SMALL = 4096  # elements; biases, norms and the like keep float32 when weights are stored in half precision


def stored_in_half(tensor: torch.Tensor) -> bool:
    """Whether half-precision storage rounds this weight."""
    return tensor.ndim >= 2 and tensor.numel() >= SMALL


class GraphOperations:
    """Collects nodes. `input_names` maps a policy's input to the name it gets in the graph; values are tensor names."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        input_shapes: Mapping[str, tuple[int, ...]],
        input_names: Mapping[str, str],
        half: bool = False,
    ) -> None:
        self._weights = weights
        self._half = half
        self._names = input_names
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._input_shapes = input_shapes
        self._taken: dict[str, int] = {}

    def model(self, output: str, shape: tuple[int, int], producer: str) -> onnx.ModelProto:
        """The finished model, whose output `action` is the tensor named `output`."""
        self._node("Identity", [output], name="action")
        result = helper.make_tensor_value_info("action", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self._nodes, "policy", self._inputs, [result], list(self._initializers.values()))
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, producer_name=producer, opset_imports=[opset], ir_version=IR_VERSION)

    def vector(self, name: str, normalizer: Normalizer) -> str:
        raw = self._input(name, TensorProto.FLOAT)
        row = self._node("Reshape", [raw, self._shape(1, *self._input_shapes[name])])
        if normalizer.is_identity:
            return row
        offset, scale = (self._constant(f"{name}.{part}", getattr(normalizer, part)) for part in ("offset", "scale"))
        return self._node("Div", [self._node("Sub", [row, offset]), scale])

    def frames(self, names: Sequence[str], normalizers: Sequence[Normalizer]) -> str:
        height, width, channels = self._input_shapes[names[0]]
        shape = self._shape(1, height, width, channels)
        raw = [self._node("Reshape", [self._input(name, TensorProto.UINT8), shape]) for name in names]
        batch = raw[0] if len(raw) == 1 else self._node("Concat", raw, axis=0)
        pixels = self._node("Cast", [self._node("Transpose", [batch], perm=[0, 3, 1, 2])], to=TensorProto.FLOAT)
        # (x / 255 - offset) / scale, as two operations
        offset = np.stack([255 * normalizer.offset for normalizer in normalizers])[..., None, None]
        factor = np.stack([1 / (255 * normalizer.scale) for normalizer in normalizers])[..., None, None]
        centred = self._node("Sub", [pixels, self._constant(f"{names[0]}.offset", offset)]) if offset.any() else pixels
        return self._node("Mul", [centred, self._constant(f"{names[0]}.factor", factor)])

    def weight(self, name: str) -> str:
        tensor = self._weights[name]
        if not (self._half and stored_in_half(tensor)):
            return self._constant(name, tensor.numpy())
        stored = f"{name}.half"
        if stored not in self._initializers:
            self._initializers[stored] = numpy_helper.from_array(tensor.half().numpy(), stored)
            self._node("Cast", [stored], name=name, to=TensorProto.FLOAT)
        return name

    def constant(self, name: str, value: Array) -> str:
        return self._constant(name, value)

    def add(self, a: str, b: str) -> str:
        return self._node("Add", [a, b])

    def concat(self, rows: Sequence[str]) -> str:
        return self._node("Concat", list(rows), axis=0)

    def relu(self, x: str) -> str:
        return self._node("Relu", [x])

    def gelu(self, x: str) -> str:
        """x/2 (1 + erf(x / sqrt 2)): the operator Gelu came with opset 20; runtimes fuse these five."""
        root, one, half = (self._constant(f"gelu.{key}", np.array(value)) for key, value in _GELU.items())
        erf = self._node("Erf", [self._node("Div", [x, root])])
        return self._node("Mul", [self._node("Mul", [x, self._node("Add", [erf, one])]), half])

    def linear(self, x: str, name: str) -> str:
        return self._node("Gemm", [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")], name=name, transB=1)

    def layer_norm(self, x: str, name: str) -> str:
        inputs = [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")]
        return self._node("LayerNormalization", inputs, name=name, axis=-1, epsilon=1e-5)

    def conv(self, x: str, name: str, stride: int = 1, padding: int = 0, dilation: int = 1) -> str:
        kernel = list(self._weights[f"{name}.weight"].shape[2:])
        return self._node(
            "Conv",
            [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")],
            name=name,
            kernel_shape=kernel,
            strides=[stride] * 2,
            pads=[padding] * 4,
            dilations=[dilation] * 2,
        )

    def max_pool(self, x: str) -> str:
        return self._node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])

    def tokens(self, features: str, width: int) -> str:
        last = self._node("Transpose", [features], perm=[0, 2, 3, 1])
        return self._node("Reshape", [last, self._shape(-1, width)])

    def attention(self, q: str, k: str, v: str, heads: int, width: int) -> str:
        split = self._shape(-1, heads, width // heads)
        scale = self._constant("attention.scale", np.array(1 / math.sqrt(width // heads)))
        by_head = [
            self._node("Transpose", [self._node("Reshape", [x, split])], perm=perm)
            for x, perm in ((self._node("Mul", [q, scale]), [1, 0, 2]), (k, [1, 2, 0]), (v, [1, 0, 2]))
        ]
        share = self._node("Softmax", [self._node("MatMul", by_head[:2])], axis=-1)
        rows = self._node("Transpose", [self._node("MatMul", [share, by_head[2]])], perm=[1, 0, 2])
        return self._node("Reshape", [rows, self._shape(-1, width)])

    def unnormalize(self, x: str, normalizer: Normalizer) -> str:
        if normalizer.is_identity:
            return x
        scaled = self._node("Mul", [x, self._constant("action.scale", normalizer.scale)])
        return self._node("Add", [scaled, self._constant("action.offset", normalizer.offset)])

    def _input(self, name: str, kind: int) -> str:
        given = self._names[name]
        self._inputs.append(helper.make_tensor_value_info(given, kind, self._input_shapes[name]))
        return given

    def _node(self, kind: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Append a node with one output, which is named after its weights, or after its kind and counted."""
        output = name if kind in ("Cast", "Identity") and name else self._fresh(f"{name or 'n'}/{kind}")
        self._nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def _fresh(self, stem: str) -> str:
        count = self._taken[stem] = self._taken.get(stem, -1) + 1
        return f"{stem}.{count}" if count else stem

    def _constant(self, name: str, value: Array) -> str:
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name)
        return name

    def _shape(self, *sizes: int) -> str:
        name = "shape." + "x".join(str(size) for size in sizes)
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.array(sizes, dtype=np.int64), name)
        return name


_GELU = {"root": math.sqrt(2), "one": 1.0, "half": 0.5}
