"""Random rows, files and settings: a command succeeds or says in one line what is wrong, and nothing else.

100 seeded cases in every run of the tests, 1,000 with `pytest -m nightly`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from trl import SFTConfig

import selsft.score
import selsft.trainer
from selsft.config import SelectiveSFTConfig
from selsft.skills.config import StudyConfig
from tests.support import commands, tiny

CASES, NIGHTLY, BATCH = 100, 1000, 25
OWN = sorted(
    {field.name for field in dataclasses.fields(SelectiveSFTConfig)}
    - {field.name for field in dataclasses.fields(SFTConfig)}
)
SHARED = [
    "max_length", "packing", "packing_strategy", "max_steps", "per_device_train_batch_size", "dataset_text_field",
    "columns", "dataset_train_split", "completion_only_loss", "assistant_only_loss", "dtype", "lora_r",
    "truncation_mode", "lora_target_modules", "model_init_kwargs", "eval_strategy", "dataset_test_split",
    "padding_free", "eos_token", "pad_token", "gradient_accumulation_steps", "learning_rate", "seed", "use_peft",
    "chat_template_path",
]  # fmt: skip
STUDY = sorted(field.name for field in dataclasses.fields(StudyConfig) if field.name not in ("output_dir", "dry_run"))
VALUES = [
    "-1", "0", "1", "2", "0.5", "1.5", "-0.5", "nan", "inf", "-inf", "1e400", "99999999999999999999", "abc", "", " ",
    "true", "false", "null", "None", "[1, 2]", "{}", '{"a": 1}', "'", "\x1b[31m", "\u202e", "data.jsonl", "model",
    "none", "completion", "text", "reference", "a=b", "prompt=completion", "step", "train", "bfd", "influence",
    "given", "excess",
]  # fmt: skip
TEXTS = [
    "", " ", "alpha beta gamma", " delta", "\x00", "\x1b[31m red", "a\u202eb", "\ud800", "é漢字\U0001f600", "<eos>",
    "<|im_start|>user", "x" * 4000, "\n\n", "\ufeffalpha", "{{ messages }}",
]  # fmt: skip
NUMBERS = [0, 1, -1, 3, 10**12, 10**30, 0.5, -2.5, float("nan"), float("inf"), 1e308, True, False]
ROWS: list[dict[str, Any]] = [
    {"text": "alpha beta gamma delta"},
    {"prompt": "alpha beta", "completion": " gamma delta"},
    {"messages": [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta gamma"}]},
    {
        "prompt": [{"role": "user", "content": "alpha"}],
        "completion": [{"role": "assistant", "content": "beta gamma", "weight": 1}],
    },
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    {"prompt": "alpha beta", "completion": " gamma delta", "spans": [[1, 6]]},
    {"prompt": "alpha", "completion": " gamma delta", "spans": [{"start": 0, "end": 6, "weight": -1.0}]},
    {"prompt": "alpha", "completion": " gamma delta", "corrected": " gamma zeta"},
    {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "token_weights": [1.0, -1.0, 0.0]},
    {"input_ids": [5, 6, 7], "base_logps": [0.0, -1.0, -2.0], "ref_logps": [0.0, -1.0, -2.5]},
    {"text": "alpha beta", "spans": [[0, 5, -1.0]]},
    {"input_ids": [5, 6, 7], "token_scores": [0.0, -1.0, 2.0]},
]
QUESTION = {"id": "1", "prompt": "alpha", "options": [" beta", " gamma"], "gold": 0, "split": "test"}


# ---------------------------------------------------------------- what is random


def anything(rng: random.Random, depth: int = 0) -> Any:
    kinds = ["text", "text", "number", "none", "list", "mapping"] if depth < 2 else ["text", "number", "none"]
    match rng.choice(kinds):
        case "text":
            return rng.choice(TEXTS)
        case "number":
            return rng.choice(NUMBERS)
        case "none":
            return None
        case "list":
            return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
        case _:
            keys = ["role", "content", "weight", "start", "end", "train", "", "x"]
            return {rng.choice(keys): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def bent(rng: random.Random, content: Any) -> Any:
    """A thing with one part of it replaced, dropped or doubled."""
    if rng.random() < 0.3 or not isinstance(content, list | dict) or not content:
        return anything(rng)
    if isinstance(content, list):
        place = rng.randrange(len(content))
        return rng.choice([
            [*content[:place], bent(rng, content[place]), *content[place + 1 :]], content[:place], [*content, *content]
        ])  # fmt: skip
    key = rng.choice(list(content))
    match rng.randrange(4):
        case 0:
            return {name: value for name, value in content.items() if name != key}
        case 1:
            return {
                **content,
                rng.choice(["spans", "token_weights", "weight", "label", "\x1b", "answers"]): anything(rng),
            }
        case _:
            return {**content, key: bent(rng, content[key])}


def write_rows(rng: random.Random, path: Path, shapes: list[dict[str, Any]]) -> None:
    """Rows of one shape, some of them bent, as JSON lines; now and then not even that."""
    shape = rng.choice(shapes)
    rows = [shape if rng.random() < 0.6 else bent(rng, shape) for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.1:
        rows.append(rng.choice(shapes))
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass") for row in rows]
    match rng.randrange(20):
        case 0:
            lines[-1] = lines[-1][: len(lines[-1]) // 2]
        case 1:
            lines.append(bytes(rng.randrange(256) for _ in range(20)))
        case 2:
            lines.insert(0, b"\xef\xbb\xbf")
        case 3:
            lines = [json.dumps(rows).encode()]
    path.write_bytes(b"\n".join(lines) + b"\n")


def settings(rng: random.Random, names: list[str], count: int) -> dict[str, str]:
    return {rng.choice(names): rng.choice(VALUES) for _ in range(rng.randrange(1, count + 1))}


# ---------------------------------------------------------------- cases


def command_line(seed: int) -> list[str]:
    """Write the files of case `seed` into the working directory, and return its command."""
    rng = random.Random(seed)
    rows = Path("rows.jsonl")
    common = {**commands.CPU, "model_name_or_path": "model", "save_strategy": "no"}
    kind = rng.choice(
        ["rows"] * 8 + ["settings"] * 5 + ["judged", "options", "tasks", "study", "recipe", "inspect"] * 2
    )
    if kind == "rows":
        write_rows(rng, rows, ROWS)
        given = {} if rng.random() < 0.5 else rng.choice([
            {"packing": True}, {"completion_only_loss": True}, {"assistant_only_loss": True}, {"max_length": 3},
            {"reference_model": "reference"}, {"score": "given"}, {"negative_threshold": 0.5},
        ])  # fmt: skip
        return ["train", *commands.flags({**common, "dataset_name": rows, "output_dir": "out", **given})]
    if kind == "settings":
        data = rng.choice(["data.jsonl", "tokens.jsonl"])
        given = settings(rng, OWN if rng.random() < 0.7 else SHARED, 3)
        merged = {**common, "dataset_name": data, "output_dir": "out", **given}
        return [rng.choice(["train", "train", "score"]), *commands.flags(merged)]
    if kind == "judged":
        write_rows(rng, rows, ROWS[1:2] + ROWS[5:8])
        return ["inspect", "scored", "--output", "page.html", "--judged", str(rows)]
    if kind == "options":
        write_rows(rng, rows, [QUESTION])
        return ["evaluate", *commands.flags({**common, "options_file": rows, "evaluation_dir": "out"})]
    if kind == "tasks":
        Path("tasks").mkdir()
        write_rows(
            rng, Path("tasks/one.jsonl"), [QUESTION, {**QUESTION, "split": "train"}, {**QUESTION, "gold": " beta"}]
        )
        argv = {"tasks": "one", "tasks_dir": "tasks", "model_name_or_path": "model", "output_dir": "out"}
        return ["skills", "--dry_run", *commands.flags({**argv, "max_train": 4, "max_test": 4})]
    if kind == "study":
        argv = {"tasks": "hot_yes", "tasks_dir": "known", "model_name_or_path": "model", "output_dir": "out"}
        return ["skills", "--dry_run", *commands.flags({**argv, "hidden_layer": -1, **settings(rng, STUDY, 3)})]
    if kind == "recipe":
        recipe = json.loads(json.dumps(commands.RECIPE))
        for _ in range(rng.randrange(1, 4)):
            place = rng.choice([recipe, recipe.get("stages"), *(recipe.get("stages") or {}).values()])
            if isinstance(place, dict):
                name = rng.choice([*place, *OWN, "eval_size", "reference_size", "stages", "parts", "x"])
                place[name] = rng.choice([*VALUES, *NUMBERS, None, [], {}, [1], {"split": 1}])
            if not isinstance(recipe.get("stages"), dict):
                break
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        return ["run", "recipe.yaml", "--dry_run", "--output_dir", "out"]
    write_rows(rng, rows, ROWS[4:5] + ROWS[8:10] + ROWS[11:])
    names = ["score", "negative_threshold", "neutral_band", "rows", "max_tokens"]
    given = settings(rng, names, 1) if rng.random() < 0.4 else {}
    argv = ["inspect", str(rows), "--model_name_or_path", "model", "--output", "page.html"]
    return [*argv, *(f"--{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    commands.workspace(folder)
    tiny.tokenised_data(8).to_json(str(folder / "tokens.jsonl"))
    (folder / "tasks").rename(folder / "known")
    done = commands.run(commands.COMMANDS["score"], folder)
    assert done.status == 0, done.text
    (folder / "out").rename(folder / "scored")
    return folder


def nothing_is_trained() -> None:
    """Commands prepare everything, and then leave."""
    selsft.trainer.SelectiveSFTTrainer.train = lambda self, **_: SimpleNamespace(metrics={})  # type: ignore[method-assign, assignment]
    selsft.trainer.SelectiveSFTTrainer.save_model = lambda self, *_: None  # type: ignore[method-assign, assignment]

    def leave(self, *_) -> None:
        raise SystemExit(0)

    selsft.score.ScoringRun.score = leave  # type: ignore[method-assign, assignment]


def check(inputs: Path, root: Path, seeds: range) -> None:
    """In forks, since a library may even crash."""
    failed, home = [], Path.cwd()
    for seed in seeds:
        folder = root / str(seed)
        shutil.copytree(inputs, folder)
        os.chdir(folder)
        try:
            argv = command_line(seed)
        finally:
            os.chdir(home)
        done = commands.run(argv, folder, nothing_is_trained)
        shutil.rmtree(folder)
        told = done.status == 0 or (done.status == 2 and done.last.startswith(f"selsft {argv[0]}: error: "))
        if not told or "Traceback" in done.text:
            failed.append(f"{seed}: {' '.join(argv)[:200]}: status {done.status}: {done.text[-700:]}")
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_one_line_or_success(inputs, tmp_path, first):
    check(inputs, tmp_path, range(first, first + BATCH))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("first", range(CASES, CASES + NIGHTLY, BATCH))
def test_a_thousand_more(inputs, tmp_path, first):
    check(inputs, tmp_path, range(first, first + BATCH))
