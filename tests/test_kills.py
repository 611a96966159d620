"""Commands that are killed at random moments: no process of theirs is left, and the same command ends in the same.

SIGKILL and SIGTERM, to the parent alone and to the whole group as a terminal does, over all commands.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import selsft.workflow.child
from tests.support import commands
from tests.test_fault_injection import inputs

pytestmark = pytest.mark.slow

__all__ = ["inputs"]  # a fixture

KILLS = 4  # of each command
MOMENTS = [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False), (signal.SIGTERM, True)]


class Forked:
    """`subprocess.Popen` of another command of selsft, as a fork of this process, which has everything imported."""

    def __init__(self, argv, preexec_fn):
        assert list(argv[:3]) == [sys.executable, "-m", "selsft.cli"]
        self.pid, self.status = os.fork(), None
        if not self.pid:
            preexec_fn()
            commands.be(list(argv[3:]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)

    def wait(self):
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


def forked_children() -> None:
    selsft.workflow.child.subprocess = SimpleNamespace(Popen=Forked)  # type: ignore[assignment]


def session(leader: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = status.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == leader and state not in "ZX":
            found.append(int(status.parent.name))
    return found


def held(folder: Path) -> bool:
    """Whether a process has locked a folder."""
    if not folder.exists():
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def drain(reader: int, seconds: float) -> bool:
    """Read what a command prints for so long; whether it has ended before."""
    deadline = time.perf_counter() + seconds
    while (left := deadline - time.perf_counter()) > 0:
        if select.select([reader], [], [], left)[0] and not os.read(reader, 65536):
            return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux signals the child")
@pytest.mark.parametrize("command", commands.COMMANDS)
def test_killed_at_random_moments(inputs, tmp_path, command, record_property):
    argv, rng = commands.COMMANDS[command], random.Random(command)
    whole = commands.copy(inputs, tmp_path / "whole")
    start = time.perf_counter()
    done = commands.run(argv, whole, forked_children)
    seconds = time.perf_counter() - start
    assert done.status == 0, done.text
    cut, kills, ended, tries = commands.copy(inputs, tmp_path / "cut"), 0, 0, 0
    while kills < KILLS:
        tries += 1
        assert tries <= 3 * KILLS, "signals do not end it"
        reader, process = commands.start(argv, cut, forked_children)
        number, group = MOMENTS[kills % len(MOMENTS)]
        if drain(reader, rng.uniform(0, seconds / 3)):
            ended += 1
            assert ended < 4, "it ends before it can be killed"
            shutil.rmtree(cut / "out")
        elif group:
            os.killpg(process, number)
        else:
            os.kill(process, number)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        kills += status == -number
        deadline = time.perf_counter() + 20
        while (left := session(process)) and time.perf_counter() < deadline:
            time.sleep(0.01)
        os.close(reader)
        assert not left, f"{command} left processes after {signal.Signals(number).name}"
    last = commands.run(argv, cut, forked_children)
    assert last.status == 0, last.text
    assert commands.results(cut) == commands.results(whole)


@pytest.mark.parametrize("command", [name for name in commands.COMMANDS if name not in ("inspect", "export", "bench")])
def test_two_at_once_in_one_folder(inputs, tmp_path, command):
    folder = commands.copy(inputs, tmp_path / "work")
    argv = commands.COMMANDS[command]
    reader, process = commands.start(argv, folder, forked_children)
    try:
        deadline = time.perf_counter() + 60
        while not held(folder / "out") and time.perf_counter() < deadline:
            time.sleep(0.005)
        os.kill(process, signal.SIGSTOP)  # at work in it, however fast it is
        second = commands.run(argv, folder, forked_children)
    finally:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
    assert second.status == 2
    assert "another process is at work in it" in second.last and "Traceback" not in second.text, second.text


def test_every_command_is_killed_and_forty_times_in_all():
    from selsft.cli import COMMANDS

    assert {argv[0] for argv in commands.COMMANDS.values()} == set(COMMANDS) - {"completion"}  # which writes nothing
    assert KILLS * len(commands.COMMANDS) >= 40
