"""Several processes: a command starts itself again behind `accelerate launch`.

As with `trl sft`, flags that are not the command's go to `accelerate launch`. Without such flags, on a machine with at
most one accelerator and without a default configuration of accelerate, the command runs in this process: one process
needs no launcher, and importing torch twice takes seconds. Rejected: always launching, as TRL does.

A launcher ends its workers when it is interrupted or terminated, but not when it is killed: they ask the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from ..errors import InputError
from ..records import exclusive, resumable

_PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether a launcher (accelerate, torchrun, MPI) started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def end_with_launcher() -> None:
    """End this process when the launcher that has started it ends, however it ends; on Linux.

    A launcher that is gone before this call leaves workers that find nobody to agree with, and fail.
    """
    if launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def needs_launch(launch: list[str]) -> bool:
    if launched():  # flags for the launcher may still stand in the YAML file
        return False
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return bool(launch) or torch.cuda.device_count() > 1 or Path(default_config_file).is_file()


def launch_command(command: str, launch: list[str], own: list[str], use_cpu: bool) -> int:
    """Run `selsft COMMAND` with the flags `own` behind `accelerate launch` with the flags `launch`.

    Returns:
        the exit status.
    """
    from accelerate.commands import launch as accelerate

    launch = resolve_accelerate_config(launch)
    if use_cpu and _processes(launch) > 1 and "--config_file" not in launch and "--multi_gpu" not in launch:
        # Without MPI, accelerate starts one process on a CPU whatever it is told. `--multi_gpu` is its name for
        # torchrun, whose processes then agree on gloo because of `use_cpu`
        launch = ["--multi_gpu", *launch]
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            args = accelerate.launch_command_parser().parse_args([*launch, "-m", "selsft.cli", command, *own])
    except SystemExit as error:  # argparse has written the usage, and which flag in the last line
        raise InputError(usage.getvalue().strip().splitlines()[-1]) from error
    try:
        accelerate.launch_command(args)
    except subprocess.CalledProcessError as error:
        return 2 if error.returncode == 2 else 1
    except ChildProcessError:
        return 1
    except Exception as error:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        if not isinstance(error, ChildFailedError):
            raise
        codes = {failure.exitcode for failure in error.failures.values()}
        print(f"selsft {command}: a process failed, see its message above", file=sys.stderr)
        return 2 if codes == {2} else 1
    return 0


def resolve_accelerate_config(launch: list[str]) -> list[str]:
    """`--accelerate_config NAME` (a file, or a configuration that ships with TRL) as `--config_file PATH`."""
    if "--accelerate_config" not in launch:
        return launch
    position = launch.index("--accelerate_config")
    if position + 1 == len(launch):
        raise InputError("--accelerate_config needs a value: a file or the name of a configuration of TRL")
    name = launch[position + 1]
    shipped = {Path(file.name).stem: str(file) for file in resources.files("trl.accelerate_configs").iterdir()}
    path = name if Path(name).is_file() else shipped.get(name)
    if path is None:
        names = ", ".join(sorted(set(shipped) - {"__init__", "__pycache__"}))
        raise InputError(f"--accelerate_config {name} is neither a file nor one of {names}")
    return ["--config_file", path, *launch[:position], *launch[position + 2 :]]


def _processes(launch: list[str]) -> int:
    for flag, value in zip(launch, [*launch[1:], ""], strict=True):
        if flag == "--num_processes" and value.isdigit():
            return int(value)
        if flag.startswith("--num_processes=") and flag.split("=")[1].isdigit():
            return int(flag.split("=")[1])
    return 1


@contextlib.contextmanager
def at_work(folder: Path, field: str, resume: str) -> Iterator[None]:
    """Lock a folder while a command works in it, and say what is kept when it is interrupted. Of several processes
    only the launching one locks it."""
    with resumable(folder, field, resume), contextlib.nullcontext() if launched() else exclusive(folder, field):
        yield
