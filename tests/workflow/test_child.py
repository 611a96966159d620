"""A child process ends with its parent, also when the parent alone is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selsft.workflow.child import run_child

PARENT = """
import sys
from selsft.workflow.child import run_child
child = "import os, sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
run_child([sys.executable, "-c", child, sys.argv[1]])
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux signals the child")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_ends_with_its_parent(tmp_path, number):
    told = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(told)], stderr=subprocess.DEVNULL)
    try:
        assert wait(lambda: told.is_file() and told.read_text())
        child = int(told.read_text())
        assert alive(child)
        os.kill(parent.pid, number)
        assert wait(lambda: not alive(child))
    finally:
        parent.kill()
        parent.wait()


def test_the_status_of_a_child_is_returned():
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -signal.SIGKILL
