"""Reads and edits ONNX files by walking protobuf's wire format: a device has no onnx package, and needs little of it.

`understudy bundle check` counts a graph's nodes here. The TensorRT builder asks whether a graph's frames meet
TensorRT's rule for uint8; for the same graph with every float16 computed in float32, which is what it falls back to
when half precision fails parity; and for an int8 graph with the zero points that TensorRT takes. Nothing but the
structure that these questions need is interpreted (field numbers: onnx.proto of ONNX IR version 8); everything else is
copied as it is. Bytes that are no such file raise EngineError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from device.engine import EngineError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types

# Field numbers of the messages that are walked.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE_INFO = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_I, _ATTRIBUTE_T, _ATTRIBUTE_G = 1, 3, 5, 6
_TENSOR_DATA_TYPE, _TENSOR_INT32_DATA, _TENSOR_NAME, _TENSOR_RAW_DATA = 2, 5, 8, 9
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_ELEMENT = 1, 2, 1, 1

_FLOAT, _UINT8, _INT8, _FLOAT16 = 1, 2, 3, 10  # onnx.TensorProto.DataType

# Of the activations in int8 graphs, as export.quantize calls them; every scale goes with either kind of zero point.
INT8_ZERO_POINTS = ("int8.zero.unsigned", "int8.zero.signed")

Edit = Callable[[memoryview], bytes]


@dataclass(frozen=True)
class GraphSummary:
    """nodes: of the main graph. frames_not_cast: uint8 inputs that another node than Cast reads -> its operator."""

    nodes: int
    frames_not_cast: dict[str, str]


def summarize(model: bytes) -> GraphSummary:
    """What the builder and the check ask of an ONNX file's bytes. Raises EngineError."""
    graph = memoryview(_graph_of(model))
    nodes = [_Node.read(payload) for payload in _payloads(graph, _GRAPH_NODE)]
    frames = {name for name, element in map(_value, _payloads(graph, _GRAPH_INPUT)) if element == _UINT8}
    misused = {
        name: node.operator for node in nodes if node.operator != "Cast" for name in node.inputs if name in frames
    }
    return GraphSummary(len(nodes), misused)


def widened(model: bytes) -> bytes:
    """The same graph with float32 wherever it says float16: constants keep their (rounded) values, casts to float16
    become casts to float32, which change nothing. Raises EngineError."""
    _graph_of(model)
    return _rewrite(memoryview(model), {_MODEL_GRAPH: _widen_graph})


def with_signed_zeros(model: bytes) -> bytes:
    """An int8 graph whose activations are int8 around zero, as TensorRT takes them, instead of uint8, as onnxruntime's
    kernels do: the same numbers, since the codes in use are those that both have. Raises EngineError."""
    _graph_of(model)
    return _rewrite(memoryview(model), {_MODEL_GRAPH: partial(_rewrite, edits={_GRAPH_INITIALIZER: _sign_zero})})


@dataclass(frozen=True)
class _Node:
    operator: str
    inputs: tuple[str, ...]

    @classmethod
    def read(cls, payload: memoryview) -> _Node:
        operator = "".join(_text(value) for value in _payloads(payload, _NODE_OP_TYPE))
        inputs = tuple(_text(value) for value in _payloads(payload, _NODE_INPUT))
        return cls(operator, inputs)


def _graph_of(model: bytes) -> memoryview:
    graphs = list(_payloads(memoryview(model), _MODEL_GRAPH))
    if len(graphs) != 1:
        raise EngineError("this is no ONNX file: it holds no graph; export or download the bundle again")
    return graphs[0]


def _value(payload: memoryview) -> tuple[str, int | None]:
    """A graph input's name and element type."""
    name = "".join(_text(part) for part in _payloads(payload, _VALUE_NAME))
    for kind in _payloads(payload, _VALUE_TYPE):
        for tensor in _payloads(kind, _TYPE_TENSOR):
            return name, _number(tensor, _TENSOR_ELEMENT)
    return name, None


def _widen_graph(graph: memoryview) -> bytes:
    edits: dict[int, Edit] = {_GRAPH_NODE: _widen_node, _GRAPH_INITIALIZER: _widen_tensor}
    value: Edit = partial(_rewrite, edits={_VALUE_TYPE: partial(_rewrite, edits={_TYPE_TENSOR: _widen_element})})
    edits |= {_GRAPH_INPUT: value, _GRAPH_OUTPUT: value, _GRAPH_VALUE_INFO: value}
    return _rewrite(graph, edits)


def _widen_node(node: memoryview) -> bytes:
    is_cast = _Node.read(node).operator == "Cast"
    return _rewrite(node, {_NODE_ATTRIBUTE: _widen_cast if is_cast else _widen_attribute})


def _widen_cast(attribute: memoryview) -> bytes:
    name = "".join(_text(value) for value in _payloads(attribute, _ATTRIBUTE_NAME))
    return _replace_number(attribute, _ATTRIBUTE_I, _FLOAT16, _FLOAT) if name == "to" else bytes(attribute)


def _widen_attribute(attribute: memoryview) -> bytes:
    return _rewrite(attribute, {_ATTRIBUTE_T: _widen_tensor, _ATTRIBUTE_G: _widen_graph})


def _widen_element(tensor_type: memoryview) -> bytes:
    return _replace_number(tensor_type, _TENSOR_ELEMENT, _FLOAT16, _FLOAT)


def _widen_tensor(tensor: memoryview) -> bytes:
    if _number(tensor, _TENSOR_DATA_TYPE) != _FLOAT16:
        return bytes(tensor)
    if _number(tensor, _TENSOR_INT32_DATA) is not None or any(True for _ in _payloads(tensor, _TENSOR_INT32_DATA)):
        raise EngineError("a float16 constant is stored as int32_data, which is not widened here; export again")
    wide = _rewrite(tensor, {_TENSOR_RAW_DATA: lambda raw: np.frombuffer(raw, "<f2").astype("<f4").tobytes()})
    return _replace_number(memoryview(wide), _TENSOR_DATA_TYPE, _FLOAT16, _FLOAT)


def _sign_zero(tensor: memoryview) -> bytes:
    name = "".join(_text(value) for value in _payloads(tensor, _TENSOR_NAME))
    if name not in INT8_ZERO_POINTS or _number(tensor, _TENSOR_DATA_TYPE) != _UINT8:
        return bytes(tensor)
    zero = _rewrite(tensor, {_TENSOR_RAW_DATA: lambda raw: bytes(len(raw))})
    return _replace_number(memoryview(zero), _TENSOR_DATA_TYPE, _UINT8, _INT8)


def _rewrite(message: memoryview, edits: Mapping[int, Edit]) -> bytes:
    """A message with the payloads of some of its fields edited; a payload's new length is written before it."""
    parts: list[bytes] = []
    for number, kind, start, payload in _fields(message):
        if kind == _BYTES and number in edits:
            edited = edits[number](payload)
            parts += [_varint(number << 3 | _BYTES), _varint(len(edited)), edited]
        else:
            parts.append(bytes(message[start : _end(message, start)]))
    return b"".join(parts)


def _replace_number(message: memoryview, field: int, old: int, new: int) -> bytes:
    parts: list[bytes] = []
    for number, kind, start, payload in _fields(message):
        if number == field and kind == _VARINT and _read_varint(payload, 0)[0] == old:
            parts += [_varint(number << 3 | _VARINT), _varint(new)]
        else:
            parts.append(bytes(message[start : _end(message, start)]))
    return b"".join(parts)


def _payloads(message: memoryview, field: int) -> Iterator[memoryview]:
    return (payload for number, kind, _, payload in _fields(message) if number == field and kind == _BYTES)


def _number(message: memoryview, field: int) -> int | None:
    """The last varint of that field (protobuf: the last one counts), None where there is none."""
    found = None
    for number, kind, _, payload in _fields(message):
        if number == field and kind == _VARINT:
            found = _read_varint(payload, 0)[0]
    return found


def _text(payload: memoryview) -> str:
    return bytes(payload).decode(errors="replace")


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """(field number, wire type, offset of the tag, payload) of every field; a varint's payload is its bytes."""
    offset = 0
    while offset < len(message):
        tag, body = _read_varint(message, offset)
        end = _end(message, offset)
        if tag & 7 == _BYTES:
            _, body = _read_varint(message, body)
        yield tag >> 3, tag & 7, offset, message[body:end]
        offset = end


def _end(message: memoryview, offset: int) -> int:
    """Where the field that starts at `offset` ends."""
    tag, body = _read_varint(message, offset)
    kind = tag & 7
    if kind == _VARINT:
        end = _read_varint(message, body)[1]
    elif kind == _BYTES:
        length, body = _read_varint(message, body)
        end = body + length
    elif kind in (_FIXED64, _FIXED32):
        end = body + (8 if kind == _FIXED64 else 4)
    else:
        end = len(message) + 1
    if end > len(message) or tag >> 3 == 0:
        raise EngineError("this is no ONNX file, or a part of one; export or download the bundle again")
    return end


def _read_varint(message: memoryview, offset: int) -> tuple[int, int]:
    """(value, offset behind it)."""
    value = 0
    for index, byte in enumerate(message[offset : offset + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, offset + index + 1
    raise EngineError("this is no ONNX file, or a part of one; export or download the bundle again")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
