"""Completion: the script is one that bash takes, and it knows the flags."""

import shutil
import subprocess

import pytest

from selsft.cli import COMMANDS, main


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    "words, wanted",
    [
        (["selsft", "sc"], ["score"]),
        (["selsft", "train", "--negative_th"], ["--negative_threshold"]),
        (["selsft", "skills", "--label_t"], ["--label_tasks"]),
        (["selsft", "run", "--dry"], ["--dry_run"]),
    ],
)
def test_bash(words, wanted, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    line = (
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _selsft; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    found = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
    assert found.stdout.split() == wanted


def test_every_command_and_bad_input(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert all(f"            {name}) words=" in script for name in COMMANDS) and "bashcompinit" in script
    assert main(["completion", "fish"]) == 2
    assert "bash or zsh" in capsys.readouterr().err
