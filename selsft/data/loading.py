"""Loading rows: a name on the Hub, a local file, a folder of scores or of `save_to_disk`, a TRL mixture, and files in
which other tools say what is wrong (`foreign`).

`trl sft` hands `--dataset_name` to `load_dataset`, which takes a folder of files but neither a file nor a saved data
set nor what `selsft score` writes. Rejected: a flag of our own per kind of file.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import logging
import lzma
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, get_dataset

from ..errors import InputError, failed_write, input_errors
from ..records import make_writable
from .foreign import check_unread, read_marked, split_format
from .rows import Split, check_rows
from .scored_folder import is_scored, load_scores

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
COMPRESSED = {".gz", ".xz", ".zst", ".bz2"}


@dataclass(frozen=True)
class DataSource:
    """Where rows come from.

    Args:
        name: a file, a folder of files, of `save_to_disk` or of scores, or a name on the Hub. `FORMAT:FILE` is a file
            in the format of another tool (`foreign.FORMATS`).
        config: configuration of a data set on the Hub.
        split: the split that is trained on. A single file is one split, whatever its name.
        streaming: whether rows are read while they are used.
        mixture: TRL's mixture of data sets, instead of `name`.
        columns: new name -> name in the data, for data whose columns are called otherwise (`parse_columns`).
    """

    name: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    mixture: DatasetMixtureConfig | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """What the data is loaded from, for messages."""
        if self._parts:
            return ", ".join(f"{part.path} {part.data_files or part.name or ''}".strip() for part in self._parts)
        return split_format(self.name or "")[1]

    @property
    def _parts(self) -> list[Any]:
        return self.mixture.datasets if self.mixture is not None else []

    def check(self) -> None:
        """Raise when there is no data set, or a local file that does not exist or is empty. Nothing is read."""
        if self._parts:
            return
        if not self.name:
            raise InputError(
                "dataset_name is missing: give --dataset_name NAME, FILE or FOLDER, or `datasets:` in YAML"
            )
        form, name = split_format(self.name)
        if form is not None and self.streaming:
            raise InputError(f"dataset_streaming=True is not possible with a file of the format {form}: leave it out")
        if form is not None or _builder(name):
            if not Path(name).is_file():
                raise InputError(f"dataset_name={name!r}: no such file in {os.getcwd()}")
            if not Path(name).stat().st_size:
                raise InputError(f"dataset_name={name!r} is an empty file: it needs at least one row")


def load_splits(
    source: DataSource, test_split: str | None = None, text_field: str = "text", strict: bool = False
) -> tuple[Split, Split | None]:
    """Train split and, if it is named, test split.

    Args:
        text_field: column of plain text that can be trained on.
        strict: raise for empty rows of the train split, which SFTTrainer drops silently.

    Raises:
        `InputError` for data that is not there, splits that it does not have, and columns that cannot be trained on.
    """
    with input_errors(), data_errors(source):
        splits = _load(source)
    wanted = {"dataset_train_split": source.split}
    if test_split is not None:
        wanted["dataset_test_split"] = test_split
    for flag, name in wanted.items():
        if name not in splits:
            hint = " or set --eval_strategy no" if flag == "dataset_test_split" else ""
            raise InputError(
                f"{flag}={name!r} is not a split of the data, which has {', '.join(map(repr, splits))}: "
                f"choose one of these{hint}"
            )
    train = _renamed(splits[source.split], source.columns)
    test = None if test_split is None else _renamed(splits[test_split], source.columns)
    with data_errors(source):
        train = check_rows(train, text_field, strict)
        if test is not None:
            test = check_rows(test, text_field, what=f"dataset_test_split={test_split!r}")
    return train, test


def parse_columns(text: str | None) -> dict[str, str]:
    """`"prompt=question,completion=answer"` as new name -> name in the data.

    Raises:
        `InputError` for a part that is not of this form, and for a name that occurs twice.
    """
    columns: dict[str, str] = {}
    for part in text.split(",") if text else []:
        new, equals, old = (piece.strip() for piece in part.partition("="))
        if not (equals and new and old) or new in columns or old in columns.values():
            raise InputError(f"columns={text!r}: write it as prompt=question,completion=answer, each name once")
        columns[new] = old
    return columns


def _renamed(data: Split, columns: Mapping[str, str]) -> Split:
    if not columns:
        return data
    there = data.column_names or list(next(iter(data), {}))
    for new, old in columns.items():
        if old not in there:
            raise InputError(
                f"columns: {old!r} is not a column of the data, which has {', '.join(map(repr, there))}: correct "
                f"{new}={old}"
            )
        if new in there and new not in columns.values():
            raise InputError(
                f"columns: {new}={old} would hide the column {new!r} of the data: rename or drop it there"
            )
    return data.rename_columns({old: new for new, old in columns.items()})


def load_rows(source: DataSource, text_field: str = "text") -> Dataset:
    """The rows of one split, mapped into memory.

    Raises:
        `InputError` as `load_splits`, and for a stream.
    """
    data, _ = load_splits(source, text_field=text_field)
    if isinstance(data, IterableDataset):
        raise InputError("dataset_streaming=True: these rows are read several times, leave it out")
    return data


def _load(source: DataSource) -> DatasetDict | IterableDatasetDict | dict[str, Dataset]:
    make_writable(Path(datasets.config.HF_DATASETS_CACHE), "HF_DATASETS_CACHE")
    if source.mixture is not None and source.mixture.datasets:
        return get_dataset(source.mixture)
    source.check()
    assert source.name is not None
    form, name = split_format(source.name)
    path = Path(name)
    if form is not None:
        with _open(path) as file:
            return {source.split: read_marked(file.read().decode("utf-8"), form, name)}
    scored = is_scored(path)
    if scored or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        if source.streaming:
            raise InputError(f"dataset_streaming=True is not possible with the saved data set {name!r}: leave it out")
        saved = load_scores(name) if scored else load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else {source.split: saved}
    if builder := _builder(name):
        if builder == "json" and _starts_with_null(path):
            raise InputError(
                f"{name!r} cannot be read as data: its first row is null, not an object with a key per column"
            )
        found = load_dataset(builder, data_files={source.split: name}, streaming=source.streaming)
    else:
        found = load_dataset(name, name=source.config, streaming=source.streaming)
    for data in found.values():
        check_unread(data, name)
    return found


def _builder(name: str) -> str | None:
    """The builder of `datasets` for a file of this name; `None` for anything but a file."""
    path = Path(name)
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return BUILDERS.get(suffixes[-1]) if suffixes and not path.is_dir() else None


@contextlib.contextmanager
def data_errors(source: DataSource) -> Iterator[None]:
    """While data is read: what cannot be read becomes an `InputError` that names the line, where lines can be counted.
    Streamed data is read late, so this goes around whatever iterates over it."""
    readers = logging.getLogger("datasets.packaged_modules")  # print an error before they raise it
    level = readers.level
    readers.setLevel(logging.CRITICAL)
    try:
        yield
    except (DatasetsError, ValueError, TypeError) as error:  # Arrow's errors and those of decoding are of these kinds
        if failed_write(error):
            raise
        if not (isinstance(error, DatasetsError | pa.ArrowException | UnicodeDecodeError) or _from_reader(error)):
            raise
        name = source.description
        place = _broken_line(Path(name)) if Path(name).is_file() else None
        raise InputError(f"{name!r} cannot be read as data: {place or error.__cause__ or error}") from error
    finally:
        readers.setLevel(level)


def _from_reader(error: BaseException) -> bool:
    """Whether an error comes from the part of `datasets` that reads files."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith("datasets.packaged_modules") for frame in frames)


def _broken_line(path: Path) -> str | None:
    """The first line of a text file that cannot be read, and why; `None` when every line by itself can be."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    if not suffixes or suffixes[-1] in (".parquet", ".arrow"):
        return None
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x} in column {error.start + 1})"
            if suffixes[-1] != ".jsonl" or not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg} in column {error.colno})"
            if not isinstance(row, dict):
                return f"line {number} is not a JSON object with a key per column"
    return None


def _starts_with_null(path: Path) -> bool:
    """Whether the first row is `null`, on which the reader of Arrow crashes."""
    with _open(path) as lines:
        try:
            first = next((text for line in lines if (text := line.removeprefix(b"\xef\xbb\xbf").strip())), b"")
        except (OSError, EOFError):  # a damaged archive, which the reader names
            return False
    return first.lstrip(b"[ \t").startswith(b"null")


def _open(path: Path) -> IO[bytes]:
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")
