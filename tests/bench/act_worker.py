"""One way to run an ACT policy, in a process of its own: what `bench_act` compares, in turns.

`act_worker.py WAY POLICY OBSERVATION THREADS` loads POLICY (a bundle for `engine`, a checkpoint for `torch` and
`lerobot`), then answers each line on standard input with that many inferences: one JSON object with `ms` (wall time of
each), `cpu_ms` (processor time of one, all threads) and `peak_mb` (of this process since it began). With `lerobot` it
runs in LeRobot's own interpreter and imports nothing of ours. An inference is what a robot pays: raw observation in,
goals in joint units out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Infer = Callable[[], Any]


def main() -> None:
    way, policy, observation, threads = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    started = time.perf_counter()
    with np.load(observation) as file:
        inputs = {name: file[name] for name in file.files}
    infer = {"engine": engine, "torch": torch_forward, "lerobot": lerobot}[way](policy, inputs, threads)
    actions = np.asarray(infer())
    print(json.dumps({"load_s": time.perf_counter() - started, "actions": actions.tolist()}), flush=True)
    for line in sys.stdin:
        walls, cpu = [], time.process_time()
        for _ in range(int(line)):
            begin = time.perf_counter()
            infer()
            walls.append(1e3 * (time.perf_counter() - begin))
        cpu_ms = 1e3 * (time.process_time() - cpu) / len(walls)
        print(json.dumps({"ms": walls, "cpu_ms": cpu_ms, "peak_mb": peak_mb()}), flush=True)


def engine(policy: Path, inputs: dict[str, np.ndarray], threads: int) -> Infer:
    from device.bundle import Bundle
    from device.engine import open_engine

    opened = open_engine(Bundle.open(policy), threads)

    def infer() -> Any:
        for name, array in inputs.items():
            opened.inputs[name][...] = array
        return opened.infer()

    return infer


def torch_forward(policy: Path, inputs: dict[str, np.ndarray], threads: int) -> Infer:
    import torch

    from export.act.read import read_act
    from export.readers.lerobot import read_checkpoint

    torch.set_num_threads(threads)
    loaded = read_act(read_checkpoint(policy))
    return lambda: loaded.reference(inputs)


def lerobot(policy: Path, inputs: dict[str, np.ndarray], threads: int) -> Infer:
    import torch
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.utils import prepare_observation_for_inference

    torch.set_num_threads(threads)
    loaded = ACTPolicy.from_pretrained(policy, local_files_only=True)
    on_cpu = {"device_processor": {"device": "cpu"}}
    before, after = make_pre_post_processors(loaded.config, pretrained_path=str(policy), preprocessor_overrides=on_cpu)

    def infer() -> Any:
        raw = prepare_observation_for_inference(dict(inputs), torch.device("cpu"), task="", robot_type="")
        with torch.inference_mode():
            return after(loaded.predict_action_chunk(before(raw))).numpy()[0]

    return infer


def peak_mb() -> float:
    """VmHWM and not ru_maxrss, which a child inherits from a large parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
