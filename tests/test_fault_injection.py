"""Each write of each command fails in turn: one line says so, and the same command then ends as if nothing had been.

Every write of every command takes an hour: `pytest -m nightly` does that, the tests of every change a seeded sample.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import selsft.bench
import selsft.cli.evaluate
import selsft.cli.inspect
import selsft.cli.score
import selsft.cli.train
import selsft.pipeline.stages
import selsft.report.inspect
import selsft.skills.study
from tests.support import commands
from tests.support.faults import KINDS, Faults

pytestmark = pytest.mark.slow

SAMPLE = {"run": 1, "skills": 1, "demo": 1}  # they take seconds; others get three writes for each kind of fault


@dataclass
class Clean:
    """A command that nothing disturbed, and where its inputs are."""

    inputs: Path
    argv: list[str]
    writes: int
    results: dict[str, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "inputs"
    folder.mkdir()
    commands.workspace(folder)
    assert commands.run(commands.COMMANDS["score"], folder).status == 0
    (folder / "out").rename(folder / "scored")  # which `inspect` reads
    shutil.rmtree(folder / "hf")
    return folder


def in_this_process() -> None:
    """The commands that `selsft run` starts run in its own process, so that their writes are counted, too."""
    selsft.pipeline.stages.run_child = lambda argv: commands.main(list(argv[3:]))


@pytest.fixture(scope="module")
def clean(inputs, tmp_path_factory) -> Callable[[str], Clean]:
    """What a command makes when nothing fails; once for each."""
    found: dict[str, Clean] = {}
    root = tmp_path_factory.mktemp("clean")

    def count(folder: Path) -> None:
        in_this_process()
        faults, exit_ = Faults(folder), os._exit

        def leave(status: int) -> None:
            faults.active = False
            (root / "count").write_text(str(faults.count))
            exit_(status)

        os._exit = leave  # type: ignore[assignment]

    def run(name: str) -> Clean:
        if name not in found:
            folder, argv = commands.copy(inputs, root / name), commands.COMMANDS[name]
            done = commands.run(argv, folder, lambda: count(folder))
            assert done.status == 0, done.text
            found[name] = Clean(inputs, argv, int((root / "count").read_text()), commands.results(folder))
        return found[name]

    return run


def check(clean: Clean, folder: Path, kind: str, at: int) -> None:
    commands.copy(clean.inputs, folder)

    def fail() -> None:
        in_this_process()
        Faults(folder, kind, at)

    done = commands.run(clean.argv, folder, fail)
    if done.status == 0:  # what failed can be done without, as a cache
        assert commands.results(folder) == clean.results
        return
    assert done.status == (130 if kind == "interrupted" else 2), done.text
    assert "Traceback" not in done.text, done.text
    said = "interrupted" if kind == "interrupted" else "error: "
    assert done.last.startswith(f"selsft {clean.argv[0]}: {said}"), done.text
    if kind != "interrupted":
        remedies = ("Make room on the disk, or let files be written there", "cannot be written to", "choose another")
        assert any(remedy in done.text for remedy in remedies), done.text
    again = commands.run(clean.argv, folder, in_this_process)
    assert again.status == 0, f"{done.text}\n--- and then ---\n{again.text}"
    assert commands.results(folder) == clean.results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", commands.COMMANDS)
def test_a_write_that_fails_is_said_in_one_line_and_the_same_command_resumes(clean, tmp_path, command, kind):
    writes = clean(command).writes
    assert writes > 1
    for at in random.Random(f"{command} {kind}").sample(range(1, writes + 1), min(writes, SAMPLE.get(command, 2))):
        check(clean(command), tmp_path / "work", kind, at)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_write(clean, tmp_path, command, kind):
    for at in range(1, clean(command).writes + 1):
        check(clean(command), tmp_path / "work", kind, at)
