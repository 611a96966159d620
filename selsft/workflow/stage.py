"""A stage: one step of a run, in a folder named after everything that decides its content.

The key of a stage is a hash of its settings, of the keys of the stages it reads from, and of the content of the files
it reads. So a stage whose inputs are unchanged is reused, a changed setting makes a new folder beside the old one
and loses nothing, and returning to an earlier setting costs nothing. Rejected: comparing times of files as `make`
does, which takes a copied folder for a new one and a changed setting for none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.cards import write_card
from ..data.foreign import split_format
from ..errors import InputError
from ..records import file_sha256, now, read_json, sweep, versions, write_json

RECORD = "stage.json"
_KEY = 12  # hexadecimal digits
# Above this, a local folder is identified by names, sizes and times of its files: hashing takes a second per GB
_HASHED_BYTES = 50e9
_NO_MODEL = "{!r} is neither a folder with a model nor the id of one that can be loaded: check the spelling"


@dataclass
class Stage:
    """One step of a run.

    Args:
        name: unique within the run; its part before the first `-` is what `--from` takes.
        settings: what decides the result, besides the inputs. Must be JSON.
        inputs: what it reads: other stages, or fingerprints of files and models from outside.
        work: fills the folder, and returns a remark to show. Called again on a folder that an interrupted run left
            behind.
        links: where the run's folder shows this stage: path there -> path within the stage's folder. By default the
            whole folder under the stage's name.
    """

    name: str
    settings: dict[str, Any]
    inputs: dict[str, Stage | str]
    work: Callable[[Path], str | None]
    root: Path = field(repr=False, default=Path())
    links: dict[str, str] | None = None

    @functools.cached_property
    def key(self) -> str:
        inputs = {name: each.key if isinstance(each, Stage) else each for name, each in self.inputs.items()}
        text = json.dumps([self.name, self.settings, inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY]

    @property
    def folder(self) -> Path:
        return self.root / "stages" / f"{self.name}-{self.key}"

    @property
    def record(self) -> dict[str, Any]:
        """What `stage.json` says; empty when there is none."""
        return read_json(self.folder / RECORD)

    def state(self) -> str:
        """`"finished"`, `"interrupted"`, `"changed"` (finished, but a file has changed since) or `"new"`."""
        record = self.record
        if not record:
            return "interrupted" if self.folder.is_dir() and any(self.folder.iterdir()) else "new"
        if record["status"] != "finished":
            return "interrupted"
        dropped = record.get("dropped", ())
        there = {name: value for name, value in _contents(self.folder).items() if name not in dropped}
        return "finished" if there == record["outputs"] else "changed"

    def earlier(self) -> dict[str, Any]:
        """The record of the last finished stage of this name, of whatever key; empty when there is none."""
        folders = (self.root / "stages").glob(f"{self.name}-{'[0-9a-f]' * _KEY}")
        records = [read_json(folder / RECORD) for folder in folders]
        finished = [record for record in records if record.get("status") == "finished"]
        return max(finished, key=lambda record: record["started"], default={})

    def run(self) -> str:
        """Do the work; returns seconds and remark. The record says `running` until the folder is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        before = self.record
        record: dict[str, Any] = {
            "stage": self.name,
            "key": self.key,
            "status": "running",
            "settings": self.settings,
            "inputs": {
                name: each.folder.name if isinstance(each, Stage) else each for name, each in self.inputs.items()
            },
            "started": now(),
            "interrupted": before.get("interrupted", 0) + bool(before),
            "versions": versions(),
        }
        write_json(self.folder / RECORD, record)
        start = time.perf_counter()
        remark = self.work(self.folder)
        write_card(self.folder, f"Rows of the stage {self.name} of `selsft run`.")
        seconds = time.perf_counter() - start
        record |= {"status": "finished", "seconds": round(seconds, 1), "outputs": _contents(self.folder)}
        write_json(self.folder / RECORD, record)
        return f"{seconds:.1f} s" + (f": {remark}" if remark else "")

    def drop(self, suffixes: tuple[str, ...]) -> None:
        """Remove files of a finished stage that all who needed them have read. Its record names them as `dropped`;
        who is to read them again has the stage run anew (`workflow.run`)."""
        record = self.record
        outputs = record["outputs"]
        gone = {name for name in (*outputs, *record.get("dropped", ())) if name.endswith(suffixes)}
        kept = {name: value for name, value in outputs.items() if name not in gone}
        write_json(self.folder / RECORD, {**record, "outputs": kept, "dropped": sorted(gone)})
        for name in gone:
            (self.folder / name).unlink(missing_ok=True)

    def link(self) -> None:
        """Show the folder where `links` says, in place of an earlier stage's."""
        for name, target in self._links.items():
            link = self.root / name
            if link.is_dir() and not link.is_symlink():
                raise InputError(f"{str(link)!r} is a folder and no link (copied without links?): remove it")
            link.parent.mkdir(exist_ok=True)
            temporary = link.with_name(f".{link.name}.link")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(self.folder / target, link.parent))
            os.replace(temporary, link)

    def unlink(self) -> None:
        """Remove the links, which show an earlier stage while this one is not finished."""
        for link in (self.root / name for name in self._links):
            if link.is_symlink():
                link.unlink()

    @property
    def _links(self) -> dict[str, str]:
        return {self.name: "."} if self.links is None else self.links

    def set_aside(self) -> Path | None:
        """Rename the folder, so that the stage runs anew and nothing is lost."""
        if not self.folder.exists():
            return None
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        os.rename(self.folder, aside)
        return aside


def _contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the record; size and time where a folder is too large to hash."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD]
    stats = {path: path.stat() for path in files}
    if sum(stat.st_size for stat in stats.values()) > _HASHED_BYTES:
        return {str(path.relative_to(folder)): f"{stat.st_size} {stat.st_mtime_ns}" for path, stat in stats.items()}
    return {
        str(path.relative_to(folder)): _sha256(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()
    }


@functools.lru_cache(maxsize=4096)  # a run asks for the state of its stages several times
def _sha256(path: Path, _size: int, _mtime: int) -> str:
    return file_sha256(path)


def file_fingerprint(path: str | Path) -> str:
    """Hash of the content of a file, or of all files of a folder with their names."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and ".git" not in p.parts)
    digest = hashlib.sha256()
    hashed = sum(file.stat().st_size for file in files) <= _HASHED_BYTES
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}\0{stat.st_size}\0".encode())
        if hashed:
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        else:
            digest.update(str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:32]


def model_source(name: str, revision: str | None = None) -> str:
    """What identifies a model or adapter: the content of its folder, or its id and commit on the Hub."""
    if not isinstance(name, str):
        raise InputError(f"a model is named by {name!r}: give a folder or an id of the Hub")
    if Path(name).is_dir():
        return file_fingerprint(name)
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    for file in ("config.json", "adapter_config.json"):
        try:
            path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{_NO_MODEL.format(name)} ({str(error).splitlines()[0]})") from error
        if path is not None:
            return f"{name}@{extract_commit_hash(path, None)}"
    raise InputError(_NO_MODEL.format(name))


def data_source(name: str) -> str:
    """What identifies a data set: the content of a file or folder; on the Hub its name alone, so that a new version
    there is read only on request (`--from split`)."""
    form, path = split_format(name)
    if Path(path).exists():
        return file_fingerprint(path) + (f" {form}" if form else "")
    from ..data.loading import BUILDERS  # imports datasets, which a plan of files that are there does without

    if form or Path(path).suffix in BUILDERS:
        raise InputError(f"dataset_name={path!r}: no such file in {os.getcwd()}")
    return name
