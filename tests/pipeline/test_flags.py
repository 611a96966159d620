"""Names of flags are read from source files, and a plan is printed without the libraries that train."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import trl

from selsft.config import SelectiveSFTConfig
from selsft.evaluation.settings import EvaluateArguments
from selsft.pipeline.flags import FORGET, fields_of
from selsft.pipeline.recipe import RunSettings, SplitSettings
from selsft.scoring.settings import ScoreArguments
from selsft.training.validation import _FORGETTING

HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "scipy", "pandas")
TYPES = [
    trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig, SelectiveSFTConfig,
    EvaluateArguments, ScoreArguments, RunSettings, SplitSettings,
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_fields_are_those_of_the_dataclass(kind):
    assert fields_of(kind.__name__) == {item.name for item in dataclasses.fields(kind)}


def test_what_becomes_of_negative_tokens_is_said_in_training():
    assert set(_FORGETTING) == FORGET


def imported(code, *argv):
    """Of `HEAVY`, what a fresh process has imported after `code`; and what it printed."""
    code = f"import sys\n{code}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.strip().splitlines()
    return last, "\n".join(printed)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["run", "--help"], ["run", "nothing"]])
def test_help_and_version_import_nothing_that_takes_seconds(argv):
    found, _ = imported(f"from selsft.cli import main\nmain({argv!r})")
    assert found == "[]"


def test_a_plan_is_printed_before_anything_is_imported_that_takes_seconds(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "alpha"}) + "\n")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    argv = ["run", "domain-lora", "--dry_run", "true", *flags, "--output_dir", str(tmp_path / "run")]
    stop = "import selsft.cli.run as run\nrun.check_flags = run._print_costs = lambda *_: None\n"
    found, printed = imported(f"{stop}from selsft.cli import main\nassert main({argv!r}) == 0")
    assert found == "[]" and "train-forget" in printed and not Path(tmp_path / "run").exists()
