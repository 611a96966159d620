"""A judged sample: what each token is known to be, prepared as training prepares it."""

import numpy as np
import pytest
from datasets import Dataset
from trl import SFTConfig

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.data.judged import judged_rows
from tests.support import tiny, tokenizers
from tests.support.characters import tokens_of_characters


def judge(rows, tokenizer=None, **changes):
    options = {
        "output_dir": "unused",
        "max_length": 64,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        **changes,
    }
    return judged_rows(Dataset.from_list(rows), tokenizer or tiny.tokenizer(), SFTConfig(**options))


def words(sample, verdict, row=0, tokenizer=None):
    chosen = (sample.row == row) & (sample.wrong == verdict)
    return (tokenizer or tiny.tokenizer()).decode(sample.input_ids[chosen])


def test_completions_with_spans():
    rows = [
        {"prompt": "alpha beta", "completion": " gamma delta eta theta", "spans": [[7, 12, -1.0], [13, 16, 0.0]]},
        {"prompt": "alpha", "completion": " beta", "spans": []},
        {"prompt": "alpha", "completion": " beta", "spans": None},
    ]
    sample = judge(rows)
    assert words(sample, 1).strip() == "delta"
    assert "".join(words(sample, 0).split()) == "gammatheta"
    assert words(sample, 0, row=1).strip() == "beta" and words(sample, 1, row=1) == ""
    assert words(sample, 0, row=2) == words(sample, 1, row=2) == ""
    assert sample.row_wrong.tolist() == [1, 0, -1]
    assert not sample.whole.any()
    assert set(sample.span[sample.wrong == 1]) == {0} and set(sample.span[sample.wrong != 1]) == {-1}
    assert sample.onset.sum() == 1
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32


@pytest.mark.parametrize("name", tokenizers.NAMES)
def test_conversations_of_all_families(name):
    tokenizer = tokenizers.family(name)
    text = "the quick lazy dog jumps"
    rows = [
        {
            "messages": [
                {"role": "user", "content": "dog", "spans": None},
                {"role": "assistant", "content": text, "spans": [[4, 9], [10, 14]]},
            ]
        }
    ]
    sample = judge(rows, tokenizer)
    rendered = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    spelled = tokens_of_characters(tokenizer, sample.input_ids.tolist(), rendered, name)
    base = rendered.index(text)
    wrong = set().union(*(spelled[base + c] for c in (*range(4, 9), *range(10, 14))))
    right = set().union(*(spelled[base + c] for c in range(len(text)))) - wrong
    assert set(np.flatnonzero(sample.wrong == 1).tolist()) == wrong
    assert set(np.flatnonzero(sample.wrong == 0).tolist()) == right
    first = [min(spelled[base + 4]), min(spelled[base + 10])]
    assert np.flatnonzero(sample.onset).tolist() == first
    assert [int(sample.span[token]) for token in first] == [0, 1]


def test_texts_judged_as_a_whole():
    rows = [
        {"prompt": "alpha", "completion": " beta gamma", "weight": -1.0},
        {"prompt": "alpha", "completion": " beta gamma", "weight": 1.0},
        {"prompt": "alpha", "completion": " beta gamma", "weight": 0.0},
    ]
    sample = judge(rows)
    assert words(sample, 1).strip() == "beta gamma" and words(sample, 0, row=1).strip() == "beta gamma"
    assert sample.row_wrong.tolist() == [1, 0, -1] and sample.whole.all()
    assert sample.onset.sum() == 1 and set(sample.span) == {-1, 0}
    eos = tiny.tokenizer().eos_token_id
    assert set(sample.wrong[sample.input_ids == eos]) == {-1}  # nobody judges it


def test_messages_judged_as_a_whole():
    turns = [
        {"role": "user", "content": "alpha", "weight": None},
        {"role": "assistant", "content": "beta", "weight": -1.0},
        {"role": "user", "content": "gamma", "weight": None},
        {"role": "assistant", "content": "delta", "weight": 1.0},
    ]
    sample = judge([{"messages": turns}], assistant_only_loss=True)
    assert words(sample, 1).strip() == "beta" and words(sample, 0).strip() == "delta"


def test_corrections():
    rows = [
        {
            "prompt": "alpha",
            "completion": " beta gamma delta",
            "corrected": ["beta eta delta"] * 3 + ["beta gamma delta"],
        }
    ]
    sample = judge(rows)
    assert words(sample, 1).strip() == "gamma" and "".join(words(sample, 0).split()) == "betadelta"


def test_spans_are_numbered_over_the_sample_and_cut_by_truncation():
    rows = [{"text": "alpha beta gamma delta", "spans": [[17, 22], [0, 5], [6, 10]]}] * 3
    sample = judge(rows)
    assert sorted(set(sample.span[sample.span >= 0])) == list(range(9))
    assert [int(number) for number in sample.span[sample.onset]] == list(range(9))  # in order
    whole = sample.lengths[0]
    cut = judge(rows, max_length=int(whole) - 3)
    assert cut.lengths.tolist() == [whole - 3] * 3 and cut.span.max() <= 8
    for row in range(3):
        np.testing.assert_array_equal(cut.wrong[cut.row == row], sample.wrong[sample.row == row][: whole - 3])


def test_special_tokens_and_the_first_token_are_unknown():
    rows = [{"text": "alpha<|im_end|> beta", "spans": [[0, 1]]}, {"text": "alpha<|im_end|> beta", "spans": []}]
    sample = judge(rows)
    starts = np.cumsum(sample.lengths) - sample.lengths
    assert sample.wrong[starts].tolist() == [-1, -1]
    end = tiny.tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert (sample.input_ids == end).sum() == 2 and set(sample.wrong[sample.input_ids == end]) == {-1}
    assert "".join(words(sample, 0, row=1).split()) in "alphabeta"


def test_rows_without_a_label_are_left_out():
    rows = [
        {"prompt": tiny.sentence(0, 12), "completion": " beta", "spans": []},
        {"prompt": "alpha", "completion": " beta", "spans": [[1, 5]]},
    ]
    sample = judge(rows, max_length=10)
    assert sample.index.tolist() == [1] and sample.row_wrong.tolist() == [1]


@pytest.mark.parametrize("changes", [{}, {"max_length": 9}, {"max_length": 9, "truncation_mode": "keep_end"}])
def test_tokens_are_those_of_training(changes, options):
    rows = [
        {"prompt": tiny.sentence(i, 2), "completion": " " + tiny.sentence(i + 3, 4), "spans": [[1, 4]]}
        for i in range(8)
    ]
    args = SelectiveSFTConfig(**{**options, **changes})
    run = SelectiveSFTTrainer(
        tiny.llama(), args, train_dataset=Dataset.from_list(rows), processing_class=tiny.tokenizer()
    )
    sample = judged_rows(Dataset.from_list(rows), tiny.tokenizer(), args, run.chat_template)
    for name in ("input_ids", "labels"):
        assert sample.dataset[name][:] == run.train_dataset[name][:]
    weights = np.concatenate([np.array(row["token_weights"]) for row in run.train_dataset])
    known = sample.wrong >= 0
    np.testing.assert_array_equal(weights[known] < 0, sample.wrong[known] == 1)
    assert known.sum() > 8


def test_a_sample_without_judgements_is_refused():
    with pytest.raises(ValueError, match="has the columns text and no judgement: add 'spans'"):
        judge([{"text": "alpha"}])
    with pytest.raises(ValueError, match="no token of the judged sample is judged"):
        judge([{"text": "alpha beta", "spans": [[0, 10, 0]]}])
    with pytest.raises(ValueError, match=r"row 1: span \[0, 20\] is outside"):
        judge([{"text": "alpha beta", "spans": []}, {"text": "alpha beta", "spans": [[0, 20]]}])
