"""One process for each folder, whatever the command; Ctrl-C says how to resume."""

from pathlib import Path

import pytest

from selsft.records import exclusive
from tests.cli.test_train import models, one_line, run

pytestmark = pytest.mark.slow

__all__ = ["models", "run"]  # fixtures
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


@pytest.mark.parametrize(
    ("command", "interrupted", "kept"),
    [
        (
            "train",
            "selsft.trainer.SelectiveSFTTrainer.train",
            "checkpoints are kept in it, the same command",
        ),
        (
            "evaluate",
            "selsft.cli.evaluate._evaluate",
            "finished batches are kept in it, the same command",
        ),
        (
            "score",
            "selsft.score.ScoringRun.score",
            "finished shards are kept in it, the same command",
        ),
    ],
)
def test_interrupted_it_says_how_to_resume(run, models, capsys, monkeypatch, command, interrupted, kept):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, interrupt)
    flags = {FOLDERS[command]: "out", "dataset_name": "data.jsonl"}
    if command == "score":
        flags["reference_model"] = models / "reference"
    assert run(command, **flags) == 130
    assert f"selsft {command}: interrupted. out: {kept} resumes from" in capsys.readouterr().err
