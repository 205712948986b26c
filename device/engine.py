"""Runs a bundle's network: an observation in, a chunk of actions out, in the joints' units.

`predict` holds one engine for as long as its bundle is active; `understudy bundle run` and `check` open one for a
moment. Inputs and output are allocated once and bound to the network, so that a caller decodes a JPEG straight into
what inference reads, and an inference allocates nothing that the caller sees. An engine refuses to hand out numbers
that are not finite. onnxruntime's worker threads sleep between inferences instead of spinning: on a small board a
spinning worker would take its core from the control loop.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnxruntime

from device.arrays import Array, dump_arrays, load_arrays
from device.bundle import ACTION, POLICY, Bundle, Manifest
from device.durable import write_durably
from device.errors import BundleError, UnderstudyError

if TYPE_CHECKING:
    from rich.table import Table

_TENSOR_TYPES = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}


class EngineError(UnderstudyError, RuntimeError):
    """A network that cannot be loaded or run, or that answered with something that is no motion."""


class Engine(Protocol):
    """A loaded policy.

    A caller fills `inputs` with one observation step, names it with `observe`, and asks with `infer` for the chunk that
    follows from the steps of these names. A step that the engine knows already is not filled in again, which spares
    its pictures' decoding and encoding. Where a policy looks at one step only, `infer()` alone does for all of it.
    """

    inputs: dict[str, Array]
    """One observation step by LeRobot's names, to be filled in place: observation.state float32 [S] (joint units),
    observation.images.<camera> uint8 [H, W, 3] RGB, observation.environment_state float32 [E]. Never a leading axis,
    however many steps the policy looks at."""

    def observe(self, key: Hashable) -> None:
        """Take in what `inputs` holds under `key`, such as its capture time; a key that is known is overwritten.

        `inputs` may be filled anew afterwards, unless the policy is one graph, which reads them in `infer`.
        Raises EngineError where the runtime fails or the encoding is not finite; the key is then unknown.
        """

    def knows(self, key: Hashable) -> bool:
        """Whether `infer` can use `key` as it is. What was observed, asked for or used most recently is kept: a key
        that is known stays so for at least as many further steps observed as the policy looks at."""

    def infer(
        self, keys: Sequence[Hashable] | None = None, *, noise: Array | None = None, step_noise: Array | None = None
    ) -> Array:
        """The chunk for the observation steps `keys` (as many as the manifest's observation_steps, oldest first), or,
        without them, for what `inputs` holds: float32 [K, A] in joint units, a view that the next call overwrites.

        Of policies that sample: `noise` float32 [H, A] is x_T, `step_noise` float32 [S, H, A] is what the steps draw
        (row i for step i; S - 1 rows do where the last step draws none). Drawn from the engine's generator if None.
        Raises EngineError where the result is not finite or the runtime fails, for a key that it does not know, for
        noise that does not fit, and for no keys where the policy looks at several steps.
        """


def open_engine(bundle: Bundle, threads: int = 1) -> Engine:
    """Load a bundle's network on this machine. Raises EngineError."""
    if bundle.manifest.family != "act":
        raise EngineError(
            f"{bundle.path} holds a policy of family {bundle.manifest.family!r}; this device runs act: "
            "update the device software"
        )
    return OnnxEngine(bundle.path / POLICY, bundle.manifest, threads)


class OnnxEngine:
    """One onnxruntime session on the CPU, bound to preallocated inputs and output."""

    def __init__(self, path: Path, manifest: Manifest, threads: int = 1) -> None:
        self._path = path
        self._session = _open_session(path, threads)
        expected = manifest.input_shapes()
        _check_signature(path, self._session, expected, (manifest.chunk_size, len(manifest.joints)))
        self.inputs: dict[str, Array] = {name: np.zeros(shape, dtype) for name, (shape, dtype) in expected.items()}
        self._output: Array = np.zeros((manifest.chunk_size, len(manifest.joints)), np.float32)
        self._binding = self._session.io_binding()
        for name, array in self.inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._binding.bind_output(ACTION, "cpu", 0, np.float32, self._output.shape, self._output.ctypes.data)
        self._options = onnxruntime.RunOptions()
        self._held: Hashable = None  # the key of what `inputs` holds

    def observe(self, key: Hashable) -> None:
        """See Engine.observe."""
        self._held = key

    def knows(self, key: Hashable) -> bool:
        """See Engine.knows."""
        return key == self._held

    def infer(
        self, keys: Sequence[Hashable] | None = None, *, noise: Array | None = None, step_noise: Array | None = None
    ) -> Array:
        """See Engine.infer."""
        if keys is not None and tuple(keys) != (self._held,):
            raise EngineError(f"{self._path}: asked about {keys}, but its inputs hold {self._held}; observe it first")
        if noise is not None or step_noise is not None:
            raise EngineError(f"{self._path}: this policy does not sample, so it takes no noise")
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise EngineError(f"{self._path}: inference failed: {error}") from error
        if not np.isfinite(self._output).all():
            raise EngineError(
                f"{self._path}: the policy answered NaN or infinity; check the observation (a camera that is black, "
                "a joint far outside what it was trained on) or export again"
            )
        return self._output


def run_observation(bundle_path: Path, observation: Path, out: Path, threads: int = 1) -> Array:
    """One inference from files: OBS.npz by LeRobot's names in, CHUNK.npz with `action` float32 [K, A] out.

    Returns the actions. Raises BundleError for an observation that is not what the policy takes, EngineError.
    """
    bundle = Bundle.open(bundle_path)
    arrays = load_arrays(observation)
    check_observation(bundle.manifest, arrays, str(observation))
    engine = open_engine(bundle, threads)
    for name, array in arrays.items():
        engine.inputs[name][...] = array
    actions: Array = engine.infer().copy()
    try:
        write_durably(out, dump_arrays({ACTION: actions}))
    except OSError as error:
        raise BundleError(f"{out} cannot be written: {error}") from error
    return actions


def check_observation(manifest: Manifest, arrays: dict[str, Array], where: str) -> None:
    """Raise BundleError unless the arrays are finite and what the policy takes. `where` names the file."""
    expected = manifest.input_shapes()
    for name in expected:
        if name not in arrays:
            raise BundleError(f"{where}: {name} is missing; the policy takes {', '.join(expected)}")
    for name, array in arrays.items():
        if name not in expected:
            raise BundleError(f"{where}: {name} is nothing that the policy takes; it takes {', '.join(expected)}")
        shape, dtype = expected[name]
        if array.dtype != dtype or array.shape != shape:
            raise BundleError(
                f"{where}: {name} should be {dtype} {list(shape)}, found {array.dtype} {list(array.shape)}"
            )
        if dtype.kind == "f" and not np.isfinite(array).all():
            raise BundleError(f"{where}: {name} holds NaN or infinity")


def describe(manifest: Manifest) -> Table:
    """The manifest for a person, as a rich table."""
    from rich.table import Table  # not paid for by `predict`

    table = Table("what", "value", title="policy bundle", show_lines=False)
    hand_over: str = manifest.handoff.method
    if manifest.handoff.m is not None:
        hand_over += f" (m = {manifest.handoff.m:g})"
    source, fidelity = manifest.provenance, manifest.fidelity
    chunk_s = manifest.chunk_size / manifest.action_rate_hz
    rows = [
        ("family", manifest.family),
        ("joints", "\n".join(f"{joint.name}  {joint.unit.value}" for joint in manifest.joints)),
        ("cameras", "\n".join(f"{c.name}  {c.width}x{c.height}" for c in manifest.cameras) or "none"),
        ("state values", str(manifest.state_size)),
        ("environment state", "none" if manifest.environment_state is None else str(manifest.environment_state)),
        ("chunk", f"{manifest.chunk_size} actions at {manifest.action_rate_hz:g} Hz ({chunk_s:.2f} s)"),
        ("observation steps", str(manifest.observation_steps)),
        ("hand-over", hand_over),
        ("two-state joints", ", ".join(manifest.two_state_joints) or "none"),
        ("checkpoint", f"{source.checkpoint} ({source.policy_type}, {source.source_layout})"),
        ("weights sha256", source.checkpoint_sha256),
        ("dataset", source.dataset or "not known"),
        ("exported", f"{source.exported_at} by understudy {source.exporter}"),
        ("stored weights", fidelity.weights),
        ("largest error", f"{fidelity.max_error:.2g} against PyTorch, {fidelity.max_rounding_error:.2g} from rounding"),
        ("files", "\n".join(manifest.files)),
    ]
    for what, value in rows:
        table.add_row(what, value)
    return table


def _open_session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"{path} cannot be loaded: {reason}; export or download the bundle again") from error


def _check_signature(
    path: Path, session: Any, expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], output: tuple[int, int]
) -> None:
    found = {node.name: (tuple(node.shape), _TENSOR_TYPES.get(node.type)) for node in session.get_inputs()}
    results = {node.name: (tuple(node.shape), _TENSOR_TYPES.get(node.type)) for node in session.get_outputs()}
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise EngineError(f"{path} does not take the inputs that its manifest names ({', '.join(wrong)})")
    if results != {ACTION: (output, np.dtype(np.float32))}:
        raise EngineError(f"{path} does not give {ACTION} float32 {list(output)}, as its manifest says")
