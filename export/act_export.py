"""An ACT policy to what a bundle holds: the network as ONNX, golden inputs with the reference's answer, the errors.

`export.command` calls `author` and writes what it returns. The reference is the network in PyTorch, which the tests
hold equal to LeRobot's own; the ONNX file is run once in onnxruntime, on the very bytes that go into the bundle, and
export fails where the two differ by more than the tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime
import torch

from device.bundle import ACTION, ENVIRONMENT_STATE, STATE
from export.act import ActPolicy
from export.act_network import FIRST_DECODER_ROW, act, first_decoder_row, run_in_torch
from export.act_weights import ActConfig
from export.errors import ExportError
from export.graph import GraphOperations, stored_in_half
from export.operations import Array

TOLERANCE = 1e-3  # of a joint unit


@dataclass(frozen=True)
class AuthoredPolicy:
    """model: the ONNX file; golden: inputs by the robot's names and `action`; errors in joint units."""

    model: bytes
    nodes: int
    golden: dict[str, Array]
    max_error: float
    max_rounding_error: float


def author(
    policy: ActPolicy, input_names: Mapping[str, str], observation: Mapping[str, Array] | None, *, half: bool
) -> AuthoredPolicy:
    """Write the network down and prove it. `input_names`: policy's name -> robot's. `observation`: a real one, by the
    policy's names, for golden inputs; made up where there is none. Raises ExportError."""
    policy = with_constants(policy)
    stored = rounded(policy) if half else policy
    graph = GraphOperations(policy.weights, input_shapes(policy.config), input_names, half=half)
    model = graph.model(
        act(graph, stored), (policy.config.chunk_size, policy.config.action_size), producer="understudy"
    )
    content = model.SerializeToString()
    inputs = dict(observation) if observation is not None else made_up_observation(policy)
    expected = run_in_torch(stored, inputs)
    rounding = float(np.abs(expected - run_in_torch(policy, inputs)).max()) if half else 0.0
    golden = {input_names[name]: array for name, array in inputs.items()}
    error = _compare(content, golden, expected)
    return AuthoredPolicy(content, len(model.graph.node), golden | {ACTION: expected}, error, rounding)


def with_constants(policy: ActPolicy) -> ActPolicy:
    """The policy with what the network reads as a weight but training did not store."""
    row = first_decoder_row(policy.config, policy.weights)
    return replace(policy, weights=policy.weights | {FIRST_DECODER_ROW: row})


def rounded(policy: ActPolicy) -> ActPolicy:
    """The policy with the weights that half-precision storage would give. Raises ExportError on overflow."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in policy.weights.items():
        weights[name] = tensor.half().float() if stored_in_half(tensor) else tensor
        if not torch.isfinite(weights[name]).all():
            largest = f"{tensor.abs().max():g}"
            raise ExportError(f"{name} does not fit half precision (largest {largest}); use --weights fp32")
    return replace(policy, weights=weights)


def input_shapes(config: ActConfig) -> dict[str, tuple[int, ...]]:
    """Raw inputs by the policy's names: vectors [n], images [H, W, 3]."""
    shapes: dict[str, tuple[int, ...]] = {STATE: (config.state_size,)}
    if config.environment_state is not None:
        shapes[ENVIRONMENT_STATE] = (config.environment_state,)
    return shapes | {name: (height, width, 3) for name, height, width in config.images}


def made_up_observation(policy: ActPolicy) -> dict[str, Array]:
    """Inputs that reach every part of the network: joints within their statistics, smooth frames that compress well."""
    inputs: dict[str, Array] = {}
    for index, (name, shape) in enumerate(input_shapes(policy.config).items()):
        if len(shape) == 1:
            normalizer = policy.normalizers[name]
            spread = 0.7 * np.sin(1.0 + 2.0 * np.arange(shape[0]))
            inputs[name] = (normalizer.offset + normalizer.scale * spread).astype(np.float32)
            continue
        y, x = np.mgrid[0 : shape[0], 0 : shape[1]] / max(shape)
        waves = [np.sin(2 * np.pi * ((2 + c) * x + (3 - c) * y) + index + c) for c in range(3)]
        inputs[name] = (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
    return inputs


def _compare(model: bytes, inputs: Mapping[str, Array], expected: Array) -> float:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (found,) = session.run([ACTION], dict(inputs))
    if not np.isfinite(expected).all():
        raise ExportError("the policy answers NaN or infinity to ordinary inputs; its weights are of no use")
    error = float(np.abs(found - expected).max())
    if not error <= TOLERANCE:
        raise ExportError(
            f"policy.onnx differs from PyTorch by {error:.2g} joint units on the golden inputs (bound: {TOLERANCE:g}); "
            "this is a defect of the exporter, please report it with the checkpoint's config.json"
        )
    return error
