"""`selsft_run.json`: what made a folder of weights or scores.

Written before the work starts, so that an interrupted run can be identified. Nothing secret goes in: `to_dict`
hides tokens. Rejected: relying on `training_args.bin`, which is a pickle and says nothing about the data.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.chunks import class_counts, data_fingerprint, token_chunks
from ..data.columns import WEIGHTS
from ..records import RUN as NAME
from ..records import json_sha256, now, read_json, versions, write_json
from ..trainer import SelectiveSFTTrainer
from ..training.fingerprint import model_fingerprint
from .arguments import Arguments

# Hashing reads all weights: a second for a small model, minutes and a gathered copy for a sharded large one
_HASHED_BYTES = 4e9


def run_manifest(
    command: str, arguments: Arguments, trainer: SelectiveSFTTrainer, model_sha256: str | None = None
) -> dict[str, Any]:
    """Settings, versions, data and model of a run, as they are before it starts.

    Args:
        model_sha256: hash of the weights, where it is known already.
    """
    manifest: dict[str, Any] = {
        "command": command,
        "arguments": arguments.own,
        "started": now(),
        "python": platform.python_version(),
        "versions": versions(),
        "processes": trainer.accelerator.num_processes,
        "device": str(trainer.accelerator.device),
        "model": _model(arguments, trainer, model_sha256),
        "data": _data(arguments, trainer.train_dataset),
        "config": trainer.args.to_dict(),
        "model_config": {key: value for key, value in vars(arguments.model).items() if value is not None},
    }
    return manifest


def settings_sha256(arguments: Arguments) -> str:
    """Hash of all that a command was given, by flags or in a file; taken before anything is added to its settings."""
    training = {key: value for key, value in arguments.training.to_dict().items() if key != "resume_from_checkpoint"}
    parts = [arguments.script, arguments.model, arguments.mixture, arguments.extra]
    return json_sha256([training, *(vars(part) for part in parts if part is not None)])


def begun(folder: Path, settings: str) -> bool:
    """Whether a command with this `settings_sha256` has begun to fill `folder` and has not finished."""
    found = read_json(folder / NAME) if (folder / NAME).is_file() else {}
    return found.get("settings_sha256") == settings and "finished" not in found


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write (or replace, at the end of a run) the file as a whole."""
    write_json(Path(folder) / NAME, manifest)


def _model(arguments: Arguments, trainer: SelectiveSFTTrainer, sha256: str | None) -> dict[str, Any]:
    model = trainer.model
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    whole = trainer.accelerator.num_processes == 1 and size <= _HASHED_BYTES
    return {
        "name": arguments.model.model_name_or_path,
        "revision": getattr(model.config, "_commit_hash", None) or arguments.model.model_revision,
        "sha256": sha256 or (model_fingerprint(model) if whole else None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "reference": trainer.args.reference_model,
    }


def _data(arguments: Arguments, dataset) -> dict[str, Any]:
    found: dict[str, Any] = {"source": arguments.source.description, "split": arguments.script.dataset_train_split}
    if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
        found["rows"] = len(dataset)
        found["tokens"] = sum(chunk.size for chunk in token_chunks(dataset, ["input_ids"]))
        if {"labels", WEIGHTS} <= set(dataset.column_names):
            found["weights"] = class_counts(dataset)
        found["sha256"] = data_fingerprint(dataset)
    return found
