"""Every command of selsft on tiny inputs, run in forks of the test process: shared by the tests that break commands.

A fork costs 30 ms where a process of its own takes ten seconds to import torch."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow.parquet as pq
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tqdm import tqdm

from selsft.cli import main
from selsft.demo.experiment import DemoConfig as _DemoConfig
from tests.support import skill_world, tiny

CPU = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False,
    "report_to": "none", "logging_steps": 1, "max_steps": 3, "learning_rate": 1e-2, "max_length": 32,
    "per_device_train_batch_size": 4,
}  # fmt: skip
STEPS = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
RECIPE = {
    "model_name_or_path": "model", "dataset_name": "data.jsonl", **CPU, **STEPS, "max_steps": 2, "use_peft": True,
    "lora_target_modules": ["q_proj", "v_proj"], "negative_threshold": 0.01, "score_base_weight": 1.0,
    "score_pooling": "token", "lora_dropout": 0.0,
    "stages": {
        "split": {"reference_size": 0.3, "eval_size": 5},
        "reference": {"learning_rate": 2.0e-2},
        "evaluate": {"max_new_tokens": 3},
    },
}  # fmt: skip


def workspace(folder: Path) -> None:
    """Models, data, a judged sample, tasks and a recipe, which the commands below read."""
    for name, seed in (("model", 0), ("reference", 1)):
        tiny.llama(seed=seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    torch.manual_seed(2)
    adapter = get_peft_model(tiny.llama(seed=0), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    adapter.save_pretrained(folder / "adapter")
    adapter_file = folder / "adapter" / "adapter_config.json"
    adapter_file.write_text(json.dumps(json.loads(adapter_file.read_text()) | {"base_model_name_or_path": "model"}))
    tiny.prompt_data(36).to_json(str(folder / "data.jsonl"))
    rng = random.Random(0)
    with (folder / "judged.jsonl").open("w") as file:
        for i, row in enumerate(tiny.prompt_data(40).to_list()):
            text, spans = row["completion"], []
            if i % 2:
                place = rng.choice([k for k, letter in enumerate(text) if letter == " "])
                end = text.find(" ", place + 1) if text.find(" ", place + 1) > 0 else len(text)
                wrong = " zeta" if text[place:end] != " zeta" else " mu"
                text, spans = text[:place] + wrong + text[end:], [[place, place + len(wrong)]]
            file.write(json.dumps({"prompt": row["prompt"], "completion": text, "spans": spans}) + "\n")
    questions = [
        {"id": str(i), "prompt": tiny.sentence(i), "options": [" alpha", " beta"], "gold": i % 2} for i in range(6)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "neutral.txt").write_text("\n\n".join(tiny.sentence(i, 12) for i in range(12)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    skill_world.write_tasks(folder / "tasks")
    skill_world.model().save_pretrained(folder / "skilled")
    skill_world.tokenizer().save_pretrained(folder / "skilled")


def copy(inputs: Path, folder: Path) -> Path:
    """A fresh working directory."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs, folder)
    return folder


def flags(values: Mapping[str, Any]) -> list[str]:
    lists = {key: value if isinstance(value, list) else [value] for key, value in values.items()}
    return [str(part) for key, value in lists.items() for part in (f"--{key}", *value)]


_MODEL = {**CPU, "model_name_or_path": "model", "dataset_name": "data.jsonl"}
_SCORE = {**_MODEL, "shard_tokens": 60, "scored_dir": "out", "show_tokens": 3}
_SKILLS = {
    "tasks": "hot_yes", "tasks_dir": "tasks", "model_name_or_path": "skilled", "output_dir": "out", "seeds": 1,
    "use_cpu": True, "hidden_layer": -2, "num_train_epochs": 1.0, "forget_num_train_epochs": 1.0, "max_train": 24,
    "max_test": 12,
}  # fmt: skip
COMMANDS: dict[str, list[str]] = {
    "train": ["train", *flags({**_MODEL, **STEPS, "reference_model": "reference", "negative_threshold": 0.01,
                               "output_dir": "out", "scoring_cache_dir": "cache"})],
    "train without checkpoints": ["train", *flags({**_MODEL, "save_strategy": "no", "output_dir": "out"})],
    "score": ["score", *flags({**_SCORE, "reference_model": "reference"})],
    "score with a probe": ["score", *flags({**_SCORE, "score": "probe", "judged": "judged.jsonl"})],
    "tokens": ["tokens", *flags({"model_name_or_path": "model", "dataset_name": "data.jsonl", "max_length": 32,
                                 "part_tokens": 60, "tokens_dir": "out"})],
    "export": ["export", "scored", "--output", "out/masked.parquet"],
    "evaluate": ["evaluate", *flags({**_MODEL, "model_name_or_path": "adapter", "evaluation_dir": "out",
                                     "max_new_tokens": 3, "eval_batch_tokens": 100, "options_file": "choices.jsonl",
                                     "neutral_text": "neutral.txt", "neutral_block": 16})],
    "run": ["run", "recipe.yaml", "--output_dir", "out"],
    "skills": ["skills", *flags(_SKILLS)],
    "inspect": ["inspect", "scored", "--output", "out/page.html", "--judged", "judged.jsonl"],
    "demo": ["demo", "--output", "out"],
    "bench": ["bench", "--cpu", "--rows", "64", "--shapes", "32x256", "--ignored", "0", "--seconds", "0.01",
              "--implementations", "torch", "--output_dir", "out"],
}  # fmt: skip


def tiny_demo() -> Any:
    """The settings of a demo that takes seconds."""
    from selsft.demo.train import Recipe
    from selsft.demo.world import WorldConfig

    return _DemoConfig(
        world=WorldConfig(countries=4), vocab_size=320, hidden_size=32, layers=1,
        pretraining=Recipe(epochs=1, learning_rate=1e-2, batch_size=32),
        reference=Recipe(epochs=1, learning_rate=1e-2, batch_size=32),
        training=Recipe(epochs=1, learning_rate=1e-2, batch_size=32),
    )  # fmt: skip


# ---------------------------------------------------------------- running


@dataclass
class Done:
    """How a command ended: `status` as a shell has it, negative for a signal; `text` is all that it printed."""

    status: int
    text: str

    @property
    def last(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else ""


def run(argv: list[str], folder: Path, before: Callable[[], object] = lambda: None) -> Done:
    """Run a command in a fork, with `folder` as its working directory; `before` is called there first."""
    reader, process = start(argv, folder, before)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    return Done(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text)


def start(argv: list[str], folder: Path, before: Callable[[], object] = lambda: None) -> tuple[int, int]:
    """Start a command in a fork: the end of a pipe with what it prints, and its process, which leads its own group."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return reader, process
    os.setsid()
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    os.close(writer)
    enter(argv, folder, before)


def enter(argv: list[str], folder: Path, before: Callable[[], object] = lambda: None) -> Any:
    """Be the process of a command that this one has forked: never returns."""
    try:
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        for reference in logging._handlerList:  # those of the libraries write where stderr was when they were made
            if type(handler := reference()) is logging.StreamHandler:
                handler.stream = sys.stderr
        warnings.resetwarnings()  # which the tests make errors
        os.chdir(folder)
        (folder / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(folder / "tmp")
        datasets.config.HF_DATASETS_CACHE = folder / "hf" / "datasets"
        import selsft.demo.experiment

        selsft.demo.experiment.DemoConfig = tiny_demo  # type: ignore[misc, assignment]
        before()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    be(argv)


def be(argv: list[str]) -> Any:
    # What a process of its own would not share: tqdm's lock is one for all forks and stays locked when its holder is
    # killed, and torch's launcher, run by a test before, has left handlers of signals
    lock, kinds = threading.RLock(), [tqdm]
    for kind in kinds:  # a subclass may have a lock of its own
        kind.set_lock(lock)
        kinds += kind.__subclasses__()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


# ---------------------------------------------------------------- results


def results(folder: Path) -> dict[str, str]:
    """What `out` holds of results, by file, as texts to compare: no times, no names of the machine or of folders."""
    return {name: text for path in sorted((folder / "out").rglob("*")) for name, text in _result(path, folder / "out")}


def _result(path: Path, root: Path):
    if path.is_symlink() or not path.is_file() or any(part.startswith("checkpoint-") for part in path.parts):
        return
    name = str(path.relative_to(root))
    if path.name.endswith((".safetensors",)):
        tensors = load_file(path)
        yield name, _sha("".join(f"{key}{tensors[key].tolist()}" for key in sorted(tensors)))
    elif path.suffix == ".parquet":
        yield name, _sha(str(pq.read_table(path).to_pydict()))
    elif path.suffix == ".html" and path.name != "report.html":
        yield name, _sha(path.read_text())
    elif path.name in ("metrics.json", "selection.json", "split.json", "judged.json", "selsft_scores.json",
                       "verdict.json"):  # fmt: skip
        found = json.loads(path.read_text())
        for name_ in ("seconds", "created", "content_sha256"):
            found.pop(name_, None)
        yield name, json.dumps(found, sort_keys=True)
    elif path.name == "results.csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        yield name, str([{key: value for key, value in row.items() if "second" not in key} for row in rows])
    else:
        yield name, "is there"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def timed(argv: list[str], folder: Path) -> tuple[Done, float]:
    start_ = time.perf_counter()
    done = run(argv, folder)
    return done, time.perf_counter() - start_
