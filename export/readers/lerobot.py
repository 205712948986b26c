"""Reads a LeRobot policy directory: configuration, weights and normalisation, in either of its two layouts.

Since 0.4 the normalisation stands in processor files beside the weights; before, in buffers among the weights. Both
become one Checkpoint, and nothing downstream knows which it was. Nothing is guessed: files are found by the names that
the JSON gives, features by the names that the configuration declares, and a processor step that would change numbers
in a way that this reader does not know is refused by name. Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from device.bundle import file_sha256
from export.checkpoint import Checkpoint, Feature, Told, as_published, parse_features, read_json, read_tensors
from export.errors import ExportError
from export.readers import legacy_buffers, processors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TRAINING_CONFIG = "train_config.json"
AVERAGED = "pretrained_model_ema"  # beside pretrained_model, where training kept a moving average of the weights
NEARBY = ("pretrained_model", "last/pretrained_model", "checkpoints/last/pretrained_model", "..", "../pretrained_model")


def read_checkpoint(path: Path, told: Told | None = None) -> Checkpoint:
    """Read a policy directory. Raises ExportError."""
    directory, warnings = find_policy(path)
    config = read_json(directory / CONFIG)
    checkpoint = Checkpoint(
        path=directory,
        config_path=directory / CONFIG,
        weights_path=directory / WEIGHTS,
        config=config,
        inputs=_features(config, "input_features", directory),
        outputs=_features(config, "output_features", directory),
        weights=as_published(directory / WEIGHTS, read_tensors(directory / WEIGHTS)),
        layout="",
        warnings=warnings,
    )
    allowed = told.allow_unnormalized if told else frozenset()
    if processors.has_processors(directory):
        checkpoint.layout = "lerobot processors (0.4 and later)"
        files = processors.read_normalization(checkpoint, allowed)
    else:
        checkpoint.layout = "lerobot buffers (before 0.4)"
        files = legacy_buffers.read_normalization(checkpoint, allowed)
    checkpoint.dataset = _training_dataset(directory)
    checkpoint.source_files = {name: file_sha256(directory / name) for name in (CONFIG, WEIGHTS, *files)}
    return checkpoint


def find_policy(path: Path) -> tuple[Path, list[str]]:
    """The folder that holds config.json: `path`, one level off, or the averaged weights beside it, which the returned
    warning says. A path of a file means the folder that it is in and no other."""
    if not path.exists():
        raise ExportError(f"{path} does not exist; give the folder that holds {CONFIG} and {WEIGHTS}")
    start = path if path.is_dir() else path.parent
    for candidate in (start, *(start / name for name in NEARBY)):
        if _holds_policy(candidate):
            found = candidate if candidate == start else candidate.resolve()
            warnings = [] if found == path else [f"{path} holds no policy itself; using {found}"]
            averaged = found.resolve().parent / AVERAGED
            if path.is_dir() and found.resolve() != averaged and _holds_policy(averaged):
                warnings.append(
                    f"using {averaged}, the moving average of the weights in {found}, which tends to act better; to "
                    f"export the latter, give {found / CONFIG}"
                )
                found = averaged
            return found, warnings
    if (start / CONFIG).is_file():
        raise ExportError(f"{start / WEIGHTS} is missing")
    raise ExportError(
        f"{path} holds no {CONFIG} and {WEIGHTS}, nor does a pretrained_model beside, above or below it; "
        "give the folder <run>/checkpoints/<step>/pretrained_model"
    )


def _holds_policy(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _features(config: Mapping[str, Any], key: str, directory: Path) -> tuple[Feature, ...]:
    found = config.get(key)
    if not isinstance(found, dict) or not found:
        raise ExportError(
            f"{directory / CONFIG}: {key} is missing; checkpoints from before LeRobot had it (2025) must first be "
            "loaded and saved with LeRobot 0.3.3"
        )
    return parse_features(found, f"{directory / CONFIG}: {key}")


def _training_dataset(directory: Path) -> str | None:
    if not (directory / TRAINING_CONFIG).is_file():
        return None
    dataset = read_json(directory / TRAINING_CONFIG).get("dataset")
    name = dataset.get("repo_id") if isinstance(dataset, dict) else None
    return name if isinstance(name, str) else None
