"""`selsft export`: what training on the same folder would learn and forget, for other trainers; the user's columns and
numbers go along; and `load_dataset` opens the folders."""

import json

import numpy as np
import pytest
from datasets import Dataset, load_dataset

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer, load_scores, score_dataset, select_tokens
from selsft.cli import main
from selsft.data.alignment import Alignment
from selsft.errors import InputError
from selsft.selection.export import export, text_places
from tests.support import tiny, tokenizers
from tests.support.characters import tokens_of_characters

SETTINGS = {"score": "surprisal", "positive_fraction": 0.6, "score_pooling": "token"}
FLAGS = ["--score", "surprisal", "--positive_fraction", "0.6", "--score_pooling", "token"]
SPECIAL = "Ünï 😀 naïve"


def with_columns(data):
    """Columns that no part of selsft reads, of several kinds, and text beyond ASCII."""
    count = len(data)
    data = data.add_column("id", [f"q-{i}" for i in range(count)])
    return data.add_column("meta", [{"n": i, "tags": ["x"] * (i % 3)} for i in range(count)])


def texts():
    return Dataset.from_list(
        [{"text": f"{tiny.sentence(i, 4)} {SPECIAL} {tiny.sentence(i + 2, 3)}"} for i in range(12)]
    )


def pairs():
    prompts = tiny.prompt_data(12)
    return prompts.map(lambda row: {"completion": row["completion"] + " " + SPECIAL})


def chats_of_completions():
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": tiny.sentence(i, 3)}],
                "completion": [{"role": "assistant", "content": tiny.sentence(i + 1, 4)}],
            }
            for i in range(12)
        ]
    )


KINDS = {
    "text": texts, "pairs": pairs, "messages": lambda: tiny.chat_data(12), "completion messages": chats_of_completions,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def score(folder, data, model, options, **changes):
    args = SelectiveSFTConfig(**{**options, **SETTINGS, "max_length": 30, **changes})
    score_dataset(model, data, args=args, output_dir=folder / "scored")
    return folder / "scored"


@pytest.mark.parametrize("kind", KINDS)
def test_spans_train_as_the_scores_do(tmp_path, model, options, kind):
    """Rows with exported spans get the very token weights that the scored folder gives."""
    data = with_columns(KINDS[kind]())
    length = 120 if "messages" in kind else 30  # texts and pairs are truncated
    scored = score(tmp_path, data, model, options, max_length=length)
    rows, counts = export(scored, "spans", SETTINGS)
    assert rows["id"] == data["id"] and rows["meta"] == data["meta"] and rows["source_row"] == list(range(12))
    tokenizer = tiny.tokenizer()
    expected = select_tokens(load_scores(scored), tokenizer, SelectiveSFTConfig(**{**options, **SETTINGS}))
    plain = {**options, "max_length": length}
    marked = SelectiveSFTTrainer(model, SelectiveSFTConfig(**plain), train_dataset=rows.remove_columns("meta"))
    negative = 0
    for row, given in zip(marked.train_dataset, expected, strict=True):
        assert row["input_ids"] == given["input_ids"]
        supervised = np.array(given["labels"]) != -100
        ours, theirs = np.array(row["token_weights"]), np.array(given["token_weights"])
        special = np.isin(row["input_ids"], tokenizer.all_special_ids)
        outside = ~_in_template(row, tokenizer) if "messages" in kind else np.ones(len(ours), bool)
        compared = supervised & ~special & outside & (np.arange(len(ours)) > 0)
        shared = _shared_characters(row, tokenizer) if kind in ("text", "pairs") else np.zeros(len(ours), bool)
        np.testing.assert_array_equal(ours[compared & ~shared], theirs[compared & ~shared])
        negative += int((ours < 0).sum())
    assert negative > 10 and (counts["unmarked"] > 0) <= ("messages" in kind)
    assert counts["unmarked"] > 0 or kind != "messages"


def _in_template(row, tokenizer):
    """Which tokens of a conversation belong to no message."""
    whole, places, _ = text_places(row, "text", tokenizer, None)
    starts, ends = Alignment(tokenizer).characters(row["input_ids"], whole)
    inside = np.zeros(len(starts), bool)
    for _, left, right, _ in places:
        inside |= (starts < right) & (ends > left)
    return ~inside


def _shared_characters(row, tokenizer):
    """Tokens that spell a part of a character: a span reaches all of its tokens."""
    pieces = [tokenizer.decode([token]) for token in row["input_ids"]]
    return np.array(["\ufffd" in piece for piece in pieces])


@pytest.mark.parametrize("family", ["llama3", "gpt2", "gemma", "llama2"])
def test_characters_of_tokens(family):
    tokenizer = tokenizers.family(family)
    for text in ("plain words", SPECIAL, "  two  spaces ", "日本語 text"):
        ids = tokenizer(text)["input_ids"]
        starts, ends = Alignment(tokenizer).characters(ids, text, special=True)
        for character, covering in enumerate(tokens_of_characters(tokenizer, ids, text, family)):
            ours = set(np.flatnonzero((starts <= character) & (ends > character)).tolist())
            assert ours == covering, (text, character)


def test_labels_and_weights(tmp_path, model, options):
    data = with_columns(pairs())
    scored = score(tmp_path, data, model, options)
    chosen = select_tokens(load_scores(scored), tiny.tokenizer(), SelectiveSFTConfig(**{**options, **SETTINGS}))
    weights, counts = export(scored, "weights", SETTINGS)
    assert weights["token_weights"] == chosen["token_weights"] and weights["labels"] == chosen["labels"]
    assert weights["attention_mask"] == [[1] * len(ids) for ids in chosen["input_ids"]]
    assert weights["id"] == data["id"] and weights["completion"] == data["completion"]
    assert counts["positive"] + counts["neutral"] + counts["negative"] == counts["tokens"]
    masked, counts = export(scored, "labels", SETTINGS)
    assert counts["negative"] > 5 and "token_weights" not in masked.column_names
    by_number = {row["source_row"]: row for row in masked}
    for number, row in enumerate(chosen):
        pairs_of = zip(row["labels"], row["token_weights"], strict=True)
        kept = [label if weight > 0 else -100 for label, weight in pairs_of]
        assert by_number[number]["labels"] == kept if any(label != -100 for label in kept) else number not in by_number
    assert len(by_number) == 12 - counts["left_out"]


def test_rows_are_those_of_the_data(tmp_path, model, options):
    """Rows that scoring drops or shuffles keep their own columns and numbers."""
    data = with_columns(pairs())
    data = data.map(lambda row, i: {"prompt": tiny.sentence(i, 40) if i == 3 else row["prompt"]}, with_indices=True)
    scored = score(tmp_path, data, model, options, shuffle_dataset=True)
    rows, _ = export(scored, "weights", SETTINGS)
    assert 3 not in rows["source_row"] and len(rows) == 11 and rows["source_row"] != sorted(rows["source_row"])
    tokenizer = tiny.tokenizer()
    for row in rows:
        assert {key: row[key] for key in data.column_names} == data[row["source_row"]]
        assert (row["prompt"] + row["completion"]).startswith(tokenizer.decode(row["input_ids"][:8]))


def test_packed_rows_have_no_text(tmp_path, model, options):
    changes = {"packing": True, "packing_strategy": "wrapped"}
    scored = score(tmp_path, texts(), model, options, **changes)
    with pytest.raises(ValueError, match="does not know the text of its rows, which were streamed or packed"):
        export(scored, "spans", SETTINGS)
    rows, _ = export(scored, "labels", SETTINGS)
    assert "source_row" in rows.column_names


def test_rows_that_were_tokenised_already_have_no_text(tmp_path, model, options):
    ids = [tiny.tokenizer()(row["text"])["input_ids"] for row in texts()]
    scored = score(tmp_path, Dataset.from_dict({"input_ids": ids, "labels": ids}), model, options)
    with pytest.raises(InputError, match="were tokenised already and have no text"):
        export(scored, "spans", SETTINGS)
    assert export(scored, "weights", SETTINGS)[1]["rows"] == len(ids)


def test_another_tokenizer_is_refused(tmp_path, model, options):
    scored = score(tmp_path, texts(), model, options)
    other = tiny.tokenizer()
    other.add_tokens("extra")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not that of the scores: give --model_name_or_path"):
        export(scored, "labels", SETTINGS, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="form='html' is unknown"):
        export(scored, "html", SETTINGS)


@pytest.mark.parametrize("output", ["rows.parquet", "rows.jsonl", "folder"])
def test_command(tmp_path, model, options, output, capsys):
    data = with_columns(texts())
    scored = score(tmp_path, data, model, options)
    path = tmp_path / output
    assert main(["export", str(scored), "--output", str(path), "--form", "weights", *FLAGS]) == 0
    assert "12 rows as weights; of" in capsys.readouterr().out
    if output == "folder":
        rows = load_dataset(str(path), split="train")
    else:
        rows = load_dataset(path.suffix[1:].replace("jsonl", "json"), data_files=str(path), split="train")
    assert (
        rows["id"] == data["id"]
        and rows["meta"] == data["meta"]
        and {-1, 1} <= {w for r in rows["token_weights"] for w in r}
    )
    assert main(["export", str(scored), "--output", str(path), *FLAGS]) == 2
    assert "exists and is not empty, nothing was overwritten" in capsys.readouterr().err
    if output == "folder":
        record = json.loads((path / "selsft_run.json").read_text())
        assert record["selection"]["positive_fraction"] == 0.6 and record["counts"]["negative"] > 0


def test_bad_flags(tmp_path, capsys):
    for argv, message in (
        ([str(tmp_path), "--output", "a.parquet"], "is no folder of `selsft score`"),
        ([str(tmp_path)], "--output is missing"),
        (["x", "--score", "nonsense", "--output", "a"], "--score: invalid choice"),
        (["x", "--protect_special_tokens", "maybe", "--output", "a"], "'maybe' must be true or false"),
    ):
        assert main(["export", *argv]) == 2
        assert message in capsys.readouterr().err


def test_load_dataset_opens_a_scored_folder(tmp_path, model, options):
    data = with_columns(pairs())
    scored = score(tmp_path, data, model, options)
    assert load_dataset(str(scored), split="train")["input_ids"] == load_scores(scored)["input_ids"]
    rows = load_dataset(str(scored), "source", split="train")
    assert rows["id"] == data["id"] and rows["source_row"] == list(range(12))
