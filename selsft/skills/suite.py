"""The named suite, and tasks by their names on the command line.

`skills21` is a suite of the paper's shape (21 tasks, five areas) with documented choices in `suite.yaml`; the paper's
own list was not readable in full, so no list here is called the paper's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from .readers import read_bigbench, read_jsonl, read_lm_eval
from .tasks import SkillTask

SUITE = "skills21"
AREAS = ("commonsense reasoning", "reading comprehension", "math", "toxicity", "language understanding")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class SuiteEntry:
    """A task of the suite; the fields are those of `suite.yaml`."""

    name: str
    area: str
    lm_eval: str
    confirmed: bool


def suite() -> list[SuiteEntry]:
    rows = yaml.safe_load((Path(__file__).parent / "suite.yaml").read_text(encoding="utf-8"))
    return [SuiteEntry(**row) for row in rows]


def task_names(text: str) -> list[str]:
    """`"a, b,skills21"` as names, the suite's name replaced by its members, each once.

    Raises:
        `ValueError` for an empty list or a name that cannot be part of a file name.
    """
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        names += [entry.name for entry in suite()] if part == SUITE else [part]
    if not names:
        raise ValueError("no task is named: give one or more, with commas between them")
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a task: letters, digits, '_', '-' and '.' only")
    return list(dict.fromkeys(names))


def load_task(name: str, folder: Path | None, test_fraction: float = 0.4, seed: int = 0) -> SkillTask:
    """A task by its name.

    Args:
        folder: where `NAME.jsonl`, `NAME.json` or `NAME/task.json` (both BIG-bench) lie; `None` for
            lm-evaluation-harness, where the suite's tasks are known by the names of both.

    Raises:
        `ValueError` naming the task, when it is not there or cannot be used.
    """
    entry = next((entry for entry in suite() if name in (entry.name, entry.lm_eval)), None)
    if folder is None:
        task = read_lm_eval(entry.lm_eval if entry else name, test_fraction, seed, label=name)
    else:
        files = {
            folder / f"{name}.jsonl": read_jsonl,
            folder / f"{name}.json": read_bigbench,
            folder / name / "task.json": read_bigbench,
        }
        path = next((path for path in files if path.is_file()), None)
        if path is None:
            there = sorted(file.stem for file in folder.glob("*.json*")) if folder.is_dir() else []
            hint = f"it has {', '.join(there)}" if there else "it has no task files"
            raise ValueError(
                f"tasks: {name!r} is not in tasks_dir={str(folder)!r} ({hint}), as NAME.jsonl or NAME/task.json"
            )
        task = files[path](path, name, test_fraction, seed)
    task.area = entry.area if entry else ""
    return task
