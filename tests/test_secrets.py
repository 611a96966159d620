"""Secrets: what counts as one, that records have none, and that the door empties the flags."""

import copy
import dataclasses
import json
import os

import pytest
import torch
import yaml

from selsft import SelectiveSFTConfig, secrets
from selsft.errors import InputError
from selsft.records import write_json
from selsft.secrets import HIDDEN, is_secret, redact, to_environment
from tests.support import commands
from tests.test_fault_injection import in_this_process, inputs

__all__ = ["inputs"]  # a fixture

MARK = "hf_marked-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [name for name in os.environ if is_secret(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")


@pytest.mark.parametrize(
    "name", ["token", "hub_token", "--hub_token", "HF_TOKEN", "WANDB_API_KEY", "api-key", "password", "a.b.secret"]
)
def test_secret_names(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["eos_token", "pad_token", "token_weights", "tokens", "max_new_tokens", "tokenizer_sha256", "key", "shard_tokens"],
)
def test_public_names(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    "record",
    [
        {"hub_token": MARK},
        {"config": {"init_kwargs": {"token": MARK, "dtype": "float32"}}},
        {"arguments": ["--hub_token", MARK, "--seed", "0"]},
        {"arguments": [f"--hub_token={MARK}"]},
        {"arguments": ["--model_init_kwargs", json.dumps({"token": MARK})]},
        {"text": f"token: '{MARK}'", "again": f"https://user:{MARK}@host"},
        {"command": f"selsft train --hub_token {MARK}", "hub_token": MARK},
        [{"nested": [{"password": MARK}, f"said {MARK} aloud"]}],
        {"source": f"https://user:{MARK}@host/rows.jsonl", "log": f"read {MARK}"},
        {"headers": {"Authorization": f"Bearer {MARK}"}},
    ],
)
def test_records_have_no_secrets(record, tmp_path):
    write_json(tmp_path / "record.json", record)
    text = (tmp_path / "record.json").read_text()
    assert MARK not in text and HIDDEN in text


def test_the_environment_counts(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", MARK)
    monkeypatch.setenv("SHORT_TOKEN", "1")
    assert redact({"log": f"x{MARK}y", "one": "1"}) == {"log": f"x{HIDDEN}y", "one": "1"}


def test_everything_else_is_unchanged():
    record = {
        "eos_token": "</s>", "max_new_tokens": 5, "list": [1, None, True, 2.5], "arguments": ["--eos_token", "</s>"],
        "token": None, "text": "key: 'value' and token_weights = 'x'", "hub_token": "",
    }  # fmt: skip
    assert redact(record) == record


def test_the_door_moves_tokens_to_the_environment(monkeypatch):
    monkeypatch.setattr(secrets.os, "environ", dict(os.environ))
    flags = {
        "hub_token": MARK, "model_init_kwargs": {"token": MARK, "dtype": "float32"}, "seed": 3,
        "reference_model_init_kwargs": json.dumps({"token": MARK, "revision": "x"}), "eos_token": "</s>",
    }  # fmt: skip
    to_environment(flags)
    assert secrets.os.environ["HF_TOKEN"] == MARK and MARK not in str(flags)
    assert flags["model_init_kwargs"] == {"dtype": "float32"} and flags["eos_token"] == "</s>"
    assert json.loads(flags["reference_model_init_kwargs"]) == {"revision": "x"}
    with pytest.raises(InputError, match=r"hub_token and model_init_kwargs\.token are different tokens"):
        to_environment({"hub_token": MARK, "model_init_kwargs": {"token": MARK + "2"}})


def test_pickled_settings_have_no_secrets(tmp_path):
    """transformers pickles them beside every model (`training_args.bin`); a copy in memory keeps what is needed."""
    url = f"https://user:{MARK}@host/rows.jsonl"
    args = SelectiveSFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, hub_token=MARK, judged=url, seed=3,
        model_init_kwargs={"proxies": {"https": url}, "token": MARK, "dtype": "float32"},
    )  # fmt: skip
    torch.save(args, tmp_path / "training_args.bin")
    assert not [path for path in tmp_path.iterdir() if MARK.encode() in path.read_bytes()]
    again = args.__getstate__()  # what the pickle holds; nothing is unpickled
    assert (again["seed"], again["optim"], again["save_strategy"]) == (3, args.optim, args.save_strategy)
    assert again["model_init_kwargs"]["dtype"] == "float32"
    assert again["judged"] == f"https://user:{HIDDEN}@host/rows.jsonl"
    for same in (copy.copy(args), copy.deepcopy(args), dataclasses.replace(args)):
        assert (same.hub_token, same.judged, same.model_init_kwargs["token"]) == (MARK, url, MARK)


NESTED = json.dumps({"token": MARK, "dtype": "float32"})
GIVEN: dict[str, list[str]] = {
    "train": ["--hub_token", MARK, "--model_init_kwargs", NESTED, "--reference_model_init_kwargs", NESTED],
    "train without checkpoints": ["--config", "secret.yaml"],
    "score": ["--config", "secret.yaml", f"--hub_token={MARK}", "--reference_model_init_kwargs", NESTED],
    "score with a probe": ["--hub_token", MARK],
    "tokens": ["--hub_token", MARK],
    "export": [],
    "evaluate": ["--hub_token", MARK, "--model_init_kwargs", NESTED],
    "run": [
        "--go_on",
        "true",
        "--hub_token",
        MARK,
        "--score.reference_model_init_kwargs",
        NESTED,
        "--model_init_kwargs",
        NESTED,
    ],
    "skills": ["--training_kwargs", json.dumps({"hub_token": MARK, "optim": "adamw_torch"})],
    "inspect": [],
    "demo": [],
    "bench": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", commands.COMMANDS)
def test_no_command_writes_a_secret(inputs, tmp_path, command):
    """Tokens as flags, in nested keys, in YAML, in URLs and in the environment; every file and all that is said."""
    folder = tmp_path / "work"
    commands.copy(inputs, folder)
    (folder / "secret.yaml").write_text(yaml.safe_dump({"hub_token": MARK, "model_init_kwargs": {"token": MARK}}))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["stages"]["evaluate"]["hub_token"] = MARK
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    read = {path.relative_to(folder) for path in folder.rglob("*")}

    def environment() -> None:
        in_this_process()
        os.environ.update({
            "WANDB_API_KEY": MARK + "-wandb", "HTTPS_PROXY": f"http://user:{MARK}@localhost:1", "HF_TOKEN": MARK,
        })  # fmt: skip

    for time in ("once", "and again, finished or not"):
        done = commands.run([*commands.COMMANDS[command], *GIVEN[command]], folder, environment)
        assert done.status == 0 or time != "once", done.text
        assert MARK not in done.text
    written = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder) not in read]
    assert written
    for path in written:
        assert MARK.encode() not in path.read_bytes(), path
