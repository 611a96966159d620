"""The command line: the flags of `trl sft`, scores that training takes up again, and bad input in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from selsft.cli import main
from selsft.cli.arguments import CommandParser
from selsft.cli.launch import resolve_accelerate_config
from selsft.data.scored_folder import load_scores
from selsft.errors import InputError
from selsft.recipes import RECIPES
from selsft.report.terminal import printable
from tests.support import tiny

CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "max_length": 32,
    "per_device_train_batch_size": 4,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a model, a reference of full size, and a LoRA reference."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("model", 0), ("reference", 1)):
        tiny.llama(seed=seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapter = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """Run a command in a folder of its own with a data file `data.jsonl`, with common flags and those given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    tiny.prompt_data().to_json("data.jsonl")

    def run(command, **flags):
        return main([command, *to_flags({**CPU, "model_name_or_path": models / "model", **flags})])

    return run


def to_flags(values):
    lists = {key: value if isinstance(value, list) else [value] for key, value in values.items()}
    return [str(part) for key, value in lists.items() for part in (f"--{key}", *value)]


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first)


def one_line(capsys, *parts):
    """Standard error is one line that holds all `parts`."""
    written = capsys.readouterr().err.strip()
    assert len(written.splitlines()) == 1, written
    assert "Traceback" not in written
    for part in parts:
        assert part in written
    return written


# ---------------------------------------------------------------- train


def test_train_without_reference_is_trl_sft(run, models):
    assert run("train", dataset_name="data.jsonl", output_dir="out") == 0
    args = SFTConfig("trl", **CPU)
    trainer = SFTTrainer(str(models / "model"), args, train_dataset=Dataset.from_json("data.jsonl"))
    trainer.train()
    trainer.save_model()
    assert same(weights("out"), weights("trl"))


def test_train_from_yaml_records_what_it_was(run, models, monkeypatch):
    settings = {
        "reference_model": str(models / "reference"),
        "negative_threshold": 0.1,
        "score_base_weight": 1.0,
        "score_pooling": "token",
        "num_machines": 1,
    }
    data = {"datasets": [{"path": "json", "data_files": "data.jsonl"}], "test_split_size": 0.25}
    Path("recipe.yaml").write_text(yaml.safe_dump({**settings, **data, "eval_strategy": "steps", "eval_steps": 3}))
    # As if launched: num_machines in the file is the launcher's
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert run("train", config="recipe.yaml", output_dir="out", negative_threshold=0.2) == 0
    record = json.load(open("out/selsft_run.json"))
    assert record["config"]["negative_threshold"] == 0.2  # the command line wins
    assert record["config"]["forget_weight"] == 0.25
    assert record["data"]["rows"] == 18 and len(record["data"]["sha256"]) == 64
    assert record["model"]["name"] == str(models / "model") and len(record["model"]["sha256"]) == 64
    assert record["versions"]["trl"].startswith("1.")
    assert record["finished"]["steps"] == 3
    assert not same(weights("out"), weights(models / "model"))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_local_files(run, suffix):
    data = tiny.text_data()
    {"parquet": data.to_parquet, "csv": data.to_csv, "json": data.to_json}[suffix](f"texts.{suffix}")
    assert run("train", dataset_name=f"texts.{suffix}", output_dir="out", max_steps=1) == 0


def test_lora_and_resume(run, models):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "o_proj"]}
    common = {
        **lora,
        "reference_model": models / "adapter",
        "dataset_name": "data.jsonl",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    assert run("train", **common, output_dir="whole", max_steps=4) == 0
    assert run("train", **common, output_dir="whole", max_steps=4) == 2  # holds something
    first = load_file("whole/adapter_model.safetensors")
    state = Path("whole/checkpoint-2/trainer_state.json")
    marked = json.loads(state.read_text())
    marked["log_history"].append({"step": 2, "marker": 1.0})  # comes back only if the state is taken up
    state.write_text(json.dumps(marked))
    assert run("train", **common, output_dir="whole", max_steps=4, resume_from_checkpoint=str(state.parent)) == 0
    resumed = json.loads(Path("whole/checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert any("marker" in row for row in resumed)
    assert same(first, load_file("whole/adapter_model.safetensors"), tolerance=1e-6)
    config = json.load(open("whole/adapter_config.json"))
    assert config["r"] == 4 and set(config["target_modules"]) == {"q_proj", "o_proj"}


# ---------------------------------------------------------------- score


@pytest.mark.parametrize("reference", ["reference", "adapter"])
def test_scored_data_trains_as_the_reference_does(run, models, capsys, reference):
    selection = {
        "negative_threshold": 0.05,
        "score_base_weight": 1.0,
        "score_pooling": "token",
        "forget_schedule": "constant",
    }
    flags = {"dataset_name": "data.jsonl", "reference_model": models / reference}
    rule = {"negative_threshold": 0.2, "score_base_weight": 1.0, "score_pooling": "token"}
    assert run("score", **flags, scored_dir="scored", **rule) == 0
    printed = capsys.readouterr().out
    scored = load_scores("scored")
    assert set(scored.column_names) == {"input_ids", "labels", "base_logps", "ref_logps"}
    # The summary says what is in the folder
    record = json.load(open("scored/selsft_run.json"))["finished"]
    found = [
        ref - base
        for row in scored
        for position, (ref, base) in enumerate(zip(row["ref_logps"], row["base_logps"], strict=True))
        if position and row["labels"][position] != -100
    ]
    assert record["scored_tokens"] == len(found)
    assert record["quantiles"]["0.0"] == pytest.approx(min(found), abs=1e-6)
    assert record["quantiles"]["0.5"] == pytest.approx(sorted(found)[len(found) // 2], abs=0.02)
    assert f"{len(found)}" in printed and "most negative tokens" in printed
    assert run("train", dataset_name="scored", output_dir="again", **selection) == 0
    assert run("train", **flags, output_dir="direct", **selection) == 0
    assert run("train", dataset_name="data.jsonl", output_dir="plain") == 0
    assert same(weights("again"), weights("direct"))
    assert not same(weights("again"), weights("plain"), tolerance=1e-4)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_are_saved_as_documents(run, models, strategy):
    flags = {"dataset_name": "data.jsonl", "reference_model": models / "reference", "max_length": 24}
    assert run("score", **flags, scored_dir="plain") == 0
    assert run("score", **flags, scored_dir="packed", packing=True, packing_strategy=strategy) == 0
    assert run("train", dataset_name="packed", output_dir="out", packing=True, max_length=24) == 0
    if strategy == "bfd":  # wrapping cuts documents, whose parts then have another past
        rows = {name: {tuple(row["input_ids"]): row for row in load_scores(name)} for name in ("plain", "packed")}
        assert rows["plain"].keys() == rows["packed"].keys()
        for ids, row in rows["plain"].items():
            for column in ("base_logps", "ref_logps"):
                assert row[column][1:] == pytest.approx(rows["packed"][ids][column][1:], abs=1e-5)


def test_worst_token_is_shown_escaped(run, models, capsys):
    Dataset.from_dict({"text": ["alpha\x1b[31m beta\x07 [bold]gamma[/bold]"] * 4}).to_json("odd.jsonl")
    flags = {"dataset_name": "odd.jsonl", "reference_model": models / "reference", "scored_dir": "scored"}
    assert run("score", **flags, show_tokens=40) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed
    assert "bold]gamma" in re.sub(r"[\s│]", "", printed)
    assert "40 most negative tokens" in printed


def test_printable():
    assert printable("a\nb\t\x1b[0m é 漢\u202e") == "a\\nb\\t\\x1b[0m é 漢\\u202e"


# ---------------------------------------------------------------- bad input

FILES = {
    "columns.jsonl": '{"question": "a"}\n',
    "broken.jsonl": '{"text": "a"}\n{',
    "empty.jsonl": "",
    "full/notes.txt": "keep",
    "bad.yaml": "forget_wait: 1\n",
}
BAD = {
    "missing file": ({"dataset_name": "nothing.jsonl"}, ["dataset_name='nothing.jsonl'", "no such file"]),
    "no data": ({}, ["dataset_name is missing", "--dataset_name"]),
    "unknown column": ({"dataset_name": "columns.jsonl"}, ["'question'", "'messages'", "dataset_text_field"]),
    "broken file": ({"dataset_name": "broken.jsonl"}, ["'broken.jsonl' cannot be read"]),
    "empty file": ({"dataset_name": "empty.jsonl"}, ["'empty.jsonl' is an empty file"]),
    "two rules": (
        {"dataset_name": "data.jsonl", "negative_threshold": 1.5, "positive_fraction": 0.7},
        ["negative_threshold=1.5", "positive_fraction=0.7", "set only one"],
    ),
    "objective": ({"dataset_name": "data.jsonl", "forget_objective": "hope"}, ["forget_objective", "'hope'", "npo"]),
    "range": ({"dataset_name": "data.jsonl", "neutral_band": -1}, ["neutral_band=-1.0"]),
    "type": ({"dataset_name": "data.jsonl", "learning_rate": "fast"}, ["learning_rate", "'fast'"]),
    "misspelt": (
        {"dataset_name": "data.jsonl", "learning_rat": 1},
        ["--learning_rat", "did you mean --learning_rate"],
    ),
    "output": ({"dataset_name": "data.jsonl", "output_dir": "full"}, ["output_dir='full'", "nothing was overwritten"]),
    "eval split": ({"dataset_name": "data.jsonl", "eval_strategy": "epoch"}, ["dataset_test_split='test'", "'train'"]),
    "model": ({"dataset_name": "data.jsonl", "model_name_or_path": "nowhere/model"}, ["model_name_or_path='nowhere"]),
    "reference": ({"dataset_name": "data.jsonl", "reference_model": "nowhere/ref"}, ["reference_model='nowhere/ref'"]),
    "config": ({"config": "missing.yaml"}, ["--config missing.yaml", "truthfulqa-smollm2"]),
    "config key": ({"config": "bad.yaml", "dataset_name": "data.jsonl"}, ["--forget_wait", "--forget_weight"]),
    "resume": ({"dataset_name": "data.jsonl", "resume_from_checkpoint": "true"}, ["holds no checkpoint"]),
    "accelerate": ({"dataset_name": "data.jsonl", "accelerate_config": "zero9"}, ["zero9", "zero3"]),
    "processes": ({"dataset_name": "data.jsonl", "num_processes": "two"}, ["num_processes", "'two'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(run, capsys, case):
    flags, parts = BAD[case]
    os.mkdir("full")
    for name, text in FILES.items():
        Path(name).write_text(text)
    capsys.readouterr()
    assert run("train", **{"output_dir": "out", **flags}) == 2
    assert one_line(capsys, *parts).startswith("selsft train: error: ")
    assert os.listdir("full") == ["notes.txt"] and not os.path.exists("out/selsft_run.json")


def test_score_refuses(run, models, capsys):
    assert run("score", dataset_name="data.jsonl", scored_dir="scored") == 2
    one_line(capsys, "reference_model is missing")
    os.mkdir("scored")
    Path("scored/keep").touch()
    assert run("score", dataset_name="data.jsonl", reference_model=models / "reference", scored_dir="scored") == 2
    one_line(capsys, "scored_dir='scored'", "nothing was overwritten")
    assert os.listdir("scored") == ["keep"]


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    one_line(capsys, "unknown command 'trian'", "train")


def test_a_bug_keeps_its_traceback(run, models, monkeypatch):
    def broken(self, *args, **kwargs):
        raise ValueError("not about input")

    monkeypatch.setattr("selsft.trainer.SelectiveSFTTrainer.train", broken)
    with pytest.raises(ValueError, match="not about input"):
        run("train", dataset_name="data.jsonl", output_dir="out")


# ---------------------------------------------------------------- help, recipes, launching


@pytest.mark.parametrize("command", ["train", "score"])
def test_help_starts_with_what_matters(command, capsys):
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: selsft {command}" in printed and "--negative_threshold VALUE" in printed
    assert "--forget_objective {unlikelihood" in printed and "--num_processes" in printed
    assert "--adam_beta1" not in printed
    assert len(printed.splitlines()) < 220
    assert main([command, "--help_all"]) == 0
    assert "--adam_beta1" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_parse_without_unknown_keys(recipe):
    """Those with stages are for `selsft run`, and tests/test_pipeline.py."""
    parser, argv = CommandParser("train", "", ""), ["--config", recipe, "--output_dir", "out"]
    if "stages" in yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()):
        with pytest.raises(InputError, match="is a recipe with stages: give it to `selsft run`"):
            parser.parse([*argv, "--use_cpu", "true", "--bf16", "false"])
    else:
        arguments = parser.parse(argv)
        assert arguments is not None and not arguments.launch


def test_help_is_quick_and_main_runs_as_a_process():
    code = "import sys, selsft.cli; status = selsft.cli.main(['--help']); print('torch' in sys.modules, status)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False 0"
    done = subprocess.run([sys.executable, "-m", "selsft.cli", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_accelerate_config_by_name():
    resolved = resolve_accelerate_config(["--num_processes", "2", "--accelerate_config", "zero2"])
    assert resolved[0] == "--config_file" and resolved[1].endswith("zero2.yaml")
    assert resolved[2:] == ["--num_processes", "2"]
    with pytest.raises(InputError, match="needs a value"):
        resolve_accelerate_config(["--accelerate_config"])


def test_two_processes(run, models, monkeypatch):
    """Half the batch on each of two processes is the batch on one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = {
        "dataset_name": "data.jsonl",
        "reference_model": models / "reference",
        "negative_threshold": 0.05,
        "score_base_weight": 1.0,
        "score_pooling": "token",
    }
    flags["scoring_cache_dir"] = "cache"
    assert run("train", **flags, output_dir="one", per_device_train_batch_size=8) == 0
    assert run("train", **flags, output_dir="two", per_device_train_batch_size=4, num_processes=2) == 0
    assert json.load(open("two/selsft_run.json"))["processes"] == 2
    assert same(weights("one"), weights("two"), tolerance=1e-5)


def test_no_is_a_word_in_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text("save_strategy: no\neval_strategy: off\nbf16: no\nuse_cpu: yes\n")
    arguments = CommandParser("train", "", "").parse(
        ["--config", str(tmp_path / "config.yaml"), "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
    )
    training = arguments.training
    assert (training.save_strategy, training.eval_strategy, training.bf16) == ("no", "no", False)
