"""Measures for free text: minimal pairs, marked tokens, words and characters in common."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from selsft import SelectiveSFTConfig
from selsft.evaluation.evaluate import evaluate_rows
from selsft.evaluation.generation import Answer
from selsft.evaluation.overlap import chrf, word_f1
from selsft.evaluation.pairs import pair_margins, pairs
from tests.support import tiny


@pytest.fixture
def args(tmp_path):
    return SelectiveSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")


def log_probability(model, tokenizer, prompt, text):
    """Of a completion with its EOS, from the logits."""
    whole, start = tokenizer(prompt + text + "<eos>")["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return float(sum(logps[place - 1, whole[place]] for place in range(start, len(whole))))


ROWS = [
    {"prompt": "alpha beta", "completion": " gamma delta", "corrected": ["gamma zeta", "gamma eta"]},
    {"prompt": "beta", "completion": " mu", "corrected": ["mu"]},  # nothing to prefer
    {"prompt": "eta theta", "completion": " iota iota kappa", "corrected": ["iota kappa"]},
]


def test_a_pair_is_the_difference_of_two_sums(args):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    margins = pair_margins(model, tokenizer, Dataset.from_list(ROWS), args)
    for row, right in ((ROWS[0], " gamma zeta"), (ROWS[2], " iota kappa")):
        wanted = log_probability(model, tokenizer, row["prompt"], right)
        wanted -= log_probability(model, tokenizer, row["prompt"], row["completion"])
        assert margins[ROWS.index(row)] == pytest.approx(wanted, abs=1e-4)
    assert np.isnan(margins[1])


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"prompt": "p", "completion": " good", "rejected": " bad"}, " good", " bad"),
        ({"prompt": "p", "completion": " other", "chosen": " good", "rejected": " bad"}, " good", " bad"),
        ({"text": " bad", "corrected": "good"}, " good", " bad"),  # with the white space of the text
    ],
)
def test_where_pairs_come_from(row, right, wrong):
    found = pairs(Dataset.from_list([row]))
    field = "completion" if "completion" in row else "text"
    assert found is not None and found[1][field] == [right] and found[2][field] == [wrong]
    assert pairs(Dataset.from_list([{"prompt": "p", "completion": " x"}])) is None


def test_marked_tokens_have_a_likelihood_of_their_own(args):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    rows = [
        {"prompt": "alpha", "completion": " beta gamma", "spans": [[0, 5]]},
        {"prompt": "beta", "completion": " delta", "spans": []},
    ]
    found = evaluate_rows(model, tokenizer, Dataset.from_list(rows), args, max_new_tokens=0)
    table = found.rows.to_pydict()
    wrong = tokenizer("alpha beta")["input_ids"][len(tokenizer("alpha")["input_ids"]) :]
    assert table["wrong_tokens"] == [len(wrong), 0]
    for index in range(2):  # all but EOS, which nobody judges
        assert table["right_tokens"][index] + table["wrong_tokens"][index] == table["tokens"][index] - 1
    eos = [log_probability(model, tokenizer, row["prompt"] + row["completion"], "") for row in rows]
    for index in range(2):
        total = table["nll_right"][index] + table["nll_wrong"][index]
        assert total == pytest.approx(table["nll"][index] + eos[index], abs=1e-4)
    assert found.metrics["nll_wrong"] == pytest.approx(table["nll_wrong"][0] / len(wrong))
    plain = evaluate_rows(model, tokenizer, Dataset.from_list(rows).remove_columns("spans"), args, max_new_tokens=0)
    assert plain.metrics["nll"] == pytest.approx(found.metrics["nll"]) and "nll_right" not in plain.metrics


def test_corrections_are_the_accepted_answers(args):
    found = evaluate_rows(tiny.llama(), tiny.tokenizer(), Dataset.from_list(ROWS), args, max_new_tokens=2)
    table = found.rows.to_pydict()
    assert table["reference"] == ["gamma zeta", "mu", "iota kappa"]
    assert table["question"] == ["alpha beta", "beta", "eta theta"]
    assert found.metrics["pairs"] == 2 and 0 <= found.metrics["preference"] <= 1
    assert found.metrics["accepts"] == "completion"


def test_words_and_characters_in_common():
    def answers(*texts):
        return [Answer(text, True, 1) for text in texts]

    references = [["The cat sat.", "A dog ran"], ["x"], [""]]
    assert word_f1(answers("the dog", "y", ""), references) == [pytest.approx(2 / 3), 0.0, 1.0]
    found = chrf(answers("The cat sat.", "y", "z"), references)
    assert found is not None and found[0] == pytest.approx(1.0) and found[1] == found[2] == 0.0


def test_chrf_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    assert chrf([Answer("a", True, 1)], [["a"]]) is None
