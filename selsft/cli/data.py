"""The data set of a command: a name on the Hub, a local file, a folder that `save_to_disk` wrote, or a TRL mixture.

`trl sft` hands `--dataset_name` to `load_dataset`, which takes a folder of files but neither a file nor a saved data
set (such as `selsft score` writes). Rejected: a flag of our own per kind of file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from trl import get_dataset

from .arguments import Arguments
from .errors import InputError, input_errors

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
COMPRESSED = {".gz", ".xz", ".zst", ".bz2"}
# What SFTTrainer makes rows from, besides the text column
KNOWN_COLUMNS = ("messages", "conversations", "input_ids")

Split: TypeAlias = Dataset | IterableDataset


def load_splits(arguments: Arguments, evaluate: bool) -> tuple[Split, Split | None]:
    """Train split and, if asked for, test split.

    Raises:
        `InputError` for data that is not there, splits that it does not have, and columns that cannot be trained on.
    """
    script = arguments.script
    with input_errors():
        try:
            splits = _load(arguments)
        except DatasetsError as error:  # its cause says what is wrong, and in which line
            raise InputError(f"{describe(arguments)!r} cannot be read as data: {error.__cause__ or error}") from error
    wanted = {"dataset_train_split": script.dataset_train_split}
    if evaluate:
        wanted["dataset_test_split"] = script.dataset_test_split
    for field, name in wanted.items():
        if name not in splits:
            hint = " or set --eval_strategy no" if field == "dataset_test_split" else ""
            raise InputError(
                f"{field}={name!r} is not a split of the data, which has {', '.join(map(repr, splits))}: "
                f"choose one of these{hint}"
            )
    train = splits[script.dataset_train_split]
    _check_columns(train, arguments.training.dataset_text_field)
    return train, splits[script.dataset_test_split] if evaluate else None


def check_source(arguments: Arguments) -> None:
    """Raise when there is no data set, or a local file that does not exist or is empty. Cheap: nothing is read."""
    name = arguments.script.dataset_name
    if arguments.mixture.datasets:
        return
    if not name:
        raise InputError("dataset_name is missing: give --dataset_name NAME, FILE or FOLDER, or `datasets:` in YAML")
    if _builder(name):
        if not Path(name).is_file():
            raise InputError(f"dataset_name={name!r}: no such file in {os.getcwd()}")
        if not Path(name).stat().st_size:
            raise InputError(f"dataset_name={name!r} is an empty file: it needs at least one row")


def describe(arguments: Arguments) -> str:
    """What the data was loaded from."""
    if arguments.mixture.datasets:
        parts = arguments.mixture.datasets
        return ", ".join(f"{part.path} {part.data_files or part.name or ''}".strip() for part in parts)
    return arguments.script.dataset_name or ""


def _load(arguments: Arguments) -> DatasetDict | IterableDatasetDict | dict[str, Dataset]:
    script, name = arguments.script, arguments.script.dataset_name
    if arguments.mixture.datasets:
        return get_dataset(arguments.mixture)
    check_source(arguments)
    assert name is not None
    path = Path(name)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        if script.dataset_streaming:
            raise InputError(f"dataset_streaming=True is not possible with the saved data set {name!r}: leave it out")
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else {script.dataset_train_split: saved}
    if builder := _builder(name):
        files = {script.dataset_train_split: name}
        return load_dataset(builder, data_files=files, streaming=script.dataset_streaming)
    return load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)


def _builder(name: str) -> str | None:
    """The builder of `datasets` for a file of this name; `None` for anything but a file."""
    path = Path(name)
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return BUILDERS.get(suffixes[-1]) if suffixes and not path.is_dir() else None


def _check_columns(data: Split, text_field: str) -> None:
    """TRL stops with a bare KeyError in a worker when no column fits."""
    names = data.column_names
    if names is None:  # streamed without features: known from the first row
        names = list(next(iter(data), {}))
    if isinstance(data, Dataset) and len(data) == 0:
        raise InputError("the train split has no rows: there is nothing to learn from")
    if {"prompt", "completion"} <= set(names) or any(name in names for name in (*KNOWN_COLUMNS, text_field)):
        return
    raise InputError(
        f"the data has the columns {', '.join(map(repr, names))} and none that can be trained on: it needs "
        f"{text_field!r} (see --dataset_text_field), 'messages', 'prompt' and 'completion', or 'input_ids'"
    )
