"""Running a plan: what is done is skipped, what was cut off goes on, what has changed is done anew beside the old.

    RUN/run.json              the recipe, its overrides, versions, and the state of every stage
    RUN/stages/NAME-KEY/      a stage, with `stage.json` (settings, inputs, versions, files) and `config.yaml`
    RUN/train -> stages/...   a link to the current folder of each stage
    RUN/report.html           what came out

Rejected: one folder for each call, which would train the reference again for every threshold.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import InputError
from ..pipeline.plan import Plan
from ..pipeline.recipe import STAGES
from ..records import exclusive, now, versions, write_json
from ..report.run import write_report

RUN = "run.json"


def execute(plan: Plan, overrides: list[str], from_stage: str | None, console: Console) -> None:
    """Run all stages that are not finished, and write the report.

    Args:
        from_stage: this stage and all after it are done anew; their old folders are renamed, not removed.

    Raises:
        `InputError` when the folder is something else's or another process runs in it, or when a stage fails.
    """
    root = plan.root
    _check_folder(root)
    first = _position(plan, from_stage)
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root):
        for stage in plan.stages[first:] if from_stage else []:
            stage.set_aside()
        for stage in plan.stages:
            state = stage.state()
            if state == "finished":
                console.print(f"[bold]{stage.name}[/]: unchanged, skipped ({stage.folder.name})", highlight=False)
            else:
                if state == "changed":
                    aside = stage.set_aside()
                    console.print(f"{stage.name}: a file of {stage.folder.name} has changed; kept as {aside}")
                going = " (going on)" if state == "interrupted" else ""
                console.print(f"[bold]{stage.name}[/]: {stage.folder.name}{going}", highlight=False)
                write_json(root / RUN, _record(plan, overrides))
                try:
                    seconds = stage.run()
                except InputError as error:
                    raise InputError(
                        f"stage {stage.name}: {error}. What was finished is kept: put it right and run the same "
                        "command again"
                    ) from error
                console.print(f"  {seconds:.1f} s", highlight=False)
            _link(root / stage.name, stage.folder)
        write_json(root / RUN, _record(plan, overrides))
        report = write_report(root)
    console.print(f"Report: {report}", highlight=False, markup=False)


def preview(plan: Plan, from_stage: str | None, console: Console) -> None:
    """What `execute` would do, without doing it."""
    first = _position(plan, from_stage)
    table = Table(title=f"{plan.recipe.name} in {plan.root}")
    for column in ("stage", "reads", "folder", "would"):
        table.add_column(column)
    for index, stage in enumerate(plan.stages):
        state = "run anew" if from_stage and index >= first else _ACTIONS[stage.state()]
        reads = [each if isinstance(each, str) else each.name for each in stage.inputs.values()]
        table.add_row(stage.name, ", ".join(each if len(each) < 24 else f"{each[:8]}..." for each in reads),
                      stage.folder.name, state)  # fmt: skip
    console.print(table)


_ACTIONS = {"finished": "skip", "interrupted": "go on", "changed": "run anew", "new": "run"}


def _position(plan: Plan, from_stage: str | None) -> int:
    if from_stage is None:
        return 0
    for index, stage in enumerate(plan.stages):
        if from_stage in (stage.name, stage.name.split("-")[0]):
            return index
    names = ", ".join(stage.name for stage in plan.stages)
    hint = f"the stages of this recipe are {names}"
    raise InputError(f"--from {from_stage}: {hint}" + ("" if from_stage in STAGES else " (misspelt?)"))


def _check_folder(root: Path) -> None:
    if root.is_file() or (root.is_dir() and any(root.iterdir()) and not (root / RUN).is_file()):
        raise InputError(
            f"output_dir={str(root)!r} exists, is not empty and holds no run.json: nothing was overwritten, choose "
            "another folder"
        )


def _link(link: Path, folder: Path) -> None:
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(folder, link.parent))
    os.replace(temporary, link)


def _record(plan: Plan, overrides: list[str]) -> dict[str, Any]:
    stages = {}
    for stage in plan.stages:
        record = stage.record
        stages[stage.name] = {
            "folder": f"stages/{stage.folder.name}",
            "state": stage.state(),
            "seconds": record.get("seconds"),
            "reads": [each.name for each in stage.inputs.values() if not isinstance(each, str)],
        }
    return {
        "recipe": plan.recipe.name,
        "overrides": overrides,
        "flags": plan.recipe.common,
        "stage_flags": plan.recipe.stages,
        "written": now(),
        "versions": versions(),
        "stages": stages,
    }
