"""Scores belong to their tokens in every packing mode, are cached by content, and are never half-written."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import selsft.scoring.logprobs
from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.scoring.cache import LogpCache, data_fingerprint
from tests.support import tiny
from tests.support.oracle import assert_scored

PACKING = {
    "padded": {},
    "truncated": {"max_length": 12},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 16},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding_free": {"padding_free": True, "max_length": None},
    "multiple_of": {"pad_to_multiple_of": 7},
    "multiple_of_padding_free": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 7},
}


def trainer(options, tmp_path, data=None, peft_config=None, reference=None, **changes):
    settings = {**options, "scoring_cache_dir": str(tmp_path / "cache"), "negative_threshold": 0.1, **changes}
    return SelectiveSFTTrainer(
        model=tiny.llama(),
        args=SelectiveSFTConfig(**settings),
        train_dataset=data or tiny.prompt_data(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        reference_model=reference or tiny.llama(seed=1),
    )


@pytest.mark.parametrize("mode", PACKING)
def test_columns_match_the_models_own_logits(mode, options, tmp_path):
    run = trainer(options, tmp_path, **PACKING[mode])
    assert assert_scored(run.train_dataset, tiny.llama(), tiny.llama(seed=1)) > 40


@pytest.mark.parametrize("mode", PACKING)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_online_scores_equal_the_precomputed(mode, lora, options, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    changes = {**PACKING[mode], "forget_objective": "npo"}  # keeps base_logps in the batch
    offline = trainer(options, tmp_path, peft_config=config, **changes)
    online = trainer(options, tmp_path, peft_config=config, precompute_scores=False, **changes)
    batches = zip(offline.get_train_dataloader(), online.get_train_dataloader(), strict=True)
    negatives = 0
    for prepared, raw in batches:
        assert torch.equal(prepared["input_ids"], raw["input_ids"])
        online._annotator.annotate_batch(raw)
        torch.testing.assert_close(prepared["base_logps"], raw["base_logps"], rtol=0, atol=1e-5)
        assert torch.equal(prepared["token_weights"], raw["token_weights"])
        assert torch.equal(prepared["active_rows"], raw["active_rows"])
        negatives += (raw["token_weights"] < 0).sum()
    assert negatives > 10


def test_special_tokens_are_positive_unless_asked(options, tmp_path):
    for protect in (True, False):
        run = trainer(options, tmp_path, negative_threshold=-9.0, protect_special_tokens=protect)
        eos = [row["token_weights"][-1] for row in run.train_dataset if row["input_ids"][-1] == 1]
        assert len(eos) == 24 and set(eos) == {1.0 if protect else -1.0}


def count_forwards(monkeypatch) -> list[int]:
    calls = []
    original = selsft.scoring.logprobs.forward_logps

    def counted(model, inputs):
        calls.append(len(inputs["input_ids"]))
        return original(model, inputs)

    monkeypatch.setattr("selsft.scoring.annotation.forward_logps", counted)
    return calls


def test_cache_is_reused_when_only_selection_or_objective_change(options, tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    first = trainer(options, tmp_path)
    assert calls
    calls.clear()
    again = trainer(
        options, tmp_path, negative_threshold=None, positive_fraction=0.5, forget_objective="probability", seed=3,
        peft_config=LoraConfig(r=2), scoring_batch_size=3,
    )  # fmt: skip
    assert not calls
    assert again.train_dataset["ref_logps"] == first.train_dataset["ref_logps"]
    assert again.train_dataset["token_weights"] != first.train_dataset["token_weights"]


@pytest.mark.parametrize("changed", ["rows", "labels", "reference", "base"])
def test_cache_is_not_reused_when_rows_or_weights_change(changed, options, tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    trainer(options, tmp_path)
    calls.clear()
    reference = tiny.llama(seed=1)
    if changed == "reference":
        with torch.no_grad():
            reference.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    if changed == "base":
        monkeypatch.setattr(tiny, "llama", lambda seed=0, original=tiny.llama: original(seed=seed + 5))
    data = {"rows": tiny.prompt_data(23), "labels": tiny.prompt_data()}.get(changed)
    run = trainer(
        options, tmp_path, data=data, reference=reference, completion_only_loss=False if changed == "labels" else None
    )
    assert calls
    if changed == "labels":
        assert all(weight != 0 for row in run.train_dataset for weight in row["token_weights"][1:])


def test_cache_files_say_what_made_them(options, tmp_path):
    trainer(options, tmp_path)
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*.json")]
    assert len(manifests) == 2
    for manifest in manifests:
        assert manifest["rows"] == 24 and manifest["tokens"] > 100
        assert {"selsft", "torch", "transformers", "trl", "peft"} == set(manifest["versions"])
        assert len(manifest["model_sha256"]) == len(manifest["data_sha256"]) == 64


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other_lengths"])
def test_a_damaged_cache_is_computed_again(damage, options, tmp_path, monkeypatch, caplog):
    expected = trainer(options, tmp_path).train_dataset["ref_logps"][:]  # a copy: the file is mapped into memory
    calls = count_forwards(monkeypatch)
    for path in (tmp_path / "cache").glob("*.arrow"):
        content = path.read_bytes()
        if damage == "other_lengths":
            table = pa.table({"logps": pa.array([[0.0]] * 24, type=pa.list_(pa.float32()))})
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not arrow" * 9)
    assert trainer(options, tmp_path).train_dataset["ref_logps"][:] == expected
    assert calls and "computed again" in caplog.text


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_full_disk_costs_the_cache_and_not_the_scores(failing, tmp_path, monkeypatch, caplog):
    cache = LogpCache(str(tmp_path / "c"))
    cache.check_writable()
    blocks = [(np.full(5, value, np.float32), np.array([2, 3])) for value in range(4)]

    def no_space(*_):
        raise OSError(28, "No space left on device")

    if failing == "write":
        original = pa.ipc.new_stream

        class Full:
            def __init__(self, *args):
                self.stream, self.written = original(*args), 0

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def write_batch(self, batch):
                self.written += 1
                if self.written == 3:
                    no_space()
                self.stream.write_batch(batch)

        monkeypatch.setattr("selsft.scoring.cache.pa.ipc.new_stream", Full)
    else:
        monkeypatch.setattr(f"os.{failing}", no_space)
    rows = cache.write("key", iter(blocks), dict)
    assert rows["logps"][:] == [[float(value)] * length for value in range(4) for length in (2, 3)]
    assert [path.name for path in (tmp_path / "c").iterdir() if path.suffix != ".json"] == []
    assert "could not be cached" in caplog.text and cache.read("key", np.array([2, 3] * 4)) is None


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(options, tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"scoring_cache_dir=.*cannot be written to"):
        trainer(options, tmp_path, scoring_cache_dir=str(tmp_path / "file" / "cache"))
    assert not calls


def test_fingerprint_follows_the_view_of_the_rows():
    data = tiny.tokenised_data(12)
    assert data_fingerprint(data) == data_fingerprint(Dataset.from_list(list(data)))
    assert data_fingerprint(data) != data_fingerprint(data.shuffle(seed=0))
    assert data_fingerprint(data.shuffle(seed=0)) == data_fingerprint(data.shuffle(seed=0).flatten_indices())
    # the same tokens cut into other rows
    joined = Dataset.from_dict({name: [list(itertools.chain(*data[name][:]))] for name in ("input_ids", "labels")})
    assert data_fingerprint(data) != data_fingerprint(joined)
