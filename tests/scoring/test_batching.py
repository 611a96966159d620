"""Token budgets, shards, both models in one pass, and the summary of scores."""

import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from selsft import DataCollatorForSelectiveSFT, SelectiveSFTConfig
from selsft.data.chunks import token_chunks
from selsft.report.terminal import QUANTILES, ScoreHistogram, summarize
from selsft.scoring.batching import BatchBudget
from selsft.scoring.frozen import FrozenModels
from selsft.scoring.logprobs import ROW_COLUMNS, score_chunk
from tests.cli.test_train import models
from tests.support import tiny

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
    few = lengths[:60]  # among few rows none has neighbours of its length: smaller batches instead of padding
    batches = BatchBudget(8192).batches(few)
    assert sum(int(few[batch].max()) * len(batch) for batch in batches) < 1.15 * few.sum()
    assert len(batches) < 16
    rows = BatchBudget(None, rows=7).batches(lengths)
    assert {len(batch) for batch in rows[:-1]} == {7}
    both = BatchBudget(8192, rows=20).batches(lengths)
    assert max(len(batch) for batch in both) == 20
    assert all(len(batch) == 1 or lengths[batch].max() * len(batch) <= 8192 for batch in both)


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
    assert BatchBudget.of(args) == BatchBudget(None, rows=3)
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
    mapped = list(token_chunks(Dataset.from_dict(data), ROW_COLUMNS, tokens))
    rows = [{name: data[name][i] for name in data} for i in range(len(lengths))]
    streamed = list(token_chunks(IterableDataset.from_generator(lambda: iter(rows)), ROW_COLUMNS, tokens))
    for found in (mapped, streamed):
        assert np.concatenate([chunk.lengths for chunk in found]).tolist() == lengths
        assert np.concatenate([chunk.columns["input_ids"] for chunk in found]).tolist() == list(range(sum(lengths)))
        assert np.concatenate([chunk.columns["labels"] for chunk in found]).tolist() == [
            -token for token in range(sum(lengths))
        ]
        assert all(chunk.size <= tokens or len(chunk.lengths) == 1 for chunk in found)
        for chunk, following in itertools.pairwise(found):
            assert following.first_row == chunk.first_row + len(chunk.lengths)
            assert chunk.size + following.lengths[0] > tokens  # as full as can be
    assert [chunk.first_row for chunk in mapped] == [chunk.first_row for chunk in streamed]


@pytest.mark.parametrize("documents", [False, True])
def test_shards_of_packed_rows(documents):
    inner = [[3, 2], [4], [1, 1, 5], [2, 6]]
    data = numbered([sum(row) for row in inner]) | {"seq_lengths": inner}
    rows = [{name: data[name][i] for name in data} for i in range(4)]
    for source in (Dataset.from_dict(data), IterableDataset.from_generator(lambda: iter(rows))):
        found = list(token_chunks(source, ROW_COLUMNS, 9, documents=documents))
        lengths = [chunk.lengths.tolist() for chunk in found]
        if documents:
            assert lengths == [[3, 2, 4], [1, 1, 5, 2], [6]] and all(chunk.documents is None for chunk in found)
            assert [chunk.first_row for chunk in found] == [0, 3, 7]
        else:
            assert lengths == [[5, 4], [7], [8]]
            assert [chunk.documents.tolist() for chunk in found] == [[3, 2, 4], [1, 1, 5], [2, 6]]


def test_streamed_rows_are_not_gathered():
    """Never more in memory than a shard and what is read ahead."""
    read = []

    def rows():
        for index in range(20_000):
            read.append(index)
            yield {"input_ids": [index] * 5, "labels": [index] * 5}

    done = 0
    for chunk in token_chunks(IterableDataset.from_generator(rows), ROW_COLUMNS, tokens=5_000):
        assert chunk.first_row == done and chunk.columns["input_ids"][0] == done
        done += len(chunk.lengths)
        assert len(read) - done <= 1_000 + 512
    assert done == 20_000


def test_rows_without_a_label_never_meet_the_model():
    data = numbered([5, 6, 7])
    data["labels"][1] = [-100] * 6
    data["labels"][2] = [3] + [-100] * 6  # the first token is predicted by nothing
    (chunk,) = token_chunks(Dataset.from_dict(data), ROW_COLUMNS)
    seen = []

    def forward(inputs):
        seen.append(inputs["input_ids"].tolist())
        return {"logps": torch.full(inputs["input_ids"].shape, -1.0)}

    accelerator = SimpleNamespace(device=torch.device("cpu"))
    collator = DataCollatorForSelectiveSFT(pad_token_id=0)
    flat = score_chunk(chunk, ["logps"], forward, collator, accelerator, BatchBudget(99))["logps"]
    assert seen == [[data["input_ids"][0]]]
    assert flat.tolist() == [-1.0] * 5 + [0.0] * 13


# ---------------------------------------------------------------- one forward pass or two


LORA = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def adapted(seed: int, **changes) -> PeftModel:
    model = tiny.llama(tie_word_embeddings=False)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{**LORA, **changes}))


def frozen_models(policy, source, options, **changes) -> FrozenModels:
    from accelerate import Accelerator

    args = SelectiveSFTConfig(**{**options, "scoring_batch_tokens": 60})
    collator = DataCollatorForSelectiveSFT(pad_token_id=0)
    return FrozenModels(policy, source, tiny.tokenizer(), args, Accelerator(cpu=True), collator, **changes)


def plain_pass(model, chunk) -> np.ndarray:
    """Every row alone through the model's ordinary logits, in the dtype of the model."""
    parts, start = [], 0
    for length in chunk.lengths:
        ids = torch.from_numpy(chunk.columns["input_ids"][start : start + length].astype(np.int64))
        labels = chunk.columns["labels"][start : start + length]
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
    (chunk,) = token_chunks(tiny.tokenised_data(16), ROW_COLUMNS)
    found = {}
    for mixed in (False, True):
        reference = source if source == "base" else str(tmp_path / source)
        models = frozen_models(make(), reference, options, mixed=mixed)
        with mock.patch.object(models, "_both", wraps=models._both) as both, models.ready():
            found[mixed] = models.score(chunk, models.columns)
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
        plain = plain_pass(model, chunk)
        exact = plain_pass(model.double(), chunk)
        own_error = np.abs(plain - exact).max()
        assert 0 < own_error < 1e-5
        for mixed in (False, True):
            assert np.abs(found[mixed][side] - exact).max() <= 2 * own_error, (side, mixed)
    assert np.abs(found[True]["base_logps"] - found[True]["ref_logps"]).max() > 0.01


# ---------------------------------------------------------------- summary


def test_quantiles_of_the_histogram():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 2, 50_000), rng.normal(-30, 1e-3, 500), [0.0, -0.0, 1e-30, -1e-30, 88.0]])
    scores = scores.astype(np.float32)
    histogram = ScoreHistogram()
    for chunk in np.array_split(rng.permutation(scores), 7):
        histogram.add(chunk)
    assert histogram.total == len(scores) and histogram.sum == pytest.approx(scores.sum(dtype=np.float64))
    for q in (*QUANTILES, 0.001, 0.012, 0.49, 0.6):
        exact = float(np.quantile(scores, q, method="lower"))
        assert histogram.quantile(q) == pytest.approx(exact, rel=1 / 4096 + 1e-7, abs=1e-12), q
    assert histogram.quantile(0.0) == scores.min() and histogram.quantile(1.0) == scores.max()
    single = ScoreHistogram()
    single.add(np.array([-1.25], np.float32))
    assert {single.quantile(q) for q in QUANTILES} == {-1.25}


def test_the_most_negative_tokens_over_many_blocks(monkeypatch):
    monkeypatch.setattr("selsft.data.chunks.TOKENS_PER_CHUNK", 64)
    rng = np.random.default_rng(0)
    data = tiny.tokenised_data(60)
    columns = {
        name: [[float(x) for x in -rng.exponential(3, len(row))] for row in data["input_ids"]]
        for name in ("base_logps", "ref_logps")
    }
    scored = Dataset.from_dict({**data[:], **columns})
    args = SelectiveSFTConfig(
        "out",
        use_cpu=True,
        bf16=False,
        negative_threshold=1.5,
        score_base_weight=1.0,
        score_pooling="token",
        neutral_band=0.5,
    )
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
