"""Every folder with rows that selsft writes opens with `datasets.load_dataset`."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import get_dataset_config_names, load_dataset

from selsft.data.cards import write_card
from tests.support import commands, tiny
from tests.support.commands import COMMANDS, flags


def opened(folder):
    """The rows of every configuration."""
    names = get_dataset_config_names(str(folder))
    return {name: load_dataset(str(folder), name, split="train") for name in names}


def test_kinds_of_files(tmp_path):
    for name, column in (("shard-00000", "a"), ("shard-00001", "a"), ("other", "b")):
        pq.write_table(pa.table({column: [1, 2]}), tmp_path / f"{name}.parquet")
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "source" / "rows.parquet")
    for number in range(4):
        (tmp_path / f"record-{number}.json").write_text('{"settings": [1]}')
    write_card(tmp_path)
    found = opened(tmp_path)
    assert {name: (rows.column_names, len(rows)) for name, rows in found.items()} == {
        "default": (["a"], 4), "other": (["b"], 2), "source": (["id"], 1),
    }  # fmt: skip
    assert load_dataset(str(tmp_path), split="train")["a"] == [1, 2, 1, 2]


def test_a_card_is_renewed_and_a_model_card_stays(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "one.parquet")
    write_card(tmp_path)
    pq.write_table(pa.table({"b": [1]}), tmp_path / "two.parquet")
    write_card(tmp_path)
    assert set(opened(tmp_path)) == {"default", "two"}
    (tmp_path / "README.md").write_text("# My model\n")
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My model\n"


def test_two_folders_of_one_name_are_two_data_sets(tmp_path):
    for name, values in (("a", [1]), ("b", [2]), ("a", [3])):  # the last one is the first folder with other rows
        (tmp_path / name / "scored").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"x": values}), tmp_path / name / "scored" / "rows.parquet")
        write_card(tmp_path / name / "scored")
        assert load_dataset(str(tmp_path / name / "scored"), split="train")["x"] == values


def test_a_file_without_rows_is_not_named(tmp_path):
    (tmp_path / "full.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bare.csv").write_text("a,b\n")
    write_card(tmp_path)
    assert get_dataset_config_names(str(tmp_path)) == ["default"] and opened(tmp_path)["default"]["b"] == [2]


def test_a_folder_without_rows_has_no_card(tmp_path):
    write_card(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["score", "score with a probe", "evaluate", "run", "skills", "demo", "tokens", "export"]
)
def test_folders_of_commands(tmp_path, name):
    commands.workspace(tmp_path)
    if name == "evaluate":
        rows = [{"id": f"q-{i}", **row} for i, row in enumerate(tiny.prompt_data(12))]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name == "export":
        assert commands.run(COMMANDS["score"], tmp_path).status == 0
        argv = ["export", "out", "--output", "rows"]
    elif name == "tokens":
        given = {"model_name_or_path": "model", "dataset_name": "data.jsonl", "tokens_dir": "rows", "part_tokens": 60}
        argv = ["tokens", *flags(given)]
    else:
        argv = COMMANDS[name]
    done = commands.run(argv, tmp_path)
    assert done.status == 0, done.text
    if name == "evaluate":  # ids go along
        assert load_dataset(str(tmp_path / "out"), split="train")["id"][:2] == ["q-0", "q-1"]
    root = tmp_path / ("rows" if name in ("tokens", "export") else "out")
    cards = [path for path in sorted(root.rglob("README.md")) if path.read_text().startswith("---\nconfigs:")]
    assert cards, f"{name} leaves no folder with rows"
    for card in cards:
        for rows in opened(card.parent).values():
            assert rows.column_names
    ended = {path.parent for ending in ("parquet", "csv") for path in root.rglob(f"*.{ending}")}
    described = {card.parent for card in cards} | {card.parent / "source" for card in cards}
    # Not rows for others: the scores that arms keep while they train, and files of one form, which need no card
    assert not {folder for folder in ended - described if "scores" not in (folder.name, folder.parent.name)}
    if name == "skills":
        assert load_dataset(str(root / "scores"), split="train").num_rows > 0
