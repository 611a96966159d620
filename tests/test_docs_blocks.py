"""Every code block of README and docs runs, on a tiny model and a few rows.

Blocks of a page run in their order, in one folder that has the files which pages name. Models of the Hub become the
tiny one, and commands get the flags of a short run on a CPU. `<!-- not run: REASON -->` before a block leaves it out;
`NOT_RUN` is the whole list. Blocks without a language are output.

Rejected: doctest, which has no shell; running each command as a process, since each would import torch again.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from selsft.cli import main
from selsft.config import SelectiveSFTConfig
from selsft.data.scored_folder import load_scores
from tests.data.test_foreign import SAMPLES
from tests.support import judged, tiny

ROOT = Path(__file__).parents[1]
DOCS = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
PAGES = ["README.md", "CONTRIBUTING.md", "kernels/README.md", *DOCS]
BLOCK = re.compile(
    r"^(?:<!-- not run: ([^\n]*) -->\n)?```(bash|python|diff|yaml|json)\n(.*?)^```", re.MULTILINE | re.DOTALL
)
NOT_RUN = {
    ("README.md", "minutes"): 1,
    ("README.md", "installs packages"): 1,
    ("CONTRIBUTING.md", "runs tests"): 1,
    ("docs/axolotl.md", "a file of axolotl"): 1,
    ("docs/axolotl.md", "installs axolotl"): 1,
    ("docs/demo.md", "minutes"): 1,
    ("docs/experiments.md", "hours, and a model of the Hub"): 2,
    ("docs/experiments.md", "minutes of measuring"): 1,
    ("docs/pipeline.md", "minutes"): 1,
    ("docs/pipeline.md", "a part of a recipe"): 1,
    ("docs/quickstart.md", "installs packages"): 1,
    ("docs/recipes.md", "tasks of the Hub"): 1,
    ("docs/scaling.md", "several processes and machines"): 1,
    ("docs/schemes.md", "minutes of measuring"): 1,
    ("docs/scoring.md", "needs a Ray cluster"): 1,
    ("docs/skills.md", "tasks of the Hub"): 1,
    ("docs/tokens.md", "needs a server"): 1,
}
NAMES = {
    "Qwen/Qwen3-0.6B": "model",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "model",
    "HuggingFaceTB/SmolLM2-135M": "model",
    "path/to/adapter": "adapter",
    "my-org/clean-adapter": "adapter",
    "runs/mine/train/model": "model",
    " MODEL": " model",
    '"clean"': '"adapter"',
    " --num_processes 8": "",
    "--seeds 3": "--seeds 1",
}
SHORT = {
    "use_cpu": True,
    "bf16": False,
    "max_length": 32,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}
FLAGS = {
    **{command: {**SHORT, "dtype": "float32"} for command in ("train", "score", "tokens")},
    "run": {**{key: value for key, value in SHORT.items() if key != "save_strategy"}, "dtype": "float32"},
    "evaluate": {**{key: SHORT[key] for key in ("use_cpu", "bf16", "max_length")}, "max_new_tokens": 4},
    "skills": {
        "use_cpu": True,
        "hidden_layer": -2,
        "max_train": 8,
        "max_test": 8,
        "num_train_epochs": 1,
        "label_tasks": "copa",
        "seeds": 1,
    },
}


def blocks(page):
    """(language, text, why it is not run or "") of each code block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(language, block, why) for why, language, block in BLOCK.findall(text)]


RUN = [page for page in PAGES if any(not why for _, _, why in blocks(page))]
# A page takes long when it trains or scores more than once
LONG = {
    "docs/pipeline.md",
    "docs/bench.md",
    "docs/scores.md",
    "docs/skills.md",
    "docs/quickstart.md",
    "docs/recipes.md",
    "README.md",
    "docs/judged.md",
    "docs/api.md",
    "docs/formats.md",
    "docs/export.md",
}


def test_what_is_not_run():
    found: dict[tuple[str, str], int] = {}
    for page in PAGES:
        for _, _, why in blocks(page):
            if why:
                found[page, why] = found.get((page, why), 0) + 1
    assert found == NOT_RUN


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder whose files pages name."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    tiny.llama(num_hidden_layers=2).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    adapter = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"])
    get_peft_model(tiny.llama(), adapter).save_pretrained(folder / "adapter")
    for seed, (name, count) in enumerate({"messy": 30, "data": 24, "trusted": 12, "general": 8, "heldout": 8}.items()):
        rows = [{"id": f"{name}-{i}", **row} for i, row in enumerate(judged.rows(count, seed + 20, judged=False))]
        Dataset.from_list(rows).to_json(folder / f"{name}.jsonl")
    judged.data(60).to_json(folder / "judged.jsonl")
    judged.data(20, 7).to_json(folder / "held-out.jsonl")
    (folder / "wiki.txt").write_text(" ".join(tiny.sentence(i, 8) for i in range(30)))
    question = {"prompt": "alpha beta", "options": ["gamma", "delta"]}
    (folder / "DATA").mkdir()
    for task in ("copa", "sst2", "wic"):
        lines = [
            {**question, "id": str(i), "prompt": f"{task} {tiny.sentence(i, 4)} {i}", "gold": i % 2} for i in range(40)
        ]
        (folder / "DATA" / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "choices.jsonl").write_text(json.dumps({**question, "id": "q", "gold": 0}) + "\n")
    recipe = {"model_name_or_path": str(folder / "model"), "dataset_name": "messy.jsonl", "output_dir": "out"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, content in SAMPLES.values():
        (folder / name).write_text(content)
    tiny.tokenised_data(8).save_to_disk(folder / "last_run_prepared" / "0f3a")
    with pytest.MonkeyPatch.context() as patch:  # scores of these very rows, as a server would hand them over
        patch.chdir(folder)
        shell("selsft score --config recipe.yaml --reference_model adapter --scored_dir served", [])
    found = load_scores(folder / "served")
    pq.write_table(
        pa.table({name: found[name][:] for name in ("input_ids", "ref_logps")}), folder / "from-server.parquet"
    )
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A working directory with the world's files, in which what pages call by name is short and small."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    plain = SelectiveSFTConfig.__init__
    monkeypatch.setattr(
        SelectiveSFTConfig, "__init__", lambda self, *args, **kwargs: plain(self, *args, **{**SHORT, **kwargs})
    )
    from selsft.pipeline.plan import Plan

    def in_this_process(command, argv):
        assert importlib.import_module(f"selsft.cli.{command}").main(argv) in (0, None)

    monkeypatch.setattr(Plan.__init__, "__defaults__", (in_this_process,))
    return tmp_path


def with_names(text):
    for name, tiny_name in NAMES.items():
        text = text.replace(name, tiny_name)
    return text


def shell(line, before):
    """Run one line of a block. `...` stands for the flags of the line before it."""
    words = shlex.split(line.split(" > ")[0], comments=True)
    if not words:
        return before
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return before
    assert words[0] == "selsft", f"no rule for {line!r}: mark the block `not run`"
    command, *rest = words[1:]
    if "..." in rest:
        at = rest.index("...")
        rest[at : at + 1] = before[1:]
    else:
        before = rest
    extra = {key: value for key, value in FLAGS.get(command, {}).items() if f"--{key}" not in rest}
    assert main([command, *rest, *(str(part) for key, value in extra.items() for part in (f"--{key}", value))]) == 0, (
        line
    )
    return before


def scored(folder):
    """`runs/scored`, for pages that begin with it."""
    if not (folder / "runs/scored").exists():
        shell("selsft score --config recipe.yaml --reference_model adapter --scored_dir runs/scored", [])


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in LONG else []) for p in RUN])
def test_blocks_run(page, here):
    names: dict = {}
    before: list[str] = []
    for number, (language, text, why) in enumerate(blocks(page)):
        if why:
            continue
        text = with_names(text)
        if language == "json":
            for line in text.splitlines():
                json.loads(line)
        elif language == "yaml":
            Path("given.yaml").write_text(text)
            if re.search(r"^(stages|arms):", text, re.MULTILINE):
                given = "--model_name_or_path model --dataset_name messy.jsonl"  # which a fragment leaves out
                shell(f"selsft run given.yaml {given} --output_dir runs/given-{number} --dry_run", [])
            else:
                from selsft.cli.arguments import CommandParser

                assert CommandParser("train", "", "").parse(
                    ["--config", "given.yaml", "--output_dir", "unused", "--use_cpu", "true", "--bf16", "false"]
                )
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                if "runs/scored" in line and "--scored_dir" not in line:
                    scored(here)
                before = shell(line, before)
        else:
            if language == "diff":
                text = "\n".join(line[1:] for line in text.splitlines() if not line.startswith("-"))
            names = names or given_names(page)
            exec(compile(text, f"{page}, block {number}", "exec"), names)


def given_names(page):
    """What a reader of the page has already: a model, rows, a tokenizer."""
    rows = judged.data(24, 5, judged=False)
    return {
        "model": "model",
        "dataset": rows,
        "rows": judged.data(24, 5) if page == "docs/spans.md" else rows,
        "held_out": judged.data(8, 6, judged=False),
        "judged": judged.data(60),
        "tokenizer": tiny.tokenizer(),
        "args": SelectiveSFTConfig("out"),
        "peft_config": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags, made",
    [
        (
            "domain_lora",
            "--messy messy.jsonl --trusted trusted.jsonl --heldout heldout.jsonl",
            "selective/adapter_model.safetensors",
        ),
        ("own_spans", "", "adapter_model.safetensors"),
        ("judged_probe", "--messy messy.jsonl --judged judged.jsonl", "model/adapter_model.safetensors"),
        ("skill_forgetting", "--numbers 24", "report.html"),
        ("bare_loop", "", "model.safetensors"),
        ("trl_subclass", "", "model.safetensors"),
    ],
)
def test_examples_run(script, flags, made, here, monkeypatch, capsys):
    def run(command, check):
        shell(shlex.join(command), [])

    monkeypatch.setattr(subprocess, "run", run)
    path = ROOT / "docs" / "examples" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--model", "model", "--output", "made", "--cpu", *flags.split()])
    FLAGS["skills"].pop("label_tasks", None)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "__main__"})
    assert (here / "made" / made).exists()
    if script == "judged_probe":
        assert re.search(r"probe +AUC 0\.9|probe +AUC 1\.0", capsys.readouterr().out)
