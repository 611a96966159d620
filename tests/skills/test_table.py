"""The score table: what goes in comes out, and what would change a metric's meaning is refused."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selsft.skills.table import SCHEMA, ScoreTableError, read_scores, write_scores
from tests.support.skill_tables import columns, table

BASE = ("r", 0, "base", "", "")
TUNED = ("r", 0, "finetuned", "", "a")
LEFT = ("r", 0, "forgotten", "uniform", "a")


def small(model=LEFT, task="a", **more):
    return columns(model, task, "test", -1, np.array([1.0, -1.0]), np.array([0, 1]), **more)


def test_what_is_written_is_read(tmp_path):
    first = table(small(BASE), small(TUNED))
    second = table(small(assigned=np.array([1, 1])))
    write_scores(tmp_path / "scores" / "a.parquet", first)
    write_scores(tmp_path / "scores" / "b.parquet", second.to_pandas())
    found = read_scores(tmp_path)
    assert list(found.columns) == SCHEMA.names and len(found) == 12
    wanted = pa.concat_tables([first, second]).to_pandas()
    for name in SCHEMA.names:
        assert [None if pd.isna(x) else x for x in found[name]] == [None if pd.isna(x) else x for x in wanted[name]], (
            name
        )
    assert pq.read_schema(tmp_path / "scores" / "b.parquet").equals(SCHEMA)
    assert read_scores(tmp_path / "scores").equals(found)


def test_rows_come_back_sorted(tmp_path):
    whole = table(small()).to_pandas()
    write_scores(tmp_path / "scores" / "a.parquet", whole.iloc[[3, 0, 2, 1]])
    found = read_scores(tmp_path)
    assert list(found["example_id"]) == ["a-test-0000"] * 2 + ["a-test-0001"] * 2
    assert list(found["option"]) == [0, 1, 0, 1] and list(found["logprob"]) == list(whole["logprob"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "tuned"}, "stage must be one of base, finetuned, forgotten"),
        ({"split": "validation"}, "split must be one of train, test"),
        ({"method": "random"}, "method of a forgotten model must be one of"),
        ({"stage": "finetuned"}, "method must be empty before forgetting"),
        ({"label_task": ""}, "label_task must be empty for base"),
        ({"eval_task": ""}, "eval_task must not be empty"),
        ({"step": -2}, "step must be -1"),
        ({"logprob": float("-inf")}, "logprob must be finite"),
        ({"logprob": 0.5}, "at most 0"),
        ({"n_tokens": 0}, "n_tokens must be at least 1"),
        ({"n_chars": 0}, "n_chars must be at least 1"),
        ({"n_bytes": 0}, "n_bytes must be at least 1"),
        ({"option": 1}, "the same option twice"),
        ({"option": [0, 2, 0, 1]}, "numbered 0 to k-1"),
        ({"option": 0, "example_id": list("wxyz"), "is_gold": True}, "at least two options"),
        ({"is_gold": True}, "exactly one option must be gold"),
        ({"is_gold": False}, "exactly one option must be gold"),
        ({"is_assigned": [True, None, None, None]}, "for all options of a question or for none"),
        ({"is_assigned": [True, True, None, None]}, "exactly one option must be assigned"),
        ({"is_assigned": [False, False, None, None]}, "exactly one option must be assigned"),
        ({"seed": None}, "column seed has 4 nulls"),
        ({"seed": "zero"}, "column seed must be int32"),
        ({"extra": 1}, "columns: unknown extra"),
    ],
)
def test_refused(tmp_path, change, message):
    frame = table(small()).to_pandas().assign(**change)
    path = tmp_path / "scores" / "a.parquet"
    write_scores(path, table(small()))
    before = path.read_bytes()
    with pytest.raises(ScoreTableError, match=message) as caught:
        write_scores(path, frame)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.parquet"]


def test_the_row_is_named(tmp_path):
    frame = table(small()).to_pandas()
    frame.loc[2, "logprob"] = 1.0
    with pytest.raises(ScoreTableError, match=r"eval_task='a'.*example_id='a-test-0001', option='0'"):
        write_scores(tmp_path / "a.parquet", frame)


def test_missing_column(tmp_path):
    with pytest.raises(ScoreTableError, match=r"columns: missing n_bytes, is_assigned; expected run, seed"):
        write_scores(tmp_path / "a.parquet", table(small()).drop(["n_bytes", "is_assigned"]))
    assert not (tmp_path / "a.parquet").exists()


def test_no_rows(tmp_path):
    with pytest.raises(ScoreTableError, match="no rows"):
        write_scores(tmp_path / "a.parquet", SCHEMA.empty_table())


def test_files_that_do_not_fit_together(tmp_path):
    with pytest.raises(ScoreTableError, match="no score tables"):
        read_scores(tmp_path)
    scores = tmp_path / "scores"
    write_scores(scores / "a.parquet", table(small()))
    write_scores(scores / "b.parquet", table(small()))
    with pytest.raises(ScoreTableError, match="the same option twice"):
        read_scores(tmp_path)
    other = columns(TUNED, "a", "test", -1, np.array([1.0, -1.0]), np.array([1, 1]))
    write_scores(scores / "b.parquet", table(other))
    with pytest.raises(ScoreTableError, match="gold option differs between stages"):
        read_scores(tmp_path)
    (scores / "b.parquet").write_bytes(b"half a file")
    with pytest.raises(ScoreTableError, match=r"b\.parquet: not a readable Parquet file"):
        read_scores(tmp_path)


def test_the_file_with_the_fault_is_named(tmp_path):
    scores = tmp_path / "scores"
    write_scores(scores / "a.parquet", table(small()))
    pq.write_table(table(small(TUNED) | {"is_gold": [True] * 4}), scores / "b.parquet")
    with pytest.raises(ScoreTableError, match=r"b\.parquet: exactly one option must be gold"):
        read_scores(tmp_path)


def test_an_unfinished_file_is_not_read(tmp_path):
    write_scores(tmp_path / "scores" / "a.parquet", table(small()))
    (tmp_path / "scores" / ".b.parquet.1.part").write_bytes(b"half")
    (tmp_path / "scores" / ".b.parquet").write_bytes(b"half")
    assert len(read_scores(tmp_path)) == 4
