"""The trainer's scores are cached by content and precision, never half-written, and never cost a run."""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import selsft.scoring.frozen
from selsft.data.chunks import ColumnWriter, TokenChunk, data_fingerprint
from selsft.data.scored_folder import ScoredFolder, read_manifest
from tests.scoring.test_logprobs import trainer
from tests.support import tiny


def count_forwards(monkeypatch) -> list[int]:
    calls = []
    original = selsft.scoring.frozen.forward_logps

    def counted(model, inputs):
        calls.append(len(inputs["input_ids"]))
        return original(model, inputs)

    monkeypatch.setattr("selsft.scoring.frozen.forward_logps", counted)
    return calls


def manifests(tmp_path) -> dict[str, tuple[Path, dict]]:
    """Column -> folder and manifest."""
    found = [(path, read_manifest(path)) for path in (tmp_path / "cache").iterdir()]
    assert len({manifest["column"] for _, manifest in found}) == len(found)
    return {manifest["column"]: (path, manifest) for path, manifest in found}


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


@pytest.mark.parametrize("changed", ["rows", "labels", "reference", "base", "precision", "documents"])
def test_cache_is_not_reused_when_what_decides_a_score_changes(changed, options, tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    packed = {"packing": True, "packing_strategy": "wrapped"} if changed == "documents" else {}
    trainer(options, tmp_path, **packed)
    calls.clear()
    reference = tiny.llama(seed=1)
    if changed == "reference":
        with torch.no_grad():
            reference.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    if changed == "base":
        monkeypatch.setattr(tiny, "llama", lambda seed=0, original=tiny.llama: original(seed=seed + 5))
    data = {"rows": tiny.prompt_data(23), "labels": tiny.prompt_data()}.get(changed)
    changes = {
        "labels": {"completion_only_loss": False},
        "precision": {"bf16": True},
        "documents": {**packed, "padding_free": True},
    }.get(changed, {})
    run = trainer(options, tmp_path, data=data, reference=reference, **changes)
    assert calls
    if changed == "labels":
        assert all(weight != 0 for row in run.train_dataset for weight in row["token_weights"][1:])


def test_cache_folders_say_what_made_them(options, tmp_path):
    trainer(options, tmp_path)
    found = manifests(tmp_path)
    assert set(found) == {"base_logps", "ref_logps"}
    for _, manifest in found.values():
        assert manifest["finished"] and manifest["rows"] == 24 and manifest["tokens"] > 100
        assert {"selsft", "torch", "transformers", "trl", "peft"} <= set(manifest["versions"])
        assert len(manifest["identity"]["model_sha256"]) == len(manifest["identity"]["data_sha256"]) == 64
        assert manifest["identity"]["dtype"] == "float32" and manifest["identity"]["mixed_precision"] == "no"


@pytest.mark.parametrize(
    "damage", ["truncated", "foreign", "flipped", "rewritten", "another run", "other rows", "manifest"]
)
def test_a_damaged_cache_is_computed_again(damage, options, tmp_path, monkeypatch, caplog):
    expected = trainer(options, tmp_path).train_dataset["base_logps"][:]
    folder, _ = manifests(tmp_path)["base_logps"]
    shard = folder / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "another run":  # the same rows and column, other weights
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "llama", lambda seed=0, original=tiny.llama: original(seed=seed + 5))
            trainer(options, tmp_path / "other")
        shutil.copy(manifests(tmp_path / "other")["base_logps"][0] / shard.name, shard)
    elif damage == "other rows":
        trainer(options, tmp_path / "other", data=tiny.prompt_data(23))
        shutil.copy(manifests(tmp_path / "other")["base_logps"][0] / shard.name, shard)
    elif damage == "manifest":
        (folder / "selsft_scores.json").write_text("{")
        shard.unlink()
    elif damage == "rewritten":  # whole, with its metadata, and one score that nothing has computed
        table = pq.read_table(shard)
        values = table["base_logps"].to_pylist()
        values[3][-1] += 1.0
        column = pa.array(values, type=pa.list_(pa.float32()))
        pq.write_table(table.set_column(table.column_names.index("base_logps"), "base_logps", column), shard)
    elif damage == "flipped":
        content[60] ^= 1
        shard.write_bytes(content)
    else:
        shard.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not parquet" * 9)
    calls = count_forwards(monkeypatch)
    assert trainer(options, tmp_path).train_dataset["base_logps"][:] == expected
    assert calls and "computed again" in caplog.text
    calls.clear()
    assert trainer(options, tmp_path).train_dataset["base_logps"][:] == expected
    assert not calls


def test_shards_that_are_there_are_not_computed_again(options, tmp_path, monkeypatch):
    monkeypatch.setattr("selsft.data.chunks.TOKENS_PER_CHUNK", 60)
    monkeypatch.setattr("selsft.scoring.weighing.TOKENS_PER_CHUNK", 60)
    expected = trainer(options, tmp_path).train_dataset["ref_logps"][:]
    folder, manifest = manifests(tmp_path)["ref_logps"]
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    assert len(before) > 4
    (folder / "shard-00002.parquet").unlink()
    calls = count_forwards(monkeypatch)
    assert trainer(options, tmp_path).train_dataset["ref_logps"][:] == expected
    rows = manifest["shards"][2]["rows"]
    assert sum(calls) == rows
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == before


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "pyarrow.parquet.write_table"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_full_disk_costs_the_cache_and_not_the_scores(failing, at, options, tmp_path, monkeypatch, caplog):
    expected = trainer(options, tmp_path / "whole").train_dataset["ref_logps"][:]
    monkeypatch.setattr("selsft.data.chunks.TOKENS_PER_CHUNK", 60)
    module, name = failing.rsplit(".", 1)
    original = getattr(__import__(module, fromlist=[name]), name)
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        return no_space() if len(calls) > at else original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(failing, full)
        found = trainer(options, tmp_path).train_dataset["ref_logps"][:]
    for row, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(row, wanted, atol=2e-6)
    assert "could not be cached" in caplog.text
    assert not list((tmp_path / "cache").rglob(".*"))  # nothing half-written stays
    again = trainer(options, tmp_path).train_dataset["ref_logps"][:]  # there is space again
    assert again == found and all(manifest["finished"] for _, manifest in manifests(tmp_path).values())


@pytest.mark.parametrize("failing", ["flush", "close"])
def test_a_column_without_space_on_the_disk_stays_in_memory(failing, monkeypatch, caplog):
    writer = ColumnWriter("logps", "float32")

    class Full:
        """A file whose third flush, or whose closing, finds no space."""

        def __init__(self, file):
            self.file, self.flushed = file, 0

        def __getattr__(self, name):
            return getattr(self.file, name)

        def flush(self):
            self.flushed += 1
            if failing == "flush" and self.flushed == 3:
                no_space()
            self.file.flush()

        def close(self):
            if failing == "close" and self.flushed == 4:
                self.flushed = 5
                no_space()
            self.file.close()

    writer._file = Full(writer._file)
    for value in range(4):
        writer.write(np.full(5, value, np.float32), np.array([2, 3]))
    rows = writer.dataset()
    assert rows["logps"][:] == [[float(value)] * length for value in range(4) for length in (2, 3)]
    assert "kept in memory" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(options, tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"scoring_cache_dir=.*cannot be written to"):
        trainer(options, tmp_path, scoring_cache_dir=str(tmp_path / "file" / "cache"))
    assert not calls


def test_runs_share_a_cache_folder(tmp_path):
    """Writers and readers at once: a reader gets the whole shard or none."""
    lengths = np.array([50] * 40)
    ids = np.arange(2000)
    chunk = TokenChunk(0, lengths, {"input_ids": ids, "labels": ids}, None)
    values = np.repeat(np.arange(40, dtype=np.float32), 50)

    def work(index):
        store = ScoredFolder(tmp_path, {"model": 1})
        if index % 2:
            store.open({})
            store.write(0, chunk, {"logps": values})
            store.finish(1, idle=60)
        return store.read(0)["logps"] if store.finished(0, chunk) else None

    with ThreadPoolExecutor(8) as pool:
        found = [result for result in pool.map(work, range(60)) if result is not None]
    assert len(found) >= 30 and all(np.array_equal(result, values) for result in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["selsft_scores.json", "shard-00000.parquet"]


def test_fingerprint_follows_the_view_of_the_rows():
    data = tiny.tokenised_data(12)
    assert data_fingerprint(data) == data_fingerprint(Dataset.from_list(list(data)))
    assert data_fingerprint(data) != data_fingerprint(data.shuffle(seed=0))
    assert data_fingerprint(data.shuffle(seed=0)) == data_fingerprint(data.shuffle(seed=0).flatten_indices())
    # the same rows made of other documents
    packed = data.add_column("seq_lengths", [[len(row)] for row in data["input_ids"]])
    halves = data.add_column("seq_lengths", [[2, len(row) - 2] for row in data["input_ids"]])
    assert len({data_fingerprint(data), data_fingerprint(packed), data_fingerprint(halves)}) == 3
    # the same tokens cut into other rows
    joined = Dataset.from_dict({name: [list(itertools.chain(*data[name][:]))] for name in ("input_ids", "labels")})
    assert data_fingerprint(data) != data_fingerprint(joined)
