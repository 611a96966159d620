"""Every command held wrong: one line that names the field or row, the value and the remedy, before a model is loaded.

Each case is a command, what is changed of a command line that works, and what the line must say. `loads` says that
the case can only be told from tokens or scores, after the model was loaded.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset

from selsft import SelectiveSFTConfig
from selsft.cli import main
from selsft.data.validation import read_model_facts, validate_rows
from tests.support import tiny

WORKING = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 1,
    "max_length": 32,
    "per_device_train_batch_size": 4,
    "dataset_name": "data.jsonl",
    "output_dir": "out",
}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CHAT = {"messages": [user("alpha beta"), assistant("gamma")]}
PAIR = {"prompt": "alpha beta", "completion": " gamma delta"}
FILES = {
    "int": [*[PAIR] * 3, {**PAIR, "completion": 42}],
    "long": [*[PAIR] * 3, {**PAIR, "completion": " gamma" * 300}],
    "long-chat": [*[CHAT] * 3, {"messages": [user("alpha"), assistant("gamma " * 300)]}],
    "long-ids": [{"input_ids": [5] * 3, "labels": [5] * 3}, {"input_ids": [5] * 300, "labels": [5] * 300}],
    "chat": [CHAT] * 4,
    "weight": [*[CHAT] * 3, {"messages": [user("alpha"), assistant("beta", weight="-1")]}],
    "text-then-chat": [*[{"text": "alpha"}] * 3, CHAT],
    "chat-then-text": [*[CHAT] * 3, {"text": "alpha"}],
    "pair-then-chat": [*[PAIR] * 3, CHAT],
    "two-kinds": [*[PAIR] * 3, {"prompt": [user("alpha")], "completion": [assistant("beta")]}],
    "crossed": [{"prompt": "alpha", "completion": [assistant("beta")]}] * 4,
    "question": [{"question": "alpha?", "answer": "beta"}] * 4,
    "alpaca": [{"instruction": "alpha", "input": "beta", "output": "gamma"}] * 4,
    "no-role": [*[CHAT] * 3, {"messages": [{"content": "alpha"}, assistant("beta")]}],
    "no-content": [*[CHAT] * 3, {"messages": [user("alpha"), {"role": "assistant"}]}],
    "content": [*[CHAT] * 3, {"messages": [user("alpha"), assistant(3)]}],
    "no-messages": [{"messages": []}, *[CHAT] * 3],
    "no-assistant": [*[CHAT] * 3, {"messages": [user("alpha")]}],
    "ids": [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 100_000]}],
    "labels": [{"input_ids": [5, 6, 7], "labels": [5, 6]}] * 4,
    "null": [*[PAIR] * 3, {"prompt": "alpha", "completion": None}],
}
BYTES = {"latin.jsonl": b'{"text": "a"}\n{"text": "caf\xe9"}\n', "latin.csv": b"text\na\ncaf\xe9\n"}


@dataclass
class Case:
    """`flags` of a working command line that are changed (`None`: left out), and what the one line must say."""

    command: str
    flags: dict
    says: list[str]
    loads: bool = False


def rows(name, *says, command="train", loads=False, **flags):
    return Case(command, {"dataset_name": f"{name}.jsonl", **flags}, list(says), loads)


def scored(name, *says, loads=False, **flags):
    return rows(name, *says, command="score", loads=loads, reference_model="reference", scored_dir="scored", **flags)


CASES = {
    "int completion": rows("int", "row 3 of the data holds 42 as 'completion', which is int", "it needs text"),
    "int completion, score": scored("int", "row 3 of the data holds 42 as 'completion'"),
    "no completion": rows("null", "row 3 of the data has no 'completion': repair or remove it"),
    "beyond the context": rows(
        "long", "row 3 of the data has", "more than the model's context of 256", "--max_length 256",
        max_length=1024, reference_model="reference",
    ),
    "beyond the context, score": scored("long", "row 3 of the data", "--max_length 256", max_length=1024),
    "beyond the context, chat": scored("long-chat", "row 3 of the data", "--max_length 256", max_length=1024),
    "beyond the context, ids": scored("long-ids", "row 1 of the data has 300 tokens", max_length=1024),
    "latin-1": Case("train", {"dataset_name": "latin.jsonl"}, ["latin.jsonl", "line 2 is not UTF-8", "0xe9"]),
    "latin-1, csv": Case("train", {"dataset_name": "latin.csv"}, ["latin.csv", "line 3 is not UTF-8", "0xe9"]),
    "latin-1, score": Case(
        "score", {"dataset_name": "latin.jsonl", "reference_model": "reference"}, ["line 2 is not UTF-8"]
    ),
    "all cut": Case("train", {"max_length": 2}, ["max_length=2", "no row", "supervised"], loads=True),
    "all cut, reference": Case(
        "train", {"max_length": 2, "reference_model": "reference"}, ["max_length=2", "no row"], loads=True
    ),
    "all cut, score": Case(
        "score", {"max_length": 2, "reference_model": "reference"}, ["max_length=2", "no row"], loads=True
    ),
    "output below /proc": Case("train", {"output_dir": "/proc/nope"}, ["output_dir='/proc/nope'", "choose another"]),
    "output below /proc, score": Case(
        "score", {"scored_dir": "/proc/nope", "reference_model": "reference"}, ["scored_dir='/proc/nope'"]
    ),
    "output below /proc, evaluate": Case("evaluate", {"output_dir": "/proc/nope"}, ["output_dir='/proc/nope'"]),
    "output below a file": Case("train", {"output_dir": "data.jsonl/out"}, ["output_dir='data.jsonl/out'"]),
    "cache of scores": Case("train", {"scoring_cache_dir": "/proc/nope"}, ["scoring_cache_dir='/proc/nope'"]),
    "tracker": Case("train", {"report_to": "mlflow"}, ["report_to='mlflow'", "installed", "--report_to none"]),
    "unknown tracker": Case("train", {"report_to": "nothing"}, ["report_to='nothing'", "wandb"]),
    "no template": rows("chat", "row 0 of the data has messages", "--chat_template_path", model_name_or_path="plain"),
    "no template, score": scored("chat", "has messages", "--chat_template_path", model_name_or_path="plain"),
    "template file": rows("chat", "chat_template_path='data.jsonl'", chat_template_path="data.jsonl"),
    "template that fails": rows(
        "chat", "row 0 of the data: the chat template cannot render", "roles must alternate",
        chat_template_path="fails.jinja",
    ),
    "reference without a model": Case(
        "train", {"reference_model": "empty"}, ["reference_model='empty'", "without a model", "config.json"]
    ),
    "reference without a model, score": Case("score", {"reference_model": "empty"}, ["reference_model='empty'"]),
    "a run instead of its checkpoint": Case(
        "train", {"model_name_or_path": "run"}, ["model_name_or_path='run'", "checkpoint-2"]
    ),
    "model without weights": Case("train", {"model_name_or_path": "hollow"}, ["'hollow'", "no weights"]),
    "model of another name": Case("evaluate", {"model_name_or_path": "nowhere/model"}, ["'nowhere/model'"]),
    "LoRA target": Case(
        "train", {"use_peft": True, "lora_target_modules": ["q_proj", "nope"]},
        ["lora_target_modules: 'nope'", "q_proj", "all-linear"],
    ),
    "LoRA targets": Case("train", {"use_peft": True, "lora_target_modules": ["a", "b"]}, ["'a'", "'b'", "o_proj"]),
    "LoRA target alone": Case(
        "score", {"use_peft": True, "lora_target_modules": "q_proj", "reference_model": "reference"},
        ["regular expression", "'.*q_proj'"],
    ),
    "LoRA rank": Case("train", {"use_peft": True, "lora_r": 0}, ["LoRA", "`r`", "0"]),
    "message weight": rows("weight", "weight='-1' of row 3: message 1 must be a finite number: correct it"),
    "text, then chat": rows("text-then-chat", "row 3 of the data has 'messages', row 0 has 'text': bring all rows"),
    "chat, then text": rows("chat-then-text", "row 3 of the data has 'text', row 0 has 'messages'"),
    "pair, then chat": rows("pair-then-chat", "row 3 of the data has 'messages', row 0 has 'prompt'"),
    "pairs of two kinds": rows("two-kinds", "row 3 of the data holds messages as", "row 0 text"),
    "pair of two kinds": rows("crossed", "row 0 of the data holds text as 'prompt' and messages as 'completion'"),
    "question and answer": rows("question", "'question', 'answer'", "--columns prompt=question,completion=answer"),
    "question and answer, evaluate": rows("question", "--columns prompt=question", command="evaluate"),
    "Alpaca": rows("alpaca", "--columns prompt=instruction,completion=output", "'input' appended to 'instruction'"),
    "no role": rows("no-role", "row 3 of the data", "message 0 of 'messages' has no 'role'"),
    "no content": rows("no-content", "row 3 of the data", "message 1 of 'messages' has no 'content'"),
    "int content": rows("content", "row 3 of the data", "message 1 of 'messages' has content=3, which is int"),
    "no messages": rows("no-messages", "row 0 of the data is empty: 'messages' has no messages"),
    "no assistant": rows("no-assistant", "row 3 of the data", "'assistant'", assistant_only_loss=True),
    "ids of another model": rows("ids", "row 1 of the data", "100000", "tokens 0 to 299"),
    "labels of another length": rows("labels", "row 0: column 'labels' has 2 values for 3 tokens"),
    "test split": Case(
        "train", {"dataset_name": "splits", "eval_strategy": "epoch"},
        ["row 3 of dataset_test_split='test' has no 'completion'"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workplace")
    for name, seed, template in (("model", 0, True), ("reference", 1, True), ("plain", 0, False)):
        tiny.llama(seed=seed).save_pretrained(folder / name)
        tokenizer = tiny.tokenizer()
        if not template:
            tokenizer.chat_template = None
        tokenizer.save_pretrained(folder / name)
    tiny.llama().config.save_pretrained(folder / "hollow")
    (folder / "empty").mkdir()
    (folder / "run" / "checkpoint-2").mkdir(parents=True)
    (folder / "splits").mkdir()
    (folder / "fails.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    for name, lines in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split, lines in (("train", [PAIR] * 4), ("test", FILES["null"])):
        (folder / "splits" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in BYTES.items():
        (folder / name).write_bytes(content)
    tiny.prompt_data(8).to_json(folder / "data.jsonl")
    return folder


def command_line(command, flags):
    argv = [command]
    for name, value in {**WORKING, "model_name_or_path": "model", **flags}.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


@pytest.mark.parametrize("name", CASES)
def test_one_line(name, workplace, tmp_path, monkeypatch, capfd):
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    for path in workplace.iterdir():
        Path(path.name).symlink_to(path)
    if not case.loads:
        monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", lambda *_, **__: pytest.fail("loaded"))
    capfd.readouterr()
    assert main(command_line(case.command, case.flags)) == 2
    written = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(written) == 1, written
    for part in case.says:
        assert part in written[0]
    assert not Path("out").exists() and not Path("scored").exists()


@pytest.mark.parametrize("command", ["train", "score", "evaluate"])
def test_a_cache_of_rows_that_cannot_be_written(command, workplace, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nope")
    flags = {"reference_model": "reference", "output_dir": tmp_path / "out"}
    assert main(command_line(command, flags)) == 2
    assert "HF_DATASETS_CACHE='/proc/nope' cannot be created" in capfd.readouterr().err


def test_a_folder_without_write_permission(workplace, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("out"))  # tests may run as root
    assert main(command_line("train", {"output_dir": tmp_path / "out"})) == 2
    assert "cannot be written to: choose another folder" in capfd.readouterr().err


def test_readers_of_files_print_nothing_of_their_own(workplace, tmp_path, monkeypatch):
    """`datasets` logs an error before it raises it."""
    monkeypatch.chdir(workplace)
    said = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("datasets").addHandler(handler)
    try:
        assert main(command_line("train", {"dataset_name": "latin.csv", "output_dir": tmp_path / "out"})) == 2
    finally:
        logging.getLogger("datasets").removeHandler(handler)
    assert not said


@pytest.mark.parametrize(
    ("prompt", "completion", "warned"),
    [("alpha?", "beta", True), ("alpha", "beta", True), ("alpha? ", "beta", False), ("alpha?\n", "beta", False),
     ("alpha?", " beta", False), ("漢字", "漢字", False), ("f(", "x)", False)],
)  # fmt: skip
def test_prompts_that_run_into_their_completions(prompt, completion, warned, workplace):
    data = Dataset.from_dict({"prompt": [prompt] * 4, "completion": [completion] * 4})
    for model, remedy in (("model", "bring messages"), ("plain", "end the prompts with")):
        args = SelectiveSFTConfig("unused", use_cpu=True, bf16=False)
        warning = validate_rows(data, read_model_facts(str(workplace / model)), args)
        assert (warning is not None) == warned
        if warning is not None:
            assert "row 0 of the data" in warning and remedy in warning
            assert ("bring messages" in warning) == (model == "model")
