"""`selsft score` over shards: in order, alone or with other processes, and after something has changed."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

import selsft.scoring.frozen
from selsft.cli import main
from selsft.data.scored_folder import load_scores, read_manifest
from selsft.records import write_sealed
from tests.cli.test_train import CPU, models, one_line, same, to_flags, weights
from tests.support import tiny
from tests.support.oracle import plain_logps

__all__ = ["models"]  # a fixture


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """`selsft score` in a folder of its own; `run.calls` counts the forward passes of the last command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    tiny.prompt_data(60).to_json("data.jsonl")
    calls = []

    def counted(model, inputs, original=selsft.scoring.frozen.forward_logps):
        calls.append(len(inputs["input_ids"]))
        return original(model, inputs)

    monkeypatch.setattr(selsft.scoring.frozen, "forward_logps", counted)

    def run(command="score", **flags):
        calls.clear()
        common = {
            "scoring_batch_size": 64,
            "shard_tokens": 100,
            "scored_dir": "scored",
            "reference_model": models / "reference",
        }
        settings = {"dataset_name": "data.jsonl", **CPU, "model_name_or_path": models / "model"}
        merged = {**settings, **(common if command == "score" else {}), **flags}
        return main([command, *to_flags({key: value for key, value in merged.items() if value is not None})])

    run.calls = calls
    return run


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("shard-*.parquet"))}


def test_parts_hold_the_rows_in_order(run, models):
    assert run() == 0
    manifest, scored = read_manifest("scored"), load_scores("scored")
    assert len(manifest["shards"]) > 5 and manifest["finished"]
    assert sum(shard["rows"] for shard in manifest["shards"]) == manifest["rows"] == len(scored) == 60
    assert manifest["tokens"] == sum(len(row) for row in scored["input_ids"])
    assert {"model_sha256", "reference_sha256", "tokenizer_sha256", "dtype", "max_length", "shard_tokens"} <= set(
        manifest["identity"]
    )
    assert {"selsft", "torch", "transformers", "trl", "peft"} <= set(manifest["versions"])
    tok, base, ref = tiny.tokenizer(), tiny.llama(), tiny.llama(seed=1)
    for index in (0, 17, 59):
        row, source = scored[index], tiny.prompt_data(60)[index]
        assert row["input_ids"] == tok(source["prompt"] + source["completion"] + "<eos>")["input_ids"]
        for column, model in (("base_logps", base), ("ref_logps", ref)):
            expected = np.where(np.array(row["labels"]) == -100, 0, plain_logps(model, row["input_ids"]))
            np.testing.assert_allclose(row[column], expected, atol=2e-5)


def test_a_finished_folder_is_not_scored_again(run, capsys):
    assert run() == 0
    before, printed = shards("scored"), capsys.readouterr().out
    assert run() == 0
    assert not run.calls and shards("scored") == before
    assert capsys.readouterr().out.splitlines()[:5] == printed.splitlines()[:5]


@pytest.mark.parametrize(
    "budget", [{"scoring_batch_tokens": 40, "scoring_batch_size": None}, {"scoring_batch_size": 1}]
)
def test_batches_change_no_score(run, budget):
    assert run() == 0
    assert run(scored_dir="other", **budget) == 0
    for name in ("base_logps", "ref_logps"):
        first, second = (np.concatenate(load_scores(folder)[name][:]) for folder in ("scored", "other"))
        np.testing.assert_allclose(first, second, atol=2e-6)


@pytest.mark.parametrize("missing", [[0], [3, 4], [7]])
def test_streamed_rows_give_the_same_bytes_and_go_on(run, missing):
    assert run() == 0
    whole = shards("scored")
    assert run(scored_dir="streamed", dataset_streaming=True) == 0
    assert shards("streamed") == whole
    for index in missing:
        os.remove(f"streamed/shard-{index:05d}.parquet")
    assert run(scored_dir="streamed", dataset_streaming=True) == 0
    assert len(run.calls) == 2 * len(missing)
    assert shards("streamed") == whole


def test_training_takes_the_folder_and_refuses_an_unfinished_one(run, models, capsys):
    selection = {
        "negative_threshold": 0.05,
        "score_base_weight": 1.0,
        "score_pooling": "token",
        "forget_schedule": "constant",
    }
    assert run() == 0
    assert run("train", dataset_name="scored", output_dir="a", **selection) == 0
    assert run("train", output_dir="b", reference_model=models / "reference", **selection) == 0
    # Shards of 100 tokens have other batches than the trainer's shards, so scores agree to rounding
    assert same(weights("a"), weights("b"), tolerance=1e-5)
    saved = load_scores("scored")
    saved.save_to_disk("old")  # what `selsft score` wrote before
    assert run("train", dataset_name="old", output_dir="c", **selection) == 0
    assert same(weights("a"), weights("c"))
    manifest = read_manifest("scored")
    write_sealed(Path("scored/selsft_scores.json"), manifest | {"finished": False})
    capsys.readouterr()
    assert run("train", dataset_name="scored", output_dir="d") == 2
    one_line(capsys, "'scored' holds scores that are not finished", "run the same `selsft score` command again")


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_part_is_refused_and_computed_again(run, capsys, damage):
    assert run() == 0
    whole = shards("scored")
    path = Path("scored/shard-00002.parquet")
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        content = bytearray(path.read_bytes())
        content[60] ^= 1
        path.write_bytes(bytes(content))
    capsys.readouterr()
    assert run("train", dataset_name="scored", output_dir="a") == 2
    one_line(capsys, "shard-00002.parquet' is " + ("missing" if damage == "missing" else "damaged"), "computes this")
    if damage == "flipped":  # the footer is whole, so only reading it shows the damage
        assert run() == 2
        one_line(capsys, "shard-00002.parquet' is damaged", "remove it")
        path.unlink()
    assert run() == 0
    assert len(run.calls) == 2 and shards("scored") == whole


def test_a_shard_of_another_run_is_refused(run, models, capsys):
    """The same rows, another reference: only the identity in the shard tells."""
    assert run() == 0
    change("reference", models)
    assert run(reference_model="reference", scored_dir="other") == 0
    shutil.copy("other/shard-00002.parquet", "scored/shard-00002.parquet")
    capsys.readouterr()
    assert run() == 2
    one_line(capsys, "shard-00002.parquet was made by another run than the other shards", "--rescore true")
    # The manifest of a finished folder knows the file; a manifest that was edited to fit knows the identity
    assert run("train", dataset_name="scored", output_dir="a") == 2
    one_line(capsys, "shard-00002.parquet' is damaged")
    manifest = read_manifest("scored")
    manifest["shards"][2] = read_manifest("other")["shards"][2]
    write_sealed(Path("scored/selsft_scores.json"), manifest)
    assert run("train", dataset_name="scored", output_dir="a") == 2
    one_line(capsys, "shard-00002.parquet' was made by another run than the manifest")


# ---------------------------------------------------------------- something has changed


def other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-2]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def change(what: str, models: Path) -> dict:
    """Flags that give the same command with something else behind it."""
    if what in ("model", "reference", "tokenizer"):
        shutil.copytree(models / ("reference" if what == "reference" else "model"), what)
        if what == "tokenizer":
            other_tokenizer(Path(what))
            shutil.copytree(models / "reference", "reference-2")
            other_tokenizer(Path("reference-2"))
            return {"model_name_or_path": what, "reference_model": "reference-2"}
        made = tiny.llama(seed=0 if what == "model" else 1)
        with torch.no_grad():
            made.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
        made.save_pretrained(what)
        return {"model_name_or_path" if what == "model" else "reference_model": what}
    if what in ("data", "labels", "fewer rows", "more rows"):
        rows = list(tiny.prompt_data(62 if what == "more rows" else 60))
        if what == "data":
            rows[31]["completion"] = " alpha beta"
        elif what == "labels":
            rows[31] = {"prompt": rows[31]["prompt"] + " alpha", "completion": rows[31]["completion"]}
        Dataset.from_list(rows[:40] if what == "fewer rows" else rows).to_json("data.jsonl")
        return {}
    return {
        "dtype": {"dtype": "bfloat16"},
        "mixed precision": {"bf16": True},
        "truncation": {"max_length": 9},
        "completion only": {"completion_only_loss": False},
        "shard size": {"shard_tokens": 90},
    }[what]


CHANGES = {
    "model": "another model (sha256 ",
    "reference": "another reference (sha256 ",
    "tokenizer": "another tokenizer (sha256 ",
    "dtype": "dtype='float32', this run has dtype='bfloat16'",
    "mixed precision": "mixed_precision='no', this run has mixed_precision='bf16'",
    "truncation": "max_length=32, this run has max_length=9",
    "completion only": "completion_only_loss=None, this run has completion_only_loss=False",
    "shard size": "shard_tokens=100, this run has shard_tokens=90",
    "data": "the data has changed: scored/shard-0000",
    "labels": "the data has changed: scored/shard-0000",
    "fewer rows": "the data has changed: ",
    "more rows": "the data has changed: scored/shard-0000",
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_refused_and_named(run, models, capsys, what):
    assert run() == 0
    before = shards("scored")
    Path("scored/shard-00001.parquet").unlink()  # there is something to resume
    flags = change(what, models)
    capsys.readouterr()
    assert run(**flags) == 2
    line = one_line(capsys, "selsft score: error: ", CHANGES[what], "--rescore true")
    if what == "dtype":
        assert "sha256" not in line
    kept = shards("scored")
    assert all(kept[name] == before[name] for name in kept) and len(kept) >= len(before) - 1
    if what not in ("fewer rows", "more rows"):
        assert not run.calls
    assert run(**flags, rescore=True) == 0
    assert run(**flags, scored_dir="fresh") == 0
    assert shards("scored") == shards("fresh")


def test_data_that_ends_between_two_parts_is_refused(run, capsys):
    """Every shard that is still asked for is right, and some are left over."""
    assert run() == 0
    rows = read_manifest("scored")["shards"][3]["first_row"]
    tiny.prompt_data(60).select(range(rows)).to_json("data.jsonl")
    capsys.readouterr()
    assert run() == 2
    one_line(capsys, "the data has changed: it ends before scored/shard-00003.parquet", "--rescore true")


def test_changed_streamed_data_is_refused(run, capsys):
    assert run(dataset_streaming=True) == 0
    change("data", Path())
    capsys.readouterr()
    assert run(dataset_streaming=True) == 2
    one_line(capsys, "the data has changed: scored/shard-0000")
    assert not run.calls


def test_a_foreign_folder_is_not_touched(run, capsys):
    os.mkdir("scored")
    Path("scored/thesis.txt").write_text("keep")
    assert run() == 2 and run(rescore=True) == 2
    assert os.listdir("scored") == ["thesis.txt"]


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "score"),
    [(kind, score) for kind in ("ddp", "fsdp_shipped") for score in ("influence", "probe")] + [("zero3", "probe")],
)
def test_two_processes_write_what_one_writes(models, tmp_path, monkeypatch, kind, score):
    """Shards in turn without sharding (the same bytes), together with FSDP2, where only the main process has loaded
    weights, and ZeRO-3 (equal to rounding). A probe is fitted in one of them and applied in all."""
    from tests.support import commands
    from tests.training.test_distributed import KINDS, interpreter

    if (python := interpreter(kind)) is None:
        pytest.skip("DeepSpeed is not installed: `make test` does that")
    commands.workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = commands.COMMANDS["score" if score == "influence" else "score with a probe"]
    assert commands.run(argv, tmp_path).status == 0
    Path("out").rename("one")
    root = Path(__file__).parents[2]
    Path("launched.py").write_text(
        "import sys; from tests.support.worker import prepare_process; prepare_process(sys.argv[1]);"
        "from selsft.cli import main; sys.exit(main(sys.argv[2:]))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{root}:{root / 'kernels'}"
    if kind.startswith("zero"):  # DeepSpeed's accelerator is the CPU
        argv = [*argv, "--use_cpu", "False"]
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [
        str(python), "-m", "accelerate.commands.launch", *KINDS[kind],
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", "launched.py", kind, *argv,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_scores("one"), load_scores("out")
    assert read_manifest("out")["identity"] == read_manifest("one")["identity"]
    assert one.column_names == two.column_names and two["input_ids"][:] == one["input_ids"][:]
    if kind == "ddp":
        assert shards("out") == shards("one")
        assert read_manifest("out") == read_manifest("one")
    for name in set(one.column_names) - {"input_ids", "labels"}:
        np.testing.assert_allclose(np.concatenate(two[name][:]), np.concatenate(one[name][:]), atol=2e-6)
    if score == "probe":
        found, wanted = (json.loads((Path(folder) / "judged.json").read_text()) for folder in ("out", "one"))
        for level, numbers in wanted["judged"]["probe"].items():
            assert found["judged"]["probe"][level]["auc"] == pytest.approx(numbers["auc"], abs=1e-4)
