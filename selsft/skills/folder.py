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

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..records import read_json, remove
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
