"""Writes a network down as ONNX: the second executor of `Operations`, beside PyTorch.

Opset 17, which onnxruntime 1.23 and TensorRT 10.3 (JetPack 6) both take, and static shapes with one observation, so
that an engine builder has nothing to guess. Inputs are raw frames and joints under the robot's names. Weights may be
stored in half precision while the arithmetic stays float32: a Cast, folded when the model is loaded, restores them. Or
the arithmetic itself is half: then convolutions and matrix products have half inputs and weights, everything whose
rounding accumulates (normalisation, norms, softmax, the sampler) keeps float32, and the Casts between the two stand in
the graph, so that a strongly typed TensorRT network needs no flags.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.networks.operations import Array
from export.normalize import Normalizer
from export.precision import Precision, Storage, stored_in_half

OPSET = 17
IR_VERSION = 8
EPS = 1e-5  # of layer and group norms, torch's default
PRODUCER = "understudy"


class GraphOperations:
    """Collects nodes. `input_names` maps a policy's input to the name it gets in the graph, where that differs; values
    are tensor names."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        input_shapes: Mapping[str, tuple[int, ...]],
        input_names: Mapping[str, str],
        storage: Storage = Storage.fp32,
        precision: Precision = Precision.fp32,
    ) -> None:
        self._weights = weights
        self._store_half = storage is Storage.fp16
        self._compute_half = precision is Precision.fp16
        self._names = input_names
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._input_shapes = input_shapes
        self._taken: dict[str, int] = {}
        self._half: set[str] = set()  # names of tensors that are half precision
        self._casts: dict[tuple[str, int], str] = {}

    def model(self, outputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> onnx.ModelProto:
        """The finished model. `outputs`: name -> (tensor, shape), all float32."""
        results = []
        for name, (tensor, shape) in outputs.items():
            self._append("Identity", [self._as(tensor, TensorProto.FLOAT)], name)
            results.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        graph = helper.make_graph(self._nodes, "policy", self._inputs, results, list(self._initializers.values()))
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, producer_name=PRODUCER, opset_imports=[opset], ir_version=IR_VERSION)

    def vector(self, name: str, normalizer: Normalizer) -> str:
        row = self.reshape(self._input(name, TensorProto.FLOAT), 1, *self._input_shapes[name])
        if normalizer.is_identity:
            return row
        offset, scale = (self._constant(f"{name}.{part}", getattr(normalizer, part)) for part in ("offset", "scale"))
        return self._node("Div", [self._node("Sub", [row, offset]), scale])

    def frames(self, names: Sequence[str], normalizers: Sequence[Normalizer]) -> str:
        height, width, channels = self._input_shapes[names[0]]
        # Cast first: TensorRT takes an uint8 input only if that is the first thing that happens to it.
        floats = [self._node("Cast", [self._input(name, TensorProto.UINT8)], to=TensorProto.FLOAT) for name in names]
        # Normalised line by line, while a line is contiguous: onnxruntime takes 20 times as long for the same numbers
        # where three channels lie innermost, as they do in front of its int8 kernels.
        lines = self.concat([self.reshape(each, 1, height, width * channels) for each in floats])
        # (x / 255 - offset) / scale, as two operations
        offset = np.stack([np.tile(255 * normalizer.offset, width) for normalizer in normalizers])[:, None]
        factor = np.stack([np.tile(1 / (255 * normalizer.scale), width) for normalizer in normalizers])[:, None]
        centred = self._node("Sub", [lines, self._constant(f"{names[0]}.offset", offset)]) if offset.any() else lines
        normal = self._node("Mul", [centred, self._constant(f"{names[0]}.factor", factor)])
        return self.transpose(self.reshape(normal, len(names), height, width, channels), 0, 3, 1, 2)

    def given(self, name: str) -> str:
        return self._input(name, TensorProto.FLOAT)

    def weight(self, name: str) -> str:
        tensor = self._weights[name]
        if not (self._store_half and stored_in_half(tensor)):
            return self._constant(name, tensor.detach().numpy())
        stored = self._stored_half(name)
        if (stored, TensorProto.FLOAT) not in self._casts:
            self._casts[stored, TensorProto.FLOAT] = self._append("Cast", [stored], name, to=TensorProto.FLOAT)
        return name

    def constant(self, name: str, value: Array) -> str:
        return self._constant(name, value)

    def add(self, a: str, b: str) -> str:
        return self._alike("Add", [a, b])

    def mul(self, a: str, b: str) -> str:
        return self._alike("Mul", [a, b])

    def clip(self, x: str, bound: str) -> str:
        x, bound = (self._as(value, TensorProto.FLOAT) for value in (x, bound))
        return self._node("Min", [self._node("Max", [x, self._node("Neg", [bound])]), bound])

    def concat(self, parts: Sequence[str], axis: int = 0) -> str:
        return parts[0] if len(parts) == 1 else self._alike("Concat", parts, axis=axis)

    def slice(self, x: str, axis: int, start: int, stop: int) -> str:
        return self._alike("Slice", [x], [self._integers(start), self._integers(stop), self._integers(axis)])

    def reshape(self, x: str, *sizes: int) -> str:
        return self._alike("Reshape", [x], [self._integers(*sizes)])

    def transpose(self, x: str, *axes: int) -> str:
        return self._alike("Transpose", [x], perm=list(axes))

    def relu(self, x: str) -> str:
        return self._alike("Relu", [x])

    def gelu(self, x: str) -> str:
        """x/2 (1 + erf(x / sqrt 2)): the operator Gelu came with opset 20; runtimes fuse these five."""
        x = self._as(x, TensorProto.FLOAT)
        root, one, half = (self._constant(f"gelu.{key}", np.array(value)) for key, value in _GELU.items())
        erf = self._node("Erf", [self._node("Div", [x, root])])
        return self._node("Mul", [self._node("Mul", [x, self._node("Add", [erf, one])]), half])

    def mish(self, x: str) -> str:
        """x tanh(softplus(x)), the operator Mish, which came with opset 18, as x w / (w + 2) with w = e^x (e^x + 2).

        The same function without a logarithm and a tangent: a step of denoising takes a third less time. From 20 on the
        quotient is 1 in float32, so x is cut there before it is squared into an infinity.
        """
        x = self._as(x, TensorProto.FLOAT)
        two, cap = self._constant("mish.two", np.array(2.0)), self._constant("mish.cap", np.array(20.0))
        power = self._node("Exp", [self._node("Min", [x, cap])])
        w = self._node("Mul", [power, self._node("Add", [power, two])])
        return self._node("Mul", [x, self._node("Div", [w, self._node("Add", [w, two])])])

    def softmax(self, x: str) -> str:
        return self._node("Softmax", [self._as(x, TensorProto.FLOAT)], axis=-1)

    def product(self, a: str, b: str) -> str:
        return self._node("MatMul", [self._as(value, TensorProto.FLOAT) for value in (a, b)])

    def linear(self, x: str, name: str) -> str:
        return self._heavy("Gemm", x, name, transB=1)

    def layer_norm(self, x: str, name: str) -> str:
        inputs = [self._as(x, TensorProto.FLOAT), self.weight(f"{name}.weight"), self.weight(f"{name}.bias")]
        return self._node("LayerNormalization", inputs, name=name, axis=-1, epsilon=EPS)

    def group_norm(self, x: str, name: str, groups: int, dimensions: int = 1) -> str:
        """As InstanceNormalization of groups, in float32: the operator GroupNormalization came with opset 21."""
        x = self._as(x, TensorProto.FLOAT)
        one, zero = (self._constant(f"groups.{groups}.{value:g}", np.full(groups, value)) for value in (1.0, 0.0))
        grouped = self.reshape(x, 0, groups, -1)
        normal = self._node("InstanceNormalization", [grouped, one, zero], name=name, epsilon=EPS)
        if dimensions == 1:
            normal = self.reshape(normal, 0, len(self._weights[f"{name}.bias"]), -1)
        else:
            normal = self._node("Reshape", [normal, self._node("Shape", [x])])
        gain, shift = (
            self._constant(f"{name}.{part}.column", weight.detach().numpy().reshape(-1, *[1] * dimensions))
            for part, weight in ((part, self._weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        )
        return self._node("Add", [self._node("Mul", [normal, gain]), shift])

    def conv(self, x: str, name: str, stride: int = 1, padding: int = 0, dilation: int = 1) -> str:
        kernel = list(self._weights[f"{name}.weight"].shape[2:])
        return self._heavy(
            "Conv",
            x,
            name,
            kernel_shape=kernel,
            strides=[stride] * len(kernel),
            pads=[padding] * 2 * len(kernel),
            dilations=[dilation] * len(kernel),
        )

    def conv_transpose(self, x: str, name: str, stride: int, padding: int) -> str:
        kernel = list(self._weights[f"{name}.weight"].shape[2:])
        return self._heavy("ConvTranspose", x, name, kernel_shape=kernel, strides=[stride], pads=[padding] * 2)

    def max_pool(self, x: str) -> str:
        return self._alike("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])

    def mean_pool(self, x: str) -> str:
        return self._node("ReduceMean", [self._as(x, TensorProto.FLOAT)], axes=[2, 3], keepdims=0)

    def tokens(self, features: str, width: int) -> str:
        return self.reshape(self.transpose(features, 0, 2, 3, 1), -1, width)

    def attention(self, q: str, k: str, v: str, heads: int, width: int) -> str:
        scale = self._constant("attention.scale", np.array(1 / math.sqrt(width // heads)))
        scaled = self._node("Mul", [self._as(q, TensorProto.FLOAT), scale])
        by_head = [
            self.transpose(self.reshape(self._computed(x), -1, heads, width // heads), *axes)
            for x, axes in ((scaled, (1, 0, 2)), (k, (1, 2, 0)), (v, (1, 0, 2)))
        ]
        share = self._computed(self.softmax(self._alike("MatMul", by_head[:2])))
        rows = self.transpose(self._alike("MatMul", [share, by_head[2]]), 1, 0, 2)
        return self.reshape(rows, -1, width)

    def unnormalize(self, x: str, normalizer: Normalizer) -> str:
        x = self._as(x, TensorProto.FLOAT)
        if normalizer.is_identity:
            return x
        scaled = self._node("Mul", [x, self._constant("action.scale", normalizer.scale)])
        return self._node("Add", [scaled, self._constant("action.offset", normalizer.offset)])

    def _input(self, name: str, kind: int) -> str:
        given = self._names.get(name, name)
        self._inputs.append(helper.make_tensor_value_info(given, kind, self._input_shapes[name]))
        return given

    def _heavy(self, kind: str, x: str, name: str, **attributes: Any) -> str:
        """A convolution or matrix product with the weights `name`: what half precision is for."""
        parts = [f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in self._weights]
        weights = [self._stored_half(part) if self._compute_half else self.weight(part) for part in parts]
        return self._alike(kind, [self._computed(x), *weights], name=name, **attributes)

    def _stored_half(self, name: str) -> str:
        """The weight `name` as a half-precision initializer."""
        stored = f"{name}.half"
        if stored not in self._initializers:
            half = self._weights[name].detach().half().numpy()
            self._initializers[stored] = numpy_helper.from_array(half, stored)
            self._half.add(stored)
        return stored

    def _computed(self, x: str) -> str:
        """`x` in what the heavy work is computed in."""
        return self._as(x, TensorProto.FLOAT16 if self._compute_half else TensorProto.FLOAT)

    def _as(self, x: str, kind: int) -> str:
        if (x in self._half) == (kind == TensorProto.FLOAT16):
            return x
        if (x, kind) not in self._casts:
            self._casts[x, kind] = self._node("Cast", [x], to=kind)
            if kind == TensorProto.FLOAT16:
                self._half.add(self._casts[x, kind])
        return self._casts[x, kind]

    def _alike(self, kind: str, inputs: Sequence[str], others: Sequence[str] = (), name: str = "", **more: Any) -> str:
        """A node whose `inputs` are all of one type, which its output has too: half only where all of them are."""
        half = all(x in self._half for x in inputs)
        inputs = inputs if half else [self._as(x, TensorProto.FLOAT) for x in inputs]
        output = self._node(kind, [*inputs, *others], name, **more)
        if half:
            self._half.add(output)
        return output

    def _node(self, kind: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Append a node with one output, which is named after its weights, or after its kind and counted."""
        return self._append(kind, inputs, self._fresh(f"{name or 'n'}/{kind}"), **attributes)

    def _append(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def _fresh(self, stem: str) -> str:
        count = self._taken[stem] = self._taken.get(stem, -1) + 1
        return f"{stem}.{count}" if count else stem

    def _constant(self, name: str, value: Array) -> str:
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name)
        return name

    def _integers(self, *values: int) -> str:
        name = "int." + "x".join(str(value) for value in values)
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.array(values, dtype=np.int64), name)
        return name


_GELU = {"root": math.sqrt(2), "one": 1.0, "half": 0.5}
