"""Child processes that end with their parent, however it ends.

A killed run must leave nothing behind that holds memory, a device or files. Linux itself signals the child
(`PR_SET_PDEATHSIG`) when the parent cannot. Rejected: a thread in the child that polls its parent, which the
workers of a launcher would inherit.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def run_child(argv: Sequence[str]) -> int:
    """Run a command to its end; returns the exit status, negative for a signal.

    The child gets SIGTERM when this process ends or is interrupted; on systems other than Linux not when this process
    is killed by SIGKILL or SIGTERM.
    """
    parent = os.getpid()
    with subprocess.Popen(argv, preexec_fn=lambda: end_with_parent(parent)) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise


def end_with_parent(parent: int | None = None) -> None:
    """Let this process get SIGTERM when the process that started it ends; on Linux only.

    Args:
        parent: the process that must be there still; not checked when `None`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:  # it has ended in the meantime
        os._exit(1)
