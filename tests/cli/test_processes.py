"""One process for each folder, whatever the command; Ctrl-C says how to resume; nothing secret is written."""

import json
import os
from pathlib import Path

import pytest
import yaml

from selsft.cli import main
from selsft.records import exclusive
from tests.cli.test_train import CPU, models, one_line, run, to_flags
from tests.support import tiny

pytestmark = pytest.mark.slow

__all__ = ["models", "run"]  # fixtures
SECRET = "hf_marked-secret-0123456789"
FOLDERS = {"train": "output_dir", "score": "scored_dir", "evaluate": "evaluation_dir"}


@pytest.mark.parametrize("command", FOLDERS)
def test_two_commands_do_not_share_a_folder(run, models, capsys, command):
    flags = {FOLDERS[command]: "out", "dataset_name": "data.jsonl"}
    if command == "score":
        flags["reference_model"] = models / "reference"
    with exclusive(Path("out")):
        assert run(command, **flags) == 2
    one_line(capsys, f"{FOLDERS[command]}='out': another process is at work in it. Wait for it, or choose another")
    assert not Path("out").exists()  # nothing came of it


def test_a_failed_command_leaves_no_folder(run, capsys):
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": 42}\n')
    assert run("train", dataset_name="rows.jsonl", output_dir="out") == 2
    one_line(capsys, "row 0 of the data holds 42 as 'completion'")
    assert not Path("out").exists()


def test_interrupted_training_says_how_to_resume(run, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("selsft.trainer.SelectiveSFTTrainer.train", interrupted)
    assert run("train", dataset_name="data.jsonl", output_dir="out") == 130
    assert "out: checkpoints are kept in it: resume with --resume_from_checkpoint true" in capsys.readouterr().err


def test_no_command_writes_a_secret(run, models, monkeypatch, tmp_path):
    """Tokens as a flag, in nested keys, in YAML, in the environment; every file of every command is searched."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("WANDB_API_KEY", SECRET + "-wandb")
    nested = json.dumps({"token": SECRET, "dtype": "float32"})
    Path("recipe.yaml").write_text(yaml.safe_dump({"hub_token": SECRET}))
    common = {"dataset_name": "data.jsonl", "hub_token": SECRET, "model_init_kwargs": nested}
    reference = {"reference_model": models / "reference", "reference_model_init_kwargs": nested}
    assert run("train", **common, **reference, output_dir="trained", save_strategy="steps", save_steps=2) == 0
    assert run("train", config="recipe.yaml", dataset_name="data.jsonl", output_dir="yaml") == 0
    assert run("score", **common, **reference, scored_dir="scored") == 0
    assert run("evaluate", **common, evaluation_dir="evaluated", max_new_tokens=2) == 0
    tiny.prompt_data(48).to_json("rows.jsonl")
    settings = {
        **CPU, "max_steps": 2,
        "model_name_or_path": str(models / "model"), "dataset_name": "rows.jsonl", "hub_token": SECRET,
        "go_on": True,
        "stages": {"split": {"reference_size": 12, "eval_size": 8}, "score": {"reference_model_init_kwargs": nested},
                   "evaluate": {"max_new_tokens": 2}},
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    written = {"recipe.yaml", "run.yaml"}
    assert main(["run", "run.yaml", "--output_dir", "whole", *to_flags({"hub_token": SECRET})]) == 0
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in written]
    assert len(found) > 40
    for path in found:
        assert SECRET.encode() not in path.read_bytes(), path
