"""docs/examples/slurm.sh on two "nodes" of one machine: stand-ins of SLURM's commands, torch's own launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from selsft.cli import main
from tests.support import commands

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "slurm.sh"
# srun starts its command on every node; it fails if one of them does
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
SETTINGS = {
    **commands.CPU, "model_name_or_path": "model", "dataset_name": "data.jsonl", "reference_model": "reference",
    "negative_threshold": 0.01, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2,
}  # fmt: skip


def test_the_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with models and data, and the environment of a job on two nodes."""
    monkeypatch.chdir(tmp_path)
    commands.workspace(tmp_path)
    (tmp_path / "bin").mkdir()
    tools = {"srun": SRUN, "scontrol": "#!/bin/bash\necho localhost; echo localhost\n",
             "torchrun": f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'}  # fmt: skip
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PORT": str(port), "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost,localhost", "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


@pytest.mark.slow
def test_two_nodes_train_what_one_process_trains(slurm):
    whole = SETTINGS | {"save_strategy": "no", "output_dir": "one", "per_device_train_batch_size": 4}
    assert main(["train", *commands.flags(whole)]) == 0
    halves = SETTINGS | {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    Path("recipe.yaml").write_text(yaml.safe_dump(halves))
    run = ["bash", str(SCRIPT), "recipe.yaml", "two"]
    done = subprocess.run(run, env=slurm, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    one, two = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    start = load_file("model/model.safetensors")
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(one[name], start[name]) for name in one)
