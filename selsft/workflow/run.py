"""Running stages: finished ones are skipped, interrupted ones resume, changed ones get a new folder beside the old.

    RUN/run.json              what the run is, versions, and the state of every stage
    RUN/stages/NAME-KEY/      a stage, with `stage.json` (settings, inputs, versions, files)
    RUN/train -> stages/...   a link to the current folder of each stage

One engine runs recipes (`selsft run`), studies (`selsft skills`), the demo and comparisons of arms, each with its own
stages. Rejected: one folder for each call, which would train the reference again for every threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import InputError
from ..records import exclusive, now, read_json, resumable, versions, write_json
from .stage import Stage

RUN = "run.json"
KEPT = "finished stages are kept in it, the same command resumes from there"


def execute(
    stages: Sequence[Stage],
    root: Path,
    about: dict[str, Any],
    *,
    manifest: str = RUN,
    from_stage: str | None = None,
    report: Callable[[Path], Path] | None = None,
    echo: Callable[[str], None] = print,
    after: Callable[[Stage], None] | None = None,
) -> None:
    """Run all unfinished stages, and write the report.

    Args:
        stages: in an order in which each reads from earlier ones only.
        about: what the run is; goes into its manifest.
        manifest: file name of the manifest, which also marks `root` as a run's folder.
        from_stage: this stage and all after it run again; their old folders are renamed, not removed.
        report: writes the report from the run's folder and returns its path.
        echo: shows a line.
        after: looks at every stage that is finished or skipped; what it raises ends the run.

    Raises:
        `InputError` when the folder holds something else or another process runs in it, or when a stage fails.
    """
    check_folder(root, manifest)
    first = _position(stages, from_stage)
    with resumable(root, "output_dir", KEPT), exclusive(root):
        for stage in stages[first:] if from_stage else []:
            stage.set_aside()
        states = {stage.name: stage.state() for stage in stages}
        for stage in stages:
            if states[stage.name] != "finished":
                stage.unlink()
        for number, stage in enumerate(stages, 1):
            state = states[stage.name]
            heading = f"[{number:{len(str(len(stages)))}}/{len(stages)}] {stage.name}:"
            if state == "finished":
                echo(f"{heading} unchanged, skipped ({stage.folder.name})")
            else:
                if state == "changed":
                    echo(f"{stage.name}: a file of {stage.folder.name} has changed; kept as {stage.set_aside()}")
                echo(f"{heading} {stage.folder.name}{' (resumed)' if state == 'interrupted' else ''}")
                states[stage.name] = "interrupted"
                write_json(root / manifest, _record(stages, states, about))
                try:
                    echo(f"  {stage.run()}")
                except InputError as error:
                    raise InputError(
                        f"stage {stage.name}: {error}. What was finished is kept: correct it and run the same "
                        "command again"
                    ) from error
                states[stage.name] = "finished"
            stage.link()
            if after is not None:
                write_json(root / manifest, _record(stages, states, about))
                after(stage)
        write_json(root / manifest, {**_record(stages, states, about), "finished": now()})
        if report is not None:
            echo(f"Report: {report(root)}")


def preview(stages: Sequence[Stage], title: str, from_stage: str | None, console: Console) -> None:
    """What `execute` would do, without doing it."""
    first = _position(stages, from_stage)
    table = Table(title=title)
    for column in ("stage", "reads", "folder", "would"):
        table.add_column(column)
    for index, stage in enumerate(stages):
        action = "run anew" if from_stage and index >= first else _ACTIONS[stage.state()]
        reads = [each if isinstance(each, str) else each.name for each in stage.inputs.values()]
        shown = ", ".join(each if len(each) < 24 else f"{each[:8]}..." for each in reads)
        table.add_row(stage.name, shown, stage.folder.name, action)
    console.print(table)


_ACTIONS = {"finished": "skip", "interrupted": "resume", "changed": "run anew", "new": "run"}


def _position(stages: Sequence[Stage], from_stage: str | None) -> int:
    if from_stage is None:
        return 0
    for index, stage in enumerate(stages):
        if from_stage in (stage.name, stage.name.split("-")[0]):
            return index
    raise InputError(f"--from {from_stage}: the stages of this run are {', '.join(stage.name for stage in stages)}")


def check_folder(root: Path, manifest: str = RUN) -> None:
    """Raise for a folder that holds something else, or a run of a version whose stages had no keys.

    Raises:
        `InputError` naming the folder and the remedy.
    """
    if root.is_file() or (root.is_dir() and not (root / manifest).is_file() and any(map(_visible, root.iterdir()))):
        raise InputError(
            f"output_dir={str(root)!r} exists, is not empty and holds no {manifest}: nothing was overwritten, choose "
            "another folder"
        )
    if isinstance(read_json(root / manifest).get("stages"), list):
        raise InputError(
            f"output_dir={str(root)!r} holds a run of an earlier version of selsft, which this one cannot resume: "
            "choose another folder"
        )


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _record(stages: Sequence[Stage], states: dict[str, str], about: dict[str, Any]) -> dict[str, Any]:
    record = {
        stage.name: {
            "folder": f"stages/{stage.folder.name}",
            "state": states[stage.name],
            "seconds": stage.record.get("seconds"),
            "reads": [each.name for each in stage.inputs.values() if isinstance(each, Stage)],
        }
        for stage in stages
    }
    return {**about, "written": now(), "finished": None, "versions": versions(), "stages": record}
