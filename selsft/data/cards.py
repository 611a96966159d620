"""`README.md` of a folder with rows: what `datasets.load_dataset` needs to open it.

A folder of selsft has records in JSON beside its rows, and rows of several kinds, of which `load_dataset` would take
the most frequent ending for the data. A card names the files instead, one configuration for each kind. It carries
a hash of them, because `load_dataset` caches by the content of the card and the last name of the folder: without it,
another folder `scored`, or this one after a change, would be read as the first.

Rejected: one folder for each file, which would hide the rows one level down; names of splits, whose columns must
agree.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from ..records import file_sha256, json_sha256, replaced

CARD, SOURCE = "README.md", "source"
_BEGIN = "---\nconfigs:"
_WHOLE, _TAIL = 2**28, 2**20
_NUMBERED = re.compile(r"(shard|part)-\d+")
_FIRST = ("shard", "part", "train", "selected", "rows")  # what `load_dataset(folder)` opens, if it is there


def write_card(folder: Path, about: str = "Rows written by selsft.") -> None:
    """Write the card of a folder that has rows (`*.parquet`, else `*.jsonl`, else `*.csv`), also those in `source/`.
    A `README.md` of somebody else, such as a model card, stays."""
    card = folder / CARD
    if card.exists() and not card.read_text(encoding="utf-8").startswith(_BEGIN):
        return
    for ending in ("parquet", "jsonl", "csv"):
        files = sorted(filter(_has_rows, [*folder.glob(f"*.{ending}"), *folder.glob(f"{SOURCE}/*.{ending}")]))
        if files:
            break
    else:
        return
    found: dict[str, str] = {}
    for file in files:
        numbered = _NUMBERED.fullmatch(file.stem)
        name = f"{numbered[1]}-*" if numbered else file.stem
        own = SOURCE if file.parent != folder else numbered[1] if numbered else file.stem
        found[own] = str((file.parent / f"{name}.{ending}").relative_to(folder))
    first = next((name for name in _FIRST if name in found), next(iter(found)))
    names = [first, *(name for name in found if name != first)]
    known = {str(file.relative_to(folder)): _fingerprint(file) for file in files}
    configs = [
        {
            "config_name": "default" if name == first else name,
            "data_files": [{"split": "train", "path": found[name]}],
            "description": f"sha256 {json_sha256(known)}",
        }
        for name in names
    ]
    text = f"---\n{yaml.safe_dump({'configs': configs}, sort_keys=False)}---\n\n{about}\n"
    with replaced(card) as handle:
        handle.write(text.encode())


def _has_rows(file: Path) -> bool:
    """`load_dataset` refuses a configuration without rows."""
    if file.suffix == ".parquet":
        return pq.read_metadata(file).num_rows > 0
    with file.open("rb") as handle:
        lines = sum(1 for _ in itertools.islice(handle, 2))
    return lines > (file.suffix == ".csv")  # below the names of its columns


def _fingerprint(file: Path) -> str:
    """Hash of a file; of a large one, of its size and its end, where Parquet keeps the statistics of its columns."""
    size = file.stat().st_size
    if size <= _WHOLE:
        return file_sha256(file)
    with file.open("rb") as handle:
        handle.seek(size - _TAIL)
        return f"{size} {hashlib.sha256(handle.read()).hexdigest()}"
