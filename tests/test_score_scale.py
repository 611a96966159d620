"""Scoring data larger than memory: budgets, shards, parts that survive a kill, imports, and refusals."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

import selsft.cache
import selsft.pair
from selsft import DataCollatorForSelectiveSFT, SelectiveSFTConfig
from selsft.batching import BatchBudget, shards
from selsft.cli import main, score
from selsft.cli.arguments import CommandParser
from selsft.cli.summary import QUANTILES, ScoreHistogram, summarize
from selsft.pair import ModelPair
from selsft.scored_folder import ScoredFolder, load_scored, read_manifest
from selsft.scoring import ROW_COLUMNS, score_block

from . import tiny
from .oracle import plain_logps
from .test_cli import CPU, models, one_line, same, to_flags, weights

__all__ = ["models"]  # a fixture


# ---------------------------------------------------------------- batches and shards


lengths_of_rows = st.lists(st.integers(0, 40), max_size=60)


@settings(max_examples=80, deadline=None)
@given(lengths_of_rows, st.integers(1, 200), st.booleans())
def test_a_batch_keeps_the_budget(lengths, tokens, padding_free):
    lengths = np.array(lengths, np.int64)
    batches = BatchBudget(tokens, padding_free=padding_free).batches(lengths)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        longest, total = lengths[batch].max(), lengths[batch].sum()
        assert len(batch) == 1 or (total if padding_free else longest * len(batch)) <= tokens
    order = [lengths[batch].max() for batch in batches]
    assert order == sorted(order, reverse=True)


def test_batches_are_full_and_hardly_padded():
    lengths = np.exp(np.random.default_rng(0).normal(5, 1, 20_000)).astype(np.int64).clip(4, 2048)
    batches = BatchBudget(8192).batches(lengths)
    computed = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert computed < 1.01 * lengths.sum()  # a plain loop over batches of 8 rows pads to 2.2 times as much
    assert len(batches) < 1.05 * computed / 8192
    rows = BatchBudget(8192, rows=7).batches(lengths)
    assert {len(batch) for batch in rows[:-1]} == {7}


def test_the_budget_follows_the_settings():
    args = SelectiveSFTConfig("out", use_cpu=True, bf16=False, per_device_eval_batch_size=4, max_length=256)
    flash = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    sdpa = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    assert BatchBudget.of(args, sdpa) == BatchBudget(1024)
    assert BatchBudget.of(args, flash, flash) == BatchBudget(1024, padding_free=True)
    assert not BatchBudget.of(args, flash, sdpa).padding_free
    args.scoring_batch_tokens = 500
    assert BatchBudget.of(args).tokens == 500
    args.scoring_batch_size = 3
    assert BatchBudget.of(args).rows == 3
    with pytest.raises(ValueError, match="scoring_batch_tokens=0 must be at least 1"):
        SelectiveSFTConfig("out", use_cpu=True, bf16=False, scoring_batch_tokens=0)


def numbered(lengths: list[int]) -> dict[str, list]:
    """Rows in which every token is a number of its own."""
    ends = np.cumsum(lengths)
    ids = [list(range(int(end) - length, int(end))) for end, length in zip(ends, lengths, strict=True)]
    return {"input_ids": ids, "labels": [[-token for token in row] for row in ids]}


@settings(max_examples=60, deadline=None)
@given(lengths_of_rows.filter(len), st.integers(1, 120))
def test_shards_are_the_rows_in_order_also_when_streamed(lengths, tokens):
    data = numbered(lengths)
    mapped = list(shards(Dataset.from_dict(data), ROW_COLUMNS, tokens))
    rows = [{name: data[name][i] for name in data} for i in range(len(lengths))]
    streamed = list(shards(IterableDataset.from_generator(lambda: iter(rows)), ROW_COLUMNS, tokens))
    for found in (mapped, streamed):
        assert np.concatenate([block.lengths for block in found]).tolist() == lengths
        assert np.concatenate([block.columns["input_ids"] for block in found]).tolist() == list(range(sum(lengths)))
        assert np.concatenate([block.columns["labels"] for block in found]).tolist() == [
            -token for token in range(sum(lengths))
        ]
        assert all(block.size <= tokens or len(block.lengths) == 1 for block in found)
        for block, following in itertools.pairwise(found):
            assert following.first_row == block.first_row + len(block.lengths)
            assert block.size + following.lengths[0] > tokens  # as full as can be
    assert [block.first_row for block in mapped] == [block.first_row for block in streamed]


@pytest.mark.parametrize("documents", [False, True])
def test_shards_of_packed_rows(documents):
    inner = [[3, 2], [4], [1, 1, 5], [2, 6]]
    data = numbered([sum(row) for row in inner]) | {"seq_lengths": inner}
    rows = [{name: data[name][i] for name in data} for i in range(4)]
    for source in (Dataset.from_dict(data), IterableDataset.from_generator(lambda: iter(rows))):
        found = list(shards(source, ROW_COLUMNS, 9, documents=documents))
        lengths = [block.lengths.tolist() for block in found]
        if documents:
            assert lengths == [[3, 2, 4], [1, 1, 5, 2], [6]] and all(block.documents is None for block in found)
            assert [block.first_row for block in found] == [0, 3, 7]
        else:
            assert lengths == [[5, 4], [7], [8]]
            assert [block.documents.tolist() for block in found] == [[3, 2, 4], [1, 1, 5], [2, 6]]


def test_streamed_rows_are_not_gathered():
    """Never more in memory than a shard and what is read ahead."""
    read = []

    def rows():
        for index in range(20_000):
            read.append(index)
            yield {"input_ids": [index] * 5, "labels": [index] * 5}

    done = 0
    for block in shards(IterableDataset.from_generator(rows), ROW_COLUMNS, tokens=5_000):
        assert block.first_row == done and block.columns["input_ids"][0] == done
        done += len(block.lengths)
        assert len(read) - done <= 1_000 + 512
    assert done == 20_000


def test_rows_without_a_label_never_meet_the_model():
    data = numbered([5, 6, 7])
    data["labels"][1] = [-100] * 6
    data["labels"][2] = [3] + [-100] * 6  # the first token is predicted by nothing
    (block,) = shards(Dataset.from_dict(data), ROW_COLUMNS)
    seen = []

    def forward(inputs):
        seen.append(inputs["input_ids"].tolist())
        return [torch.full(inputs["input_ids"].shape, -1.0)]

    accelerator = SimpleNamespace(device=torch.device("cpu"))
    (flat,) = score_block(block, forward, DataCollatorForSelectiveSFT(pad_token_id=0), accelerator, BatchBudget(99))
    assert seen == [[data["input_ids"][0]]]
    assert flat.tolist() == [-1.0] * 5 + [0.0] * 13


# ---------------------------------------------------------------- one forward pass or two


LORA = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def adapted(seed: int, **changes) -> PeftModel:
    model = tiny.llama(tie_word_embeddings=False)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{**LORA, **changes}))


def pair(policy, source, options, **changes) -> ModelPair:
    from accelerate import Accelerator

    args = SelectiveSFTConfig(**{**options, "scoring_batch_tokens": 60})
    collator = DataCollatorForSelectiveSFT(pad_token_id=0)
    return ModelPair(
        policy, source, tiny.tokenizer(), args, Accelerator(cpu=True), collator, lambda model: model, **changes
    )


def plain_pass(model, block) -> np.ndarray:
    """Every row alone through the model's ordinary logits, in the dtype of the model."""
    parts, start = [], 0
    for length in block.lengths:
        ids = torch.from_numpy(block.columns["input_ids"][start : start + length].astype(np.int64))
        labels = block.columns["labels"][start : start + length]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        logps = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0].numpy()
        parts.append(np.where(labels == -100, 0, np.concatenate([[0], logps])))
        start += length
    return np.concatenate(parts)


PAIRS = {
    "reference is an adapter, policy is plain": (lambda: tiny.llama(tie_word_embeddings=False), "adapter", True),
    "reference is an adapter, policy is a fresh one": (lambda: adapted(1, init_lora_weights=True), "adapter", True),
    "both are trained adapters": (lambda: adapted(1), "adapter", True),
    "reference is the base": (lambda: adapted(1), "base", True),
    "reference is a model": (lambda: tiny.llama(tie_word_embeddings=False), "model", "not adapters of one model"),
    "dora": (lambda: adapted(1, use_dora=True), "adapter", "has use_dora"),
    "embeddings saved": (lambda: adapted(1, modules_to_save=["embed_tokens"]), "base", "has modules_to_save"),
    "adapter on the head": (lambda: adapted(1, target_modules=["q_proj", "lm_head"]), "base", "the head has"),
    "prompt learning": (
        lambda: get_peft_model(
            tiny.llama(tie_word_embeddings=False), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        ),
        "model",
        "not adapters of one model",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_one_pass_gives_what_two_give(case, options, tmp_path, caplog):
    """And both lie within the models' own error: that of plain float32 logits against float64."""
    make, source, mixes = PAIRS[case]
    adapted(2).save_pretrained(tmp_path / "adapter")
    tiny.llama(seed=9, tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    policy = make()
    (block,) = shards(tiny.tokenised_data(16), ROW_COLUMNS)
    found = {}
    for mixed in (False, True):
        models = pair(make(), source if source == "base" else str(tmp_path / source), options, mixed=mixed)
        with mock.patch.object(models, "_both", wraps=models._both) as both, models.ready() as run:
            found[mixed] = run(block)
        assert both.called == (mixed and mixes is True)
    if mixes is not True:
        assert "two forward passes: " in caplog.text and mixes in caplog.text
    at_base = isinstance(policy, PeftModel) and ("fresh" in case or case == "prompt learning")
    sides = {"base_logps": policy.get_base_model() if case == "prompt learning" else policy}
    if at_base and case != "prompt learning":
        sides["base_logps"] = tiny.llama(tie_word_embeddings=False)
    if source == "adapter":
        sides["ref_logps"] = PeftModel.from_pretrained(
            tiny.llama(tie_word_embeddings=False), str(tmp_path / "adapter")
        ).eval()
    elif source == "model":
        sides["ref_logps"] = tiny.llama(seed=9, tie_word_embeddings=False)
    else:
        sides["ref_logps"] = tiny.llama(tie_word_embeddings=False)
    for side, model in sides.items():
        model.eval()
        plain = plain_pass(model, block)
        exact = plain_pass(model.double(), block)
        own_error = np.abs(plain - exact).max()
        assert 0 < own_error < 1e-5
        for mixed in (False, True):
            assert np.abs(found[mixed][side] - exact).max() <= 2 * own_error, (side, mixed)
    assert np.abs(found[True]["base_logps"] - found[True]["ref_logps"]).max() > 0.01


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """`selsft score` in a folder of its own; `run.calls` counts the forward passes of the last command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    tiny.prompt_data(60).to_json("data.jsonl")
    calls = []

    def counted(model, inputs, original=selsft.pair.forward_logps):
        calls.append(len(inputs["input_ids"]))
        return original(model, inputs)

    monkeypatch.setattr(selsft.pair, "forward_logps", counted)

    def run(command="score", **flags):
        calls.clear()
        common = {"shard_tokens": 100, "scored_dir": "scored", "reference_model": models / "reference"}
        settings = {"dataset_name": "data.jsonl", **CPU, "model_name_or_path": models / "model"}
        merged = {**settings, **(common if command == "score" else {}), **flags}
        return main([command, *to_flags({key: value for key, value in merged.items() if value is not None})])

    run.calls = calls
    return run


def parts(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("part-*.parquet"))}


def test_parts_hold_the_rows_in_order(run, models):
    assert run() == 0
    manifest, scored = read_manifest("scored"), load_scored("scored")
    assert len(manifest["parts"]) > 5 and manifest["finished"]
    assert sum(part["rows"] for part in manifest["parts"]) == manifest["rows"] == len(scored) == 60
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
    before, printed = parts("scored"), capsys.readouterr().out
    assert run() == 0
    assert not run.calls and parts("scored") == before
    assert capsys.readouterr().out.splitlines()[:5] == printed.splitlines()[:5]


@pytest.mark.parametrize("budget", [{"scoring_batch_tokens": 40}, {"scoring_batch_size": 1}])
def test_batches_change_no_score(run, budget):
    assert run() == 0
    assert run(scored_dir="other", **budget) == 0
    for name in ("base_logps", "ref_logps"):
        first, second = (np.concatenate(load_scored(folder)[name][:]) for folder in ("scored", "other"))
        np.testing.assert_allclose(first, second, atol=2e-6)


@pytest.mark.parametrize("missing", [[0], [3, 4], [7]])
def test_streamed_rows_give_the_same_bytes_and_go_on(run, missing):
    assert run() == 0
    whole = parts("scored")
    assert run(scored_dir="streamed", dataset_streaming=True) == 0
    assert parts("streamed") == whole
    for index in missing:
        os.remove(f"streamed/part-{index:05d}.parquet")
    assert run(scored_dir="streamed", dataset_streaming=True) == 0
    assert len(run.calls) == 2 * len(missing)
    assert parts("streamed") == whole


def test_training_takes_the_folder_and_refuses_an_unfinished_one(run, models, capsys):
    selection = {"negative_threshold": 0.05, "forget_schedule": "constant"}
    assert run() == 0
    assert run("train", dataset_name="scored", output_dir="a", **selection) == 0
    assert run("train", output_dir="b", reference_model=models / "reference", **selection) == 0
    # Parts of 100 tokens have other batches than the trainer's shards, so scores agree to rounding
    assert same(weights("a"), weights("b"), tolerance=1e-5)
    saved = load_scored("scored")
    saved.save_to_disk("old")  # what `selsft score` wrote before
    assert run("train", dataset_name="old", output_dir="c", **selection) == 0
    assert same(weights("a"), weights("c"))
    manifest = read_manifest("scored")
    Path("scored/selsft_scores.json").write_text(json.dumps(manifest | {"finished": False}))
    capsys.readouterr()
    assert run("train", dataset_name="scored", output_dir="d") == 2
    one_line(capsys, "'scored' holds scores that are not finished", "run the same `selsft score` command again")


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_part_is_refused_and_computed_again(run, capsys, damage):
    assert run() == 0
    whole = parts("scored")
    path = Path("scored/part-00002.parquet")
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
    one_line(capsys, "part-00002.parquet' is " + ("missing" if damage == "missing" else "damaged"), "computes this")
    if damage == "flipped":  # the footer is whole, so only reading it shows the damage
        assert run() == 2
        one_line(capsys, "part-00002.parquet' is damaged", "remove it")
        path.unlink()
    assert run() == 0
    assert len(run.calls) == 2 and parts("scored") == whole


# ---------------------------------------------------------------- killed


class Job:
    """One `selsft score`, prepared once; every `start` forks a process that scores, counting its forward passes."""

    def __init__(self, models, log: Path):
        self.log = log
        flags = {**CPU, "model_name_or_path": models / "model", "dataset_name": "data.jsonl", "shard_tokens": 40}
        flags |= {"reference_model": models / "reference", "output_dir": "unused", "show_tokens": 0}
        self.arguments = CommandParser("score", "", "", score.ScoreArguments).parse(to_flags(flags))
        self.trainer, self.pair, _ = score._prepare(self.arguments, Path("unused"))
        original = selsft.pair.forward_logps

        def logged(model, inputs):
            with self.log.open("ab", buffering=0) as handle:
                handle.write(b".")
            return original(model, inputs)

        self.forward = logged
        self.identity = score._identity(self.arguments, self.trainer, self.pair, {})

    def work(self, folder: str) -> None:
        selsft.pair.forward_logps = self.forward
        store = ScoredFolder(folder, self.identity)
        store.open({"versions": {}})
        store.finish(score.score_parts(self.arguments, self.trainer, self.pair, {}, store))

    def start(self, folder: str, before=lambda: None) -> int:
        process = os.fork()
        if not process:
            try:
                before()
                self.work(folder)
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
        return process

    def run(self, folder: str, kill_after: float | None = None, before=lambda: None) -> str:
        """`"killed"` or `"done"`."""
        process, start = self.start(folder, before), time.perf_counter()
        while True:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
                return "killed" if os.WIFSIGNALED(status) else "done"
            elapsed = time.perf_counter() - start
            if elapsed > (60 if kill_after is None else kill_after):
                os.kill(process, signal.SIGKILL)
            time.sleep(0.0005)

    def forwards(self) -> int:
        count = self.log.stat().st_size if self.log.exists() else 0
        self.log.unlink(missing_ok=True)
        return count


@pytest.fixture
def job(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.prompt_data(150).to_json("data.jsonl")
    return Job(models, tmp_path / "forwards")


def test_killed_at_random_moments_it_ends_in_the_same_bytes(job):
    start = time.perf_counter()
    assert job.run("peace") == "done"
    seconds, passes, whole = time.perf_counter() - start, job.forwards(), parts("peace")
    assert len(whole) > 50 and passes == 2 * len(whole)  # a batch per part, for each of two models
    rng, kills, rounds, later = random.Random(0), 0, 0, 0
    while kills < 24:
        rounds += 1
        folder, lost, had = f"trouble-{rounds}", 0, 0
        while job.run(folder, kill_after=rng.uniform(0, seconds / 4)) == "killed":
            kills, lost = kills + 1, lost + 1
            there = len(parts(folder)) if Path(folder).is_dir() else 0
            assert there >= had  # what was finished stays
            later, had = later + (there > had), there
        assert parts(folder) == whole
        assert read_manifest(folder) == read_manifest("peace")
        assert not list(Path(folder).glob(".part-*"))
        assert passes <= job.forwards() <= passes + 2 * lost  # a kill costs the part at work and no other
        shutil.rmtree(folder)
    assert later >= 12  # the kills came in the middle of the work, not before it


@pytest.mark.parametrize("moment", ["half written", "before the rename", "after the rename", "manifest"])
@pytest.mark.parametrize("part", [0, 3])
def test_killed_at_the_worst_moments(job, moment, part):
    assert job.run("peace") == "done"
    passes = job.forwards()

    def die_at_the_moment():
        rename, write = os.replace, pq.write_table

        def replace(source, target):
            wanted = f"part-{part:05d}" if moment != "manifest" else ("selsft_scores" if part == 0 else "never")
            if moment in ("before the rename", "manifest") and wanted in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if moment == "after the rename" and wanted in str(target):
                os.kill(os.getpid(), signal.SIGKILL)

        def write_table(table, handle, **options):
            write(table, handle, **options)
            if moment == "half written" and json.loads(table.schema.metadata[b"selsft"])["index"] == part:
                handle.truncate(200)
                os.kill(os.getpid(), signal.SIGKILL)

        selsft.cache.os.replace, pq.write_table = replace, write_table

    if moment == "manifest" and part:
        pytest.skip("the manifest belongs to no part")
    assert job.run("trouble", before=die_at_the_moment) == "killed"
    there = len(parts("trouble"))
    assert there == (0 if moment == "manifest" else part + (moment == "after the rename"))
    assert job.run("trouble") == "done"
    assert parts("trouble") == parts("peace") and not list(Path("trouble").glob(".*"))
    expected = passes if moment in ("after the rename", "manifest") else passes + 2
    assert job.forwards() == expected


def test_an_interrupted_run_says_how_to_go_on(run, capsys, monkeypatch):
    forward, calls = selsft.pair.forward_logps, []

    def interrupted(model, inputs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(selsft.pair, "forward_logps", interrupted)
        capsys.readouterr()
        assert run() == 130
    assert "Finished parts are kept in scored: the same command goes on" in capsys.readouterr().err
    assert len(parts("scored")) == 3
    assert run() == 0 and run(scored_dir="peace") == 0
    assert parts("scored") == parts("peace")


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
    "data": "the data has changed: scored/part-0000",
    "labels": "the data has changed: scored/part-0000",
    "fewer rows": "the data has changed: ",
    "more rows": "the data has changed: scored/part-0000",
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_refused_and_named(run, models, capsys, what):
    assert run() == 0
    before = parts("scored")
    Path("scored/part-00001.parquet").unlink()  # there is something to go on with
    flags = change(what, models)
    capsys.readouterr()
    assert run(**flags) == 2
    line = one_line(capsys, "selsft score: error: ", CHANGES[what], "--rescore true")
    if what == "dtype":
        assert "sha256" not in line
    kept = parts("scored")
    assert all(kept[name] == before[name] for name in kept) and len(kept) >= len(before) - 1
    if what not in ("fewer rows", "more rows"):
        assert not run.calls
    assert run(**flags, rescore=True) == 0
    assert run(**flags, scored_dir="fresh") == 0
    assert parts("scored") == parts("fresh")


def test_changed_streamed_data_is_refused(run, capsys):
    assert run(dataset_streaming=True) == 0
    change("data", Path())
    capsys.readouterr()
    assert run(dataset_streaming=True) == 2
    one_line(capsys, "the data has changed: scored/part-0000")
    assert not run.calls


def test_a_foreign_folder_is_left_alone(run, capsys):
    os.mkdir("scored")
    Path("scored/thesis.txt").write_text("keep")
    assert run() == 2 and run(rescore=True) == 2
    assert os.listdir("scored") == ["thesis.txt"]


# ---------------------------------------------------------------- scores from elsewhere


def served(side="ref_logps", column="logps", change=lambda rows: None, metadata=None, path="server.parquet", groups=7):
    """What an inference server may have written, from a finished folder."""
    scored = load_scored("scored")
    rows = {"input_ids": scored["input_ids"][:], column: scored[side][:]}
    for values in rows[column]:
        values[0] = None  # servers have nothing to say about the first token
    change(rows)
    table = pa.table({name: pa.array(values) for name, values in rows.items()})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=groups)


@pytest.mark.parametrize("side", ["ref_logps", "base_logps", "both"])
@pytest.mark.parametrize("column", ["logps", "own"])
def test_either_side_comes_from_elsewhere(run, models, side, column):
    assert run() == 0
    os.mkdir("server")
    flags = {}
    for name in ("ref_logps", "base_logps") if side == "both" else (side,):
        served(name, name if column == "own" else "logps", path=f"server/{name}.parquet")
        flags[name] = f"server/{name}.parquet"
    if "ref_logps" in flags:
        flags["reference_model"] = None
    assert run(**flags, scored_dir="imported") == 0
    assert (len(run.calls) == 0) == (side == "both")
    for name in ("base_logps", "ref_logps", "input_ids", "labels"):
        assert load_scored("imported")[name][:] == load_scored("scored")[name][:]


def test_a_folder_of_files_and_of_our_own_parts(run):
    assert run() == 0
    os.mkdir("server")
    served()
    table = pq.read_table("server.parquet")
    for index in range(3):
        pq.write_table(table.slice(index * 20, 20), f"server/{index}.parquet")
    for source in ("server", "scored"):
        assert run(reference_model=None, ref_logps=source, scored_dir=f"from-{source}") == 0
        assert load_scored(f"from-{source}")["ref_logps"][:] == load_scored("scored")["ref_logps"][:]


def swap(rows):
    rows["input_ids"][33][2] += 1


def shorten(rows):
    rows["logps"][12] = rows["logps"][12][:-1]


def set_value(value):
    def change(rows):
        rows["logps"][41][-1] = value

    return change


def drop_row(rows):
    for values in rows.values():
        values.pop()


def add_row(rows):
    for values in rows.values():
        values.append(values[-1])


def other_labels(rows):
    rows["labels"] = [list(row) for row in rows["input_ids"]]


IMPORTS = {
    "token": ({"change": swap}, ["row 33: token 2 is", "in the data"]),
    "length": ({"change": shorten}, ["row 12: logps has", "the row has"]),
    "missing row": ({"change": lambda r: r["logps"].__setitem__(5, None)}, ["row 5: logps has nothing"]),
    "positive": ({"change": set_value(0.25)}, ["row 41: logps[", "is 0.25", "at most 0"]),
    "infinite": ({"change": set_value(float("-inf"))}, ["row 41: logps[", "is -inf"]),
    "null": ({"change": set_value(None)}, ["row 41: logps[", "is nan"]),
    "too few": ({"change": drop_row}, ["has 59 rows, the data has"]),
    "too many": ({"change": add_row}, ["has 61 rows, the data has 60"]),
    "labels": ({"change": other_labels}, ["row 0: label 0 is"]),
    "column": ({"column": "scores"}, ["the columns 'input_ids', 'scores'", "'ref_logps' or 'logps'"]),
    "tokenizer": ({"metadata": {"tokenizer_sha256": "0" * 64}}, ["made with another tokenizer"]),
}


def test_base_scores_of_another_model_are_refused(run, models, capsys):
    assert run() == 0
    digest = read_manifest("scored")["identity"]["model_sha256"]
    served("base_logps", metadata={"model_sha256": digest})
    assert run(base_logps="server.parquet", scored_dir="a") == 0
    served("base_logps", metadata={"model_sha256": "1" * 64})
    capsys.readouterr()
    assert run(base_logps="server.parquet", scored_dir="b") == 2
    one_line(capsys, "base_logps: 'server.parquet' was made with another model")


@pytest.mark.parametrize("case", IMPORTS)
def test_what_does_not_fit_is_refused(run, capsys, case):
    assert run() == 0
    changes, expected = IMPORTS[case]
    served(**changes)
    capsys.readouterr()
    assert run(reference_model=None, ref_logps="server.parquet", scored_dir="imported") == 2
    one_line(capsys, "selsft score: error: ref_logps", "server.parquet", *expected)


def test_imports_that_exclude_each_other_or_are_not_there(run, capsys):
    assert run(ref_logps="x.parquet") == 2
    one_line(capsys, "reference_model=", "ref_logps='x.parquet' exclude each other")
    assert run(ref_logps="x.parquet", reference_model=None) == 2
    one_line(capsys, "ref_logps='x.parquet' is neither a Parquet file nor a folder of them")
    Path("x.parquet").write_text("not Parquet at all")
    assert run(ref_logps="x.parquet", reference_model=None) == 2
    one_line(capsys, "ref_logps: 'x.parquet' is not Parquet")


def test_another_import_is_another_reference(run, capsys):
    assert run() == 0
    served()
    assert run(reference_model=None, ref_logps="server.parquet", scored_dir="imported") == 0
    served(change=set_value(-3.0))
    capsys.readouterr()
    assert run(reference_model=None, ref_logps="server.parquet", scored_dir="imported") == 2
    one_line(capsys, "another reference (sha256 ")


# ---------------------------------------------------------------- bad input

GOOD = json.dumps({"text": "alpha beta gamma delta"}) + "\n"
LONG = json.dumps({"text": "alpha beta " * 300}) + "\n"
FILES = {
    "empty.jsonl": b"",
    "broken.jsonl": (GOOD * 2 + '{"text": \n' + GOOD).encode(),
    "not_a_row.jsonl": (GOOD + "[1, 2]\n").encode(),
    "latin.jsonl": GOOD.encode() * 3 + '{"text": "caf\u00e9"}\n'.encode("latin-1"),
    "latin.csv": b"text\nalpha\nb\xe9ta\n",
    "columns.jsonl": b'{"question": "alpha"}\n',
    "hole.jsonl": (GOOD * 4 + '{"text": null}\n').encode(),
    "long.jsonl": (GOOD * 5 + LONG).encode(),
    "no_tokens.jsonl": b'{"input_ids": [5, 6, 7]}\n{"input_ids": []}\n',
    "no_messages.jsonl": b'{"messages": [{"role": "user", "content": "alpha"}]}\n{"messages": []}\n',
}
BAD = {
    "empty.jsonl": ["is an empty file"],
    "broken.jsonl": ["'broken.jsonl' cannot be read as data: line 3 is not JSON"],
    "not_a_row.jsonl": ["'not_a_row.jsonl' cannot be read as data: line 2 is not a JSON object"],
    "latin.jsonl": ["'latin.jsonl' cannot be read as data: line 4 is not UTF-8 (byte 0xe9 in column 14)"],
    "latin.csv": ["'latin.csv' cannot be read as data: line 3 is not UTF-8 (byte 0xe9 in column 2)"],
    "columns.jsonl": ["'question'", "none that can be trained on"],
    "hole.jsonl": ["row 4 of the data has no 'text'"],
    "long.jsonl": ["row 5 of the prepared data has ", "the model's context of 256: set --max_length 256"],
    "no_tokens.jsonl": ["row 1 of the data is empty: 'input_ids' has no tokens"],
    "no_messages.jsonl": ["row 1 of the data is empty: 'messages' has no messages"],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line_with_its_row(run, capsys, name, streaming):
    Path(name).write_bytes(FILES[name])
    length = 4096 if name == "long.jsonl" else 32
    capsys.readouterr()
    assert run(dataset_name=name, dataset_streaming=streaming, max_length=length) == 2
    assert one_line(capsys, *BAD[name]).startswith("selsft score: error: ")
    # Streamed rows are checked as they come, and parts before a bad row are good
    assert streaming or not list(Path().glob("scored/part-*"))


def test_truncation_makes_a_long_row_fine(run):
    Path("long.jsonl").write_bytes(FILES["long.jsonl"])
    assert run(dataset_name="long.jsonl", max_length=256) == 0
    assert max(map(len, load_scored("scored")["input_ids"])) == 256


def test_other_bad_input(run, capsys, models):
    assert run(dataset_train_split="validation", dataset_name=str(split_folder())) == 2
    one_line(capsys, "dataset_train_split='validation' is not a split", "'train'")
    assert run(shard_tokens=0) == 2
    one_line(capsys, "shard_tokens=0 must be at least 1")
    assert run(reference_model=None) == 2
    one_line(capsys, "reference_model is missing", "--ref_logps")
    tiny.tokenised_data(4, token_weights=lambda i, row: [1.0] * len(row)).to_json("weighted.jsonl")
    assert run(dataset_name="weighted.jsonl") == 2
    one_line(capsys, "the data has the columns ['token_weights'] already")


def split_folder() -> Path:
    from datasets import DatasetDict

    DatasetDict(train=tiny.text_data(4)).save_to_disk("splits")
    return Path("splits")


def test_a_model_that_is_not_finite_is_named(run, models, capsys):
    broken = tiny.llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.save_pretrained("broken")
    tiny.tokenizer().save_pretrained("broken")
    assert run(model_name_or_path="broken") == 2
    one_line(capsys, "row 0: the model returned a log-probability of nan")
    assert not parts("scored")


# ---------------------------------------------------------------- summary


def test_quantiles_of_the_histogram():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 2, 50_000), rng.normal(-30, 1e-3, 500), [0.0, -0.0, 1e-30, -1e-30, 88.0]])
    scores = scores.astype(np.float32)
    histogram = ScoreHistogram()
    for block in np.array_split(rng.permutation(scores), 7):
        histogram.add(block)
    assert histogram.total == len(scores) and histogram.sum == pytest.approx(scores.sum(dtype=np.float64))
    for q in (*QUANTILES, 0.001, 0.012, 0.49, 0.6):
        exact = float(np.quantile(scores, q, method="lower"))
        assert histogram.quantile(q) == pytest.approx(exact, rel=1 / 4096 + 1e-7, abs=1e-12), q
    assert histogram.quantile(0.0) == scores.min() and histogram.quantile(1.0) == scores.max()
    single = ScoreHistogram()
    single.add(np.array([-1.25], np.float32))
    assert {single.quantile(q) for q in QUANTILES} == {-1.25}


def test_the_most_negative_tokens_over_many_blocks(monkeypatch):
    monkeypatch.setattr("selsft.blocks.TOKENS_PER_BLOCK", 64)
    rng = np.random.default_rng(0)
    data = tiny.tokenised_data(60)
    columns = {
        name: [[float(x) for x in -rng.exponential(3, len(row))] for row in data["input_ids"]]
        for name in ("base_logps", "ref_logps")
    }
    scored = Dataset.from_dict({**data[:], **columns})
    args = SelectiveSFTConfig("out", use_cpu=True, bf16=False, negative_threshold=1.5, neutral_band=0.5)
    tokenizer = tiny.tokenizer()
    found = summarize(scored, tokenizer, args, show=15)
    every = [
        (np.float32(ref) - np.float32(base), row, position, token)
        for row, example in enumerate(scored)
        for position, (token, label, base, ref) in enumerate(
            zip(example["input_ids"], example["labels"], example["base_logps"], example["ref_logps"], strict=True)
        )
        if label != -100 and position
    ]
    eligible = sorted(item for item in every if item[3] != tokenizer.eos_token_id)[:15]
    assert [(t.row, t.position) for t in found.worst] == [(row, position) for _, row, position, _ in eligible]
    assert [t.score for t in found.worst] == pytest.approx([item[0] for item in eligible], rel=1e-6)
    assert all(t.token == tokenizer.decode([item[3]]) for t, item in zip(found.worst, eligible, strict=True))
    share = found.numbers["share"]
    negative = sum(score < -2.0 and token != tokenizer.eos_token_id for score, _, _, token in every)
    assert share["negative"] == pytest.approx(negative / len(every))
    assert sum(share.values()) == pytest.approx(1)
    assert found.numbers["tokens"] == sum(map(len, scored["input_ids"]))


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_write_what_one_writes(run, models, kind, monkeypatch):
    """Parts in turn without sharding (the same bytes), together with FSDP2 (equal to rounding)."""
    import subprocess
    import sys

    from .test_distributed import FSDP

    assert run() == 0
    root = Path(__file__).parent.parent
    script = (
        "import sys; from tests.worker import shard_on_cpu; sys.argv[1] == 'fsdp' and shard_on_cpu();"
        "from selsft.cli import main; sys.exit(main(sys.argv[2:]))"
    )
    Path("launched.py").write_text(script)
    flags = {**CPU, "model_name_or_path": models / "model", "dataset_name": "data.jsonl", "shard_tokens": 100}
    flags |= {"scored_dir": "two", "reference_model": models / "reference"}
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *(FSDP if kind == "fsdp" else ["--multi_gpu"]),
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", "launched.py", kind, "score", *to_flags(flags),
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{root}:{root / 'kernels'}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    if kind == "ddp":
        assert parts("two") == parts("scored")
        assert read_manifest("two")["parts"] == read_manifest("scored")["parts"]
    else:
        for name in ("base_logps", "ref_logps"):
            one, two = (np.concatenate(load_scored(folder)[name][:]) for folder in ("scored", "two"))
            np.testing.assert_allclose(one, two, atol=2e-6)
        assert load_scored("two")["input_ids"][:] == load_scored("scored")["input_ids"][:]
