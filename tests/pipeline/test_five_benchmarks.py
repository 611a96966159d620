"""The recipe five-benchmarks from end to end, on stand-ins of its tasks: the harness's own local tasks, with the
published names and kinds of request."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from selsft.cli import main
from selsft.config import PAPER_2508_04329
from selsft.evaluation.harness import DOCUMENTS, compare_harness, count_requests
from selsft.evaluation.settings import METRICS
from selsft.recipes import find_recipe
from tests.support import recipe, tiny

CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": [" alpha beta", " gamma"],
          "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}  # fmt: skip
TASKS = {
    **dict.fromkeys(("truthfulqa_mc1", "truthfulqa_mc2", "boolq", "logiqa"), CHOICE),
    # as some published tasks do, this one would sample
    "tydiqa_goldp_en": {
        "tag": "tydiqa_goldp", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": " beta",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": True, "temperature": 1.0},
        "metric_list": [{"metric": "exact_match"}],
    },
    "asdiv": {"output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": " beta",
              "metric_list": [{"metric": "acc"}]},
}  # fmt: skip
ARMS = ("base", "reference", "plain", "ignore", "forget", "published")
TINY = {
    "model_name_or_path": "model", "dataset_name": "rows.jsonl", "dtype": "float32",
    "use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "dataloader_pin_memory": "false",
    "max_steps": 2, "warmup_steps": 0, "gradient_accumulation_steps": 1, "learning_rate": 0.01, "max_length": 32,
    "seeds": 2, "go_on": "true", "evaluate.lm_eval_include": "tasks",
    "split.eval_size": 5, "split.reference_size": 0.3,
}  # fmt: skip


@pytest.fixture
def five(folder, monkeypatch):
    """The working directory with a model, rows and the tasks."""
    pytest.importorskip("lm_eval")
    Path("tasks").mkdir()
    with Path("questions.jsonl").open("w") as file:
        for i in range(6):
            file.write(json.dumps({"q": tiny.sentence(i, 3), "gold": i % 2}) + "\n")
    where = {"dataset_path": "json", "test_split": "test",
             "dataset_kwargs": {"data_files": {"test": str(Path("questions.jsonl").absolute())}}}  # fmt: skip
    for name, settings in TASKS.items():
        Path("tasks", f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **where, **settings}))
    return [part for key, value in TINY.items() for part in (f"--{key}", str(value))]


def test_the_published_arm_is_the_preset():
    shipped = yaml.safe_load(find_recipe("five-benchmarks", "").read_text())
    assert shipped["arms"]["published"] == {"like": "forget", **PAPER_2508_04329}
    assert shipped["arms"]["forget"] is None and not set(PAPER_2508_04329) & set(shipped), "the defaults of selsft"


@pytest.mark.slow
def test_all_arms_on_all_tasks(five, capsys):
    assert main(["run", "five-benchmarks", *five, "--output_dir", "five", "--dry_run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "lm-evaluation-harness, for each model: 36 documents" in said and "at most 18 written" in said
    recipe.plan(*five, root="five", source="five-benchmarks").execute(five)
    found = json.loads(Path("five/report.json").read_text())["harness"]
    assert sorted(found) == sorted(TASKS)
    for task, models in found.items():
        measure = "exact_match" if task.startswith("tydi") else "acc"
        assert set(models) == set(ARMS)
        for name, values in models.items():
            assert values[f"{measure}_low"] <= values[measure] <= values[f"{measure}_high"]
            if name != "plain":
                apart = values[measure] - models["plain"][measure]
                assert values[f"{measure}_minus_plain"] == pytest.approx(apart, abs=1e-9)


def test_requests_are_counted(five):
    tokenizer = tiny.tokenizer()
    found = count_requests(tokenizer, ["asdiv", "tydiqa_goldp"], 4, "tasks")
    prompts = [len(tokenizer(tiny.sentence(i, 3))["input_ids"]) for i in range(4)]
    wholes = [len(tokenizer(tiny.sentence(i, 3) + " beta")["input_ids"]) for i in range(4)]
    assert (found.documents, found.read, found.written) == (8, sum(prompts) + sum(wholes), 12)


def test_answers_are_greedy(five, capsys):
    def answers(seed):
        flags = ["--model_name_or_path", "model", "--lm_eval_tasks", "tydiqa_goldp", "--lm_eval_include", "tasks"]
        flags += ["--use_cpu", "true", "--bf16", "false", "--seed", str(seed), "--evaluation_dir", f"out-{seed}"]
        assert main(["evaluate", *flags]) == 0
        return pq.read_table(f"out-{seed}/{DOCUMENTS}").to_pylist()

    assert answers(1) == answers(2) and "tydiqa_goldp_en" in Path("out-1", METRICS).read_text()


def test_differences_are_paired_over_documents_and_seeds(tmp_path):
    """Of two noisy models one is better by .1 on every document: the difference is known far better than each mean."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    for name, shift, seeds in (("base", 0.0, 1), ("plain", 0.0, 2), ("ours", 0.1, 2)):
        for seed in range(seeds):
            folder = tmp_path / name / str(seed)
            folder.mkdir(parents=True)
            value = noise + shift + 0.01 * rng.normal(size=200)
            table = pd.DataFrame({"task": "asdiv", "document": range(200), "measure": "acc", "value": value})
            pq.write_table(pa.Table.from_pandas(table), folder / DOCUMENTS)
            (folder / METRICS).write_text(json.dumps({"lm_eval": {"asdiv": {"acc": value.mean(), "acc_stderr": 0.1}}}))
    models = {name: sorted((tmp_path / name).iterdir()) for name in ("base", "plain", "ours")}
    found = compare_harness(models, "plain")["asdiv"]
    ours = found["ours"]
    assert ours["acc_minus_plain"] == pytest.approx(0.1, abs=0.01) and "acc_minus_plain" not in found["plain"]
    assert 0.05 < ours["acc_minus_plain_low"] < 0.1 < ours["acc_minus_plain_high"] < 0.15
    assert ours["acc_high"] - ours["acc_low"] > 5 * (ours["acc_minus_plain_high"] - ours["acc_minus_plain_low"])
    assert found["base"]["acc_minus_plain_low"] < 0 < found["base"]["acc_minus_plain_high"]
    assert "acc_stderr" not in ours
