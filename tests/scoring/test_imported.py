"""Scores computed elsewhere, and data that cannot be scored: one line that names the row."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from selsft.data.scored_folder import load_scores, read_manifest
from tests.cli.test_train import models, one_line
from tests.scoring.test_scored_folder import run, shards
from tests.support import tiny

__all__ = ["models", "run"]  # fixtures


# ---------------------------------------------------------------- scores from elsewhere


def served(side="ref_logps", column="logps", change=lambda rows: None, metadata=None, path="server.parquet", groups=7):
    """What an inference server may have written, from a finished folder."""
    scored = load_scores("scored")
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
        assert load_scores("imported")[name][:] == load_scores("scored")[name][:]


def test_surprisal_from_elsewhere_needs_no_pass(run):
    assert run() == 0
    served("base_logps", path="server.parquet")
    assert run(score="surprisal", reference_model=None, base_logps="server.parquet", scored_dir="imported") == 0
    assert len(run.calls) == 0
    assert load_scores("imported")["base_logps"][:] == load_scores("scored")["base_logps"][:]


def test_a_folder_of_files_and_of_our_own_parts(run):
    assert run() == 0
    os.mkdir("server")
    served()
    table = pq.read_table("server.parquet")
    for index in range(3):
        pq.write_table(table.slice(index * 20, 20), f"server/{index}.parquet")
    for source in ("server", "scored"):
        assert run(reference_model=None, ref_logps=source, scored_dir=f"from-{source}") == 0
        assert load_scores(f"from-{source}")["ref_logps"][:] == load_scores("scored")["ref_logps"][:]


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
    "long.jsonl": ["row 5 of the ", " tokens, more than ", "the model's context of 256: set --max_length 256"],
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
    # Streamed rows are checked as they come, and shards before a bad row are good
    assert streaming or not list(Path().glob("scored/shard-*"))


def test_truncation_makes_a_long_row_fine(run):
    Path("long.jsonl").write_bytes(FILES["long.jsonl"])
    assert run(dataset_name="long.jsonl", max_length=256) == 0
    assert max(map(len, load_scores("scored")["input_ids"])) == 256


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
    assert not shards("scored")


def test_only_influence_is_computed_beforehand(run, capsys):
    capsys.readouterr()
    assert run(score="excess", selection_scope="batch") == 2
    assert "score='excess' is not computed beforehand" in capsys.readouterr().err
    assert not Path("scored").exists()
