"""int8 for a policy's convolutions: where it goes in a graph, and in which numbers.

`export.fidelity.lower` calls `quantize` on the float32 graph that has the cameras in it, with the ranges that
`export.calibration` saw on recorded observations. Quantisation is static and symmetric, per output channel for weights,
and written as QuantizeLinear and DequantizeLinear around each convolution (Jacob et al. 2017, arXiv:1712.05877; Wu et
al. 2020, arXiv:2004.09602). What lies between two convolutions (Relu, the residual sum, the pool) is placed so that
onnxruntime makes one chain of integer kernels of it. Everything else keeps float32.

The numbers are such that all engines compute the same. Activations are uint8, as onnxruntime's kernels want them, but
take only codes that a signed byte has too: 0 .. 127 with zero point 0 where they cannot be negative, else zero point
128. TensorRT takes int8 with zero point 0 and nothing else; it gets that by making both zero points (UNSIGNED_ZERO,
SIGNED_ZERO) an int8 0, and no scale changes. Seven bits also keep the sum of two products within 16 bits, where x86
processors without VNNI saturate silently (VPMADDUBSW).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.errors import ExportError
from export.networks.operations import Array

LEVELS = 127  # of a symmetric signed byte, and of the codes that activations take
SHY_LEVELS = 63  # of weights that meet activations of eight bits: 2 * 255 * 63 < 2**15
LARGEST_BIAS = 2.0**30  # in units of input scale times weight scale: runtimes keep it as int32
UNSIGNED_ZERO, SIGNED_ZERO = "int8.zero.unsigned", "int8.zero.signed"
ZEROS = {UNSIGNED_ZERO: 0, SIGNED_ZERO: 128}


@dataclass(frozen=True)
class Plan:
    """What is to be quantised: convolutions by their output's name, and tensors, each with the one whose range it
    shares (itself but for what a pool hands on) and whether it can be negative."""

    convolutions: frozenset[str]
    ranges: dict[str, str]
    signed: frozenset[str]

    @property
    def observed(self) -> list[str]:
        """Tensors whose range has to be known."""
        return sorted(set(self.ranges.values()))


def plan(model: onnx.ModelProto) -> Plan:
    """Which convolutions of a float32 graph are worth int8: all whose result another convolution reads in the end,
    since the last one hands its result to what computes in float32. Raises ExportError where there is none."""
    walk = _Walk(model)
    chosen = [node for node in walk.nodes if node.op_type == "Conv" and walk.leads_to_convolution(node.output[0])]
    if not chosen:
        raise ExportError(
            "--precision int8 is for convolutions, and this policy has none that follow each other; use fp16 or fp32"
        )
    ranges: dict[str, str] = {}
    for node in chosen:
        for tensor in (node.input[0], walk.behind_relu(node.output[0])):
            ranges[tensor] = tensor
    for tensor in list(ranges):
        source = walk.producer(tensor)
        if source is not None and source.op_type == "MaxPool" and source.input[0] in ranges:
            ranges[tensor] = source.input[0]
    signed = frozenset(tensor for tensor in ranges if not walk.never_negative(tensor))
    return Plan(frozenset(node.output[0] for node in chosen), ranges, signed)


def quantize(model: onnx.ModelProto, plan: Plan, largest: Mapping[str, float]) -> onnx.ModelProto:
    """The graph with `plan` carried out. `largest`: tensor -> magnitude that is still told apart from larger ones, for
    every tensor of `plan.observed`."""
    return _Writer(model, plan, largest).write()


class _Walk:
    """A graph, to be asked who makes and who reads a tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self._makers = {output: node for node in self.nodes for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._leads: set[str] = set()
        for node in reversed(self.nodes):
            if node.op_type == "Conv" or any(output in self._leads for output in node.output):
                self._leads.update(node.input)

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        return self._makers.get(tensor)

    def leads_to_convolution(self, tensor: str) -> bool:
        return tensor in self._leads

    def behind_relu(self, tensor: str) -> str:
        """The tensor, or what a Relu makes of it that alone reads it."""
        readers = self._readers.get(tensor, [])
        return str(readers[0].output[0]) if len(readers) == 1 and readers[0].op_type == "Relu" else tensor

    def never_negative(self, tensor: str) -> bool:
        source = self._makers.get(tensor)
        if source is None:
            return False
        return source.op_type == "Relu" or (source.op_type == "MaxPool" and self.never_negative(source.input[0]))


class _Writer:
    """Writes one graph anew, with its plan carried out."""

    def __init__(self, model: onnx.ModelProto, plan: Plan, largest: Mapping[str, float]) -> None:
        self._model, self._plan = model, plan
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
        self._scales = {
            tensor: max(float(largest[source]), np.finfo(np.float32).tiny * LEVELS) / LEVELS
            for tensor, source in plan.ranges.items()
        }
        self._added: dict[str, onnx.TensorProto] = {}

    def write(self) -> onnx.ModelProto:
        graph = self._model.graph
        nodes: list[onnx.NodeProto] = []
        for given in [value.name for value in graph.input]:
            nodes += self._stored_and_back(given)
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [_back(name) if name in self._scales else name for name in node.input]
            if node.op_type == "Conv" and node.output[0] in self._plan.convolutions:
                nodes += self._weights(node, copy)
            nodes.append(copy)
            for output in node.output:
                nodes += self._stored_and_back(output)
        nodes = _read(nodes, [value.name for value in graph.output])
        needed = {name for node in nodes for name in node.input}
        kept = [t for t in (*graph.initializer, *self._added.values()) if t.name in needed]
        written = onnx.ModelProto()
        written.CopyFrom(self._model)
        written.graph.CopyFrom(helper.make_graph(nodes, graph.name, graph.input, graph.output, kept))
        return written

    def _stored_and_back(self, tensor: str) -> Iterator[onnx.NodeProto]:
        if tensor not in self._scales:
            return
        scale = self._constant(f"{tensor}/scale", np.array(self._scales[tensor], np.float32))
        name = SIGNED_ZERO if tensor in self._plan.signed else UNSIGNED_ZERO
        zero = self._constant(name, np.array(ZEROS[name], np.uint8))
        stored = f"{tensor}/int8"
        yield helper.make_node("QuantizeLinear", [tensor, scale, zero], [stored], name=stored)
        yield helper.make_node("DequantizeLinear", [stored, scale, zero], [_back(tensor)], name=_back(tensor))

    def _weights(self, node: onnx.NodeProto, copy: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Stores a convolution's weights in int8, and has `copy` read them."""
        weight = self._value(node.input[1])
        levels = SHY_LEVELS if node.input[0] in self._plan.signed else LEVELS
        bias = self._value(node.input[2]) if len(node.input) > 2 else np.zeros(len(weight), np.float32)
        smallest = np.maximum(np.abs(bias) / (self._scales[node.input[0]] * LARGEST_BIAS), np.finfo(np.float32).tiny)
        scale = np.maximum(np.abs(weight).max((*range(1, weight.ndim),)) / levels, smallest).astype(np.float32)
        codes = np.clip(np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))), -levels, levels)
        stored = self._constant(f"{node.input[1]}/int8", codes.astype(np.int8))
        inputs = [stored, self._constant(f"{node.input[1]}/scale", scale)]
        inputs.append(self._constant(f"{node.input[1]}/zero", np.zeros(len(scale), np.int8)))
        copy.input[1] = _back(node.input[1])
        yield helper.make_node("DequantizeLinear", inputs, [copy.input[1]], name=copy.input[1], axis=0)

    def _value(self, name: str) -> Array:
        """A constant, which may be stored in half precision."""
        value: Array = numpy_helper.to_array(self._constants[self._casts.get(name, name)])
        return value.astype(np.float32)

    def _constant(self, name: str, value: Array) -> str:
        if name not in self._added:
            self._added[name] = numpy_helper.from_array(value, name)
        return name


def _back(tensor: str) -> str:
    return f"{tensor}/from_int8"


def _read(nodes: list[onnx.NodeProto], results: list[str]) -> list[onnx.NodeProto]:
    """Without the nodes that nobody reads, such as the Casts of weights that are int8 now."""
    read, kept = set(results), []
    for node in reversed(nodes):
        if any(output in read for output in node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1]
