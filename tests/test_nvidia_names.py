"""Every name of TensorRT's and CUDA's that the device uses is one that NVIDIA's own modules have.

Neither can be installed where these tests run, so the modules were asked once: tests/fixtures/record_nvidia_names.py
loads the bindings of the versions that JetPacks carry and writes down which of our names each has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="the fake runs graphs")

from fixtures import fake_tensorrt
from fixtures.nvidia_names import CUDA, DEVICE, TENSORRT, used_names

TABLE: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parent / "fixtures" / "nvidia_names.json").read_text()
)
TENSORRT_VERSIONS = ["10.3.0", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106"]
CUDA_VERSIONS = ["cuda-python==12.2.1", "cuda-python==12.6.2.post1", "cuda-bindings==12.9.10", "cuda-bindings==13.0.3",
                 "cuda-bindings==13.4.4"]  # fmt: skip
REMEDY = "run python tests/fixtures/record_nvidia_names.py"


@pytest.mark.parametrize(
    ("library", "modules", "versions"), [("tensorrt", TENSORRT, TENSORRT_VERSIONS), ("cuda", CUDA, CUDA_VERSIONS)]
)
def test_every_name_that_we_use_is_in_every_version(
    library: str, modules: dict[str, dict[str, str]], versions: list[str]
) -> None:
    used = used_names(modules)
    assert used == set(TABLE[library]), REMEDY
    assert {name: found for name, found in TABLE[library].items() if found != versions} == {}


def test_names_are_collected_from_calls_members_and_overridden_methods() -> None:
    used = used_names(TENSORRT)
    assert {"Builder.create_network", "BuilderFlag.TF32", "IBuilderConfig.max_aux_streams"} <= used
    assert {"IProgressMonitor.step_complete", "ILogger.log", "IExecutionContext.execute_async_v3"} <= used
    assert {"cudaMemcpyKind.cudaMemcpyHostToDevice", "cudaDeviceProp.multiProcessorCount"} <= used_names(CUDA)


def public(kind: Any) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_fake_has_no_name_that_the_real_modules_lack() -> None:
    """So that code which passes over the fake uses no other name either, whatever the collector missed."""
    module = fake_tensorrt.make_tensorrt(fake_tensorrt.FakeGpu(), "10.3.0")
    state = {"gpu", "version", "strongly_typed"}  # of the fake
    allowed = set(TABLE["tensorrt"]) | {name.split(".")[0] for name in TABLE["tensorrt"]}
    not_used = {"DataType.HALF", "DataType.INT64", "ILogger.INTERNAL_ERROR", "TensorIOMode.OUTPUT"}
    names = {name for name in public(module) if isinstance(vars(module)[name], type)}
    assert names <= allowed
    kinds = [getattr(fake_tensorrt, name) for name in vars(fake_tensorrt) if name in allowed or name == "ICudaEngine"]
    for kind in kinds:
        members = {member.name for member in kind} if hasattr(kind, "__members__") else public(kind) - state
        assert {f"{kind.__name__}.{name}" for name in members} <= allowed | not_used
    calls = {name for name in public(fake_tensorrt.FakeCudart) if name.startswith("cuda")}
    assert calls <= {name.split(".")[0] for name in TABLE["cuda"]}


def test_no_other_module_of_ours_touches_them() -> None:
    for path in DEVICE.glob("*.py"):
        if path.name not in TENSORRT and path.name not in CUDA:
            text = path.read_text()
            assert 'import_module("tensorrt' not in text
            assert "trt." not in text, path.name
