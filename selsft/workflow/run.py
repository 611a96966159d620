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
        from_stage: this stage and all that read from it run again; their old folders are renamed, not removed.
        report: writes the report from the run's folder and returns its path.
        echo: shows a line.
        after: looks at every stage that is finished or skipped; what it raises ends the run.

    Raises:
        `InputError` when the folder holds something else or another process runs in it, or when a stage fails.
    """
    check_folder(root, manifest)
    anew = read_anew(stages, from_stage)
    with resumable(root, "output_dir", KEPT), exclusive(root):
        for stage in stages:
            if stage.name in anew:
                stage.set_aside()
        states = states_of(stages)
        for stage in stages:
            if states[stage.name] != "finished":
                stage.unlink()
        for number, stage in enumerate(stages, 1):
            state = states[stage.name]
            heading = f"[{number:{len(str(len(stages)))}}/{len(stages)}] {stage.name}:"
            if state == "finished":
                echo(f"{heading} unchanged, skipped ({stage.folder.name})")
            else:
                if state in _SET_ASIDE:
                    echo(f"{stage.name}: {_SET_ASIDE[state].format(stage.folder.name)}; kept as {stage.set_aside()}")
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
    anew, states = read_anew(stages, from_stage), states_of(stages)
    table = Table(title=title)
    for column in ("stage", "reads", "folder", "would"):
        table.add_column(column)
    for stage in stages:
        action = "run anew" if stage.name in anew else _ACTIONS[states[stage.name]]
        reads = [each if isinstance(each, str) else each.name for each in stage.inputs.values()]
        shown = ", ".join(each if len(each) < 24 else f"{each[:8]}..." for each in reads)
        table.add_row(stage.name, shown, stage.folder.name, action)
    console.print(table)


_ACTIONS = {"finished": "skip", "interrupted": "resume", "changed": "run anew", "dropped": "run anew", "new": "run"}
_SET_ASIDE = {"changed": "a file of {} has changed", "dropped": "files of {} that are read again were dropped"}


def states_of(stages: Sequence[Stage]) -> dict[str, str]:
    """The state of each stage (`Stage.state`), and `"dropped"` for a finished one some of whose files were removed
    although a stage that is yet to run reads them."""
    states = {stage.name: stage.state() for stage in stages}
    for stage in reversed(stages):  # those that read come after those that are read
        if states[stage.name] != "finished":
            for each in stage.inputs.values():
                if isinstance(each, Stage) and states[each.name] == "finished" and each.record.get("dropped"):
                    states[each.name] = "dropped"
    return states


def read_anew(stages: Sequence[Stage], from_stage: str | None) -> set[str]:
    """The stages of a name, and all that read from them."""
    found: set[str] = set()
    for stage in stages:
        read = {each.name for each in stage.inputs.values() if isinstance(each, Stage)}
        if from_stage in (stage.name, stage.name.split("-")[0]) or read & found:
            found.add(stage.name)
    if from_stage is not None and not found:
        raise InputError(
            f"--from {from_stage}: the stages of this run are {', '.join(stage.name for stage in stages)}"
        )
    return found


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
