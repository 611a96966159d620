"""The workers of a launcher end with it, also when it alone is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selsft.cli.arguments import CommandParser
from selsft.cli.manifest import begun, settings_sha256
from tests.cli.test_train import CPU, models, to_flags
from tests.support import tiny
from tests.workflow.test_child import alive, wait

pytestmark = pytest.mark.slow

__all__ = ["models"]  # a fixture


def workers_of(launcher: int) -> list[int]:
    """The children of a process that run selsft."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if b"selsft.cli" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux signals the workers")
def test_workers_end_with_a_launcher_that_is_killed(models, tmp_path):
    tiny.prompt_data(40).to_json(tmp_path / "data.jsonl")
    flags = {**CPU, "model_name_or_path": models / "model", "dataset_name": tmp_path / "data.jsonl"}
    flags |= {"output_dir": tmp_path / "out", "max_steps": 10**6, "num_processes": 2, "save_strategy": "no"}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "selsft.cli", "train", *to_flags(flags)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    workers = []
    try:
        assert wait((tmp_path / "out" / "selsft_run.json").is_file)  # all of them have met, and train
        workers = workers_of(launcher.pid)
        assert len(workers) == 2 and all(map(alive, workers))
        launcher.kill()
        launcher.wait()
        assert wait(lambda: not any(map(alive, workers)), seconds=10)
        arguments = CommandParser("train", "", "").parse(to_flags(flags))
        assert begun(tmp_path / "out", settings_sha256(arguments))  # what a worker wrote, the launcher recognises
    finally:
        launcher.kill()
        launcher.wait()
        for worker in workers:
            if alive(worker):
                os.kill(worker, signal.SIGKILL)
