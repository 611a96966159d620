"""How a run splits its data: disjoint in prompts, stable under more rows, with replay."""

import itertools

import pytest
from datasets import Dataset, load_dataset

from selsft.errors import InputError
from selsft.pipeline.split import SplitSettings, group_hashes, split


def split_rows(data, tmp_path, given=None, **settings):
    counts = split(data, SplitSettings(**settings), given or {}, tmp_path)
    parts = {
        path.stem: load_dataset("parquet", data_files=str(path), split="train")
        for path in tmp_path.glob("*.parquet")
        if path.stem != "rows"
    }
    return counts, parts


def test_split_is_disjoint_in_prompts_and_whole(tmp_path):
    data = Dataset.from_dict(
        {"prompt": [f"question {i % 40}" for i in range(200)], "completion": [f" answer {i}" for i in range(200)]}
    )
    counts, parts = split_rows(data, tmp_path, reference_size=0.25, eval_size=20, parts=3)
    prompts = {name: set(part["prompt"]) for name, part in parts.items()}
    names = sorted(prompts)
    assert names == ["eval", "reference", "train-1", "train-2", "train-3"]
    for a, b in itertools.combinations(names, 2):
        assert not prompts[a] & prompts[b]
    everything = [answer for part in parts.values() for answer in part["completion"]]
    assert sorted(everything) == sorted(data["completion"])
    assert counts["groups"] == 40 and counts["eval"] == 20 and counts["reference"] == 50
    for part in parts.values():  # rows keep the order of the data
        order = [int(answer.split()[-1]) for answer in part["completion"]]
        assert order == sorted(order)


def test_more_rows_do_not_reshuffle_the_others(tmp_path):
    def parts_of(rows, name):
        (tmp_path / name).mkdir()
        data = Dataset.from_dict({"text": [f"row {i}" for i in rows]})
        _, parts = split_rows(data, tmp_path / name, reference_size=0.2, eval_size=0.1)
        return {text: part for part, found in parts.items() for text in found["text"]}

    before = parts_of(range(1000), "a")
    after = parts_of([*range(1010)][::-1], "b")
    moved = [text for text, part in before.items() if after[text] != part]
    assert len(moved) <= 15  # only across the borders, which have moved by a row or two
    assert set(before.values()) == {"reference", "eval", "train"}


def test_a_conversation_is_known_by_its_question():
    ask = {"role": "user", "content": "who?"}
    data = Dataset.from_dict(
        {
            "messages": [
                [ask, {"role": "assistant", "content": "a"}],
                [ask, {"role": "assistant", "content": "b"}],
                [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a"}],
            ]
        }
    )
    first, second, third = group_hashes(data, None)
    assert first == second != third


def test_replay_has_its_share_of_the_reference(tmp_path):
    data = Dataset.from_dict({"text": [f"row {i}" for i in range(100)], "note": ["x"] * 100})
    replay = Dataset.from_dict({"text": [f"known {i}" for i in range(100)]})
    counts, parts = split_rows(data, tmp_path, {"replay": replay}, reference_size=30, eval_size=0, replay_share=0.25)
    known = [text for text in parts["reference"]["text"] if text.startswith("known")]
    assert len(known) == counts["replayed"] == 10 and counts["reference"] == 40
    assert not any(text.startswith("known") for text in parts["train"]["text"])
    with pytest.raises(InputError, match=r"split.replay_dataset has the columns 'words' and lacks 'text'"):
        split(data, SplitSettings(), {"replay": replay.rename_column("text", "words")}, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference_size": 0.9, "eval_size": 0.2}, "split leaves no row to train on"),
        ({"parts": 99}, "split.parts=99 leaves part"),
        ({"group_column": "nothing"}, "split.group_column='nothing' is not a column"),
        ({"eval_size": -1}, "split.eval_size=-1 must be"),
        ({"replay_share": 1.0}, "split.replay_share=1.0 must be in"),
    ],
)
def test_impossible_splits(tmp_path, settings, message):
    data = Dataset.from_dict({"text": [f"row {i}" for i in range(20)]})
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        split(data, SplitSettings(**settings), {}, tmp_path)
    assert not list(tmp_path.glob("*.parquet"))
