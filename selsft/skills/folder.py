"""The folder of a study: where each stage's files are, and when a stage counts as finished.

    study.json                    settings, versions, tasks, model
    examples.parquet              the questions
    stages/<stage>.json           what a finished stage was made from; written last
    scores/<stage>.parquet        its rows of the score table
    hidden/<stage>/               its hidden states
    models/<stage>/               its model, while a stage to come starts from it
    tables/, report.html          made from all of it

Files and folders get their names when they are whole. Rejected: one file that lists what is finished, which two
versions of the truth would share with the files themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .plan import Stage


class StudyFolder:
    """Paths of a study.

    Raises:
        `ValueError` for a folder with something else in it.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        if self.path.is_file() or (
            self.path.is_dir() and not (self.path / "study.json").is_file() and any(self._visible())
        ):
            raise ValueError(f"output_dir={path!r} exists and is not a study: choose another folder")

    def _visible(self) -> Iterator[Path]:
        return (entry for entry in self.path.iterdir() if entry.name not in (".lock", "examples.parquet"))

    def scores(self, stage: Stage) -> Path:
        return self.path / "scores" / f"{stage.name}.parquet"

    def hidden(self, stage: Stage) -> Path:
        return self.path / "hidden" / stage.name

    def model(self, stage: Stage) -> Path:
        return self.path / "models" / stage.name

    def note(self, stage: Stage) -> Path:
        return self.path / "stages" / f"{stage.name}.json"

    def finished_inputs(self, stage: Stage) -> dict[str, Any] | None:
        """What a stage was made from, or `None` when it is not finished."""
        if not (self.note(stage).is_file() and self.scores(stage).is_file()):
            return None
        return read_json(self.note(stage)).get("inputs", {})

    def discard(self, stage: Stage) -> None:
        """Take away a stage; its note goes first, so that what is left is not taken for finished."""
        for path in (self.note(stage), self.scores(stage), self.hidden(stage)):
            remove(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time; the system lifts the lock however the process ends.

        Raises:
            `ValueError` when another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"output_dir={str(self.path)!r}: another process works there, wait for it") from None
            yield


def new_folder(path: Path) -> Path:
    """An empty folder beside `path`, to become it with `os.replace`; leftovers of an earlier attempt are removed."""
    part = path.with_name(f".{path.name}.part")
    remove(part)
    part.mkdir(parents=True)
    return part


def remove(path: Path) -> None:
    """Take away a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """An object, empty when the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
