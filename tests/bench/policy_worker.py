"""One way to run a policy, in a process of its own: what `bench_act` and `bench_diffusion` compare, in turns.

`policy_worker.py WAY POLICY OBSERVATION THREADS` loads POLICY (a bundle for `engine`, a checkpoint for `torch` and
`lerobot`), then answers each line on standard input with that many inferences: one JSON object with `ms` (wall time of
each), `cpu_ms` (processor time of one, all threads) and `peak_mb` (of this process since it began). With `lerobot` it
runs in LeRobot's own interpreter and imports nothing of ours. An inference is what a robot pays: one new raw
observation in, goals in joint units out; a policy that looks at several steps has seen the earlier ones before.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Infer = Callable[[], Any]
Arrays = dict[str, np.ndarray]


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


def engine(policy: Path, inputs: Arrays, threads: int) -> Infer:
    from device.bundle import Bundle
    from device.engine import infer_observation, open_engine

    bundle = Bundle.open(policy)
    opened = open_engine(bundle, threads, seed=0)
    noise = {name: inputs[name] for name in ("noise", "step_noise") if name in inputs and bundle.manifest.sampler}
    steps = bundle.manifest.observation_steps
    infer_observation(opened, bundle.manifest, inputs)
    keys: list[Any] = [("named arrays", step) for step in range(steps)]  # what infer_observation calls them

    def infer() -> Any:
        for name, target in opened.inputs.items():
            target[...] = inputs[name] if steps == 1 else inputs[name][-1]
        if steps == 1:
            return opened.infer(**noise)
        keys.append(time.perf_counter_ns())
        opened.observe(keys[-1])
        # The oldest of the observation's steps stays; the newest is encoded anew each time.
        return opened.infer([*keys[: steps - 1], keys[-1]], **noise)

    return infer


def torch_forward(policy: Path, inputs: Arrays, threads: int) -> Infer:
    import torch

    from export.checkpoint import Told
    from export.families import read_policy
    from export.sampling import Sampling

    torch.set_num_threads(threads)
    _, loaded = read_policy(policy, Told(), Sampling())
    return lambda: loaded.reference(inputs)


def lerobot(policy: Path, inputs: Arrays, threads: int) -> Infer:
    import torch
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    torch.set_num_threads(threads)
    kind = json.loads((policy / "config.json").read_text())["type"]
    loaded = get_policy_class(kind).from_pretrained(policy, local_files_only=True)
    on_cpu = {"device_processor": {"device": "cpu"}}
    before, after = make_pre_post_processors(loaded.config, pretrained_path=str(policy), preprocessor_overrides=on_cpu)
    ask = {"act": _lerobot_act, "diffusion": _lerobot_diffusion}[kind](loaded, before, inputs)

    def infer() -> Any:
        with torch.inference_mode():
            return after(ask()).numpy()[0]

    return infer


def _lerobot_act(policy: Any, before: Any, inputs: Arrays) -> Infer:
    return lambda: policy.predict_action_chunk(before(_prepared(inputs)))


def _lerobot_diffusion(policy: Any, before: Any, inputs: Arrays) -> Infer:
    """Through LeRobot's own queues of observations: each inference adds one, and encodes all that are there."""
    import torch
    from lerobot.policies.utils import populate_queues

    config = policy.config
    noise = torch.from_numpy(inputs["noise"])[None]
    steps = [{name: inputs[name][i] for name in config.input_features} for i in range(config.n_obs_steps)]

    def see(step: Arrays) -> Any:
        batch = before(_prepared(step))
        batch.pop("action", None)
        if config.image_features:
            batch["observation.images"] = torch.stack([batch[name] for name in config.image_features], dim=-4)
        known = {name: value for name, value in batch.items() if name in policy._queues}
        policy._queues = populate_queues(policy._queues, known)
        return batch

    policy.reset()
    with torch.inference_mode():
        whole = [see(step) for step in steps][-1]
    batches = itertools.chain([whole], iter(lambda: see(steps[-1]), None))
    return lambda: policy.predict_action_chunk(next(batches), noise=noise)


def _prepared(observation: Arrays) -> Any:
    import torch
    from lerobot.policies.utils import prepare_observation_for_inference

    return prepare_observation_for_inference(dict(observation), torch.device("cpu"), task="", robot_type="")


def peak_mb() -> float:
    """VmHWM and not ru_maxrss, which a child inherits from a large parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
