"""Scores by formula, and pooled over words, spans and rows; the same for a data set, a batch and a row."""

import numpy as np
import pytest
from datasets import Dataset

from selsft import SelectiveSFTConfig
from selsft.config import PAPER_2508_04329, POOLINGS, TOKEN_CLEANING_2502_01968
from selsft.data.words import Words
from selsft.selection.pooling import pool_scores
from selsft.selection.weights import add_token_weights, raw_scores, row_weights
from tests.support import tiny

SCORES = np.array([-1.0, -5.0, -2.0, 0.0, -3.0, -4.0], np.float32)
MASK = np.array([True, True, True, False, True, True])
DOCUMENTS = np.array([0, 0, 0, 0, 1, 1])
WORDS = np.array([0, 0, 0, 1, 2, 2])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("token", [-1, -5, -2, None, -3, -4]),
        ("word", [-5, -5, -5, None, -4, -4]),
        ("word_sum", [-8, -8, -8, None, -7, -7]),
        ("span", [-1, -5, -5, None, -3, -4]),
        ("row", [-8 / 3, -8 / 3, -8 / 3, None, -3.5, -3.5]),
    ],
)
def test_pooling(pooling, expected):
    found = pool_scores(SCORES, MASK, DOCUMENTS, WORDS, pooling)
    for value, wanted in zip(found, expected, strict=True):
        assert wanted is None or value == pytest.approx(wanted)


def test_worst_of_a_row_and_lookahead():
    assert pool_scores(SCORES, MASK, DOCUMENTS, None, "row", worst=2)[[0, 4]].tolist() == [-3.5, -3.5]
    # token 2 is followed by one that does not count, token 5 by none
    found = pool_scores(SCORES, MASK, DOCUMENTS, None, lookahead=0.5)
    assert found[MASK].tolist() == [-3.5, -6.0, -2.0, -5.0, -4.0]


def test_long_words_and_tokens_that_do_not_count():
    rng = np.random.default_rng(0)
    scores, mask = rng.normal(size=50).astype(np.float32), rng.random(50) < 0.8
    words = np.sort(rng.integers(0, 5, 50))
    rows = np.zeros(50, int)
    span, word, total = (pool_scores(scores, mask, rows, words, how) for how in ("span", "word", "word_sum"))
    for token in np.flatnonzero(mask):
        own = (words == words[token]) & mask
        assert word[token] == scores[own].min()
        assert total[token] == np.float32(scores[own].astype(np.float64).sum())
        assert span[token] == scores[own & (np.arange(50) <= token)].min()


def settings_of(**changes):
    return SelectiveSFTConfig("unused", use_cpu=True, bf16=False, **changes)


def test_formulas():
    columns = {
        "base_logps": np.float32([-2, -4]), "ref_logps": np.float32([-1, -5]), "noisy_logps": np.float32([-3, -1]),
        "probe_scores": np.float32([-0.9, -0.1]),
    }  # fmt: skip
    for changes, expected in (
        ({"score_base_weight": 1.0}, [1, -1]),
        ({}, [0, -3]),
        ({"score_base_weight": 0.0}, [-1, -5]),
        ({"score": "surprisal"}, [-2, -4]),
        ({"score": "contrast"}, [2, -4]),
        ({"score": "probe"}, [-0.9, -0.1]),
    ):
        np.testing.assert_allclose(raw_scores(columns, settings_of(**changes)), expected, rtol=1e-6)


def test_the_papers_keep_their_scores():
    for preset, share in ((PAPER_2508_04329, 0.7), (TOKEN_CLEANING_2502_01968, 0.6)):
        args = settings_of(reference_model="a", **preset)
        assert (args.score_base_weight, args.pooling, args.effective_fraction) == (1.0, "token", share)


def test_the_rule_by_default():
    args = settings_of(reference_model="a")
    found = (args.score_base_weight, args.pooling, args.effective_fraction, args.effective_threshold)
    assert found == (0.5, "word_sum", 0.95, None)
    args = settings_of(score="surprisal")
    assert (args.pooling, args.effective_fraction, args.effective_threshold) == ("word_sum", 0.95, None)
    args = settings_of(score="probe", probe="a")
    assert (args.pooling, args.effective_fraction, args.effective_threshold) == ("word", None, 0.5)
    args = settings_of(reference_model="a", negative_threshold=2.0)
    assert (args.effective_fraction, args.effective_threshold) == (None, 2.0)
    args = settings_of(score="contrast")
    assert (args.pooling, args.effective_fraction, args.effective_threshold) == ("token", None, 1.0)


def test_the_worst_words_are_negative_by_default():
    """Against the definition: sums over words of log p_ref - log p / 2, of which the lowest 5 % are negative."""
    rng = np.random.default_rng(2)
    logps = {
        name: lambda i, row: rng.normal(-3, 2, len(row)).astype(np.float32) for name in ("base_logps", "ref_logps")
    }
    data, words = tiny.tokenised_data(40, **logps), Words(tiny.tokenizer())
    found = add_token_weights(data, settings_of(), np.array([], int), False, words)
    sums, weights = [], []
    for row, weighed in zip(data, found, strict=True):
        ids = np.array(row["input_ids"])
        number = words.number(ids, np.array([len(ids)]))
        score = np.array(row["ref_logps"]) - 0.5 * np.array(row["base_logps"])
        counted = (np.array(row["labels"]) != -100) & (np.arange(len(ids)) > 0)
        for token in np.flatnonzero(counted):
            sums.append(score[counted & (number == number[token])].sum())
            weights.append(weighed["token_weights"][token])
    sums, negative = np.array(sums), np.array(weights) < 0
    assert 0 < negative.sum() <= 0.05 * sums.size < negative.sum() + 4  # words are not split
    assert sums[negative].max() < sums[~negative].min()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_data_set_and_its_rows_get_the_same_weights(pooling):
    rng = np.random.default_rng(1)
    data = tiny.tokenised_data(12, base_logps=lambda i, row: rng.normal(-3, 2, len(row)).astype(np.float32))
    args = settings_of(score="surprisal", negative_threshold=3.0, score_pooling=pooling, score_lookahead=0.25)
    words = Words(tiny.tokenizer())
    whole = add_token_weights(data, args, np.array([1]), False, words)
    for row, weighed in zip(data, whole, strict=True):
        assert row_weights(row, args, np.array([1]), False, words).tolist() == weighed["token_weights"]
    assert {-1, 0, 1} == {weight for row in whole["token_weights"] for weight in row}
    packed = Dataset.from_dict(
        {name: [[v for row in data[name] for v in row]] for name in ("input_ids", "labels", "base_logps")}
        | {"seq_lengths": [[len(row) for row in data["input_ids"]]]}
    )
    (weights,) = add_token_weights(packed, args, np.array([1]), True, words)["token_weights"]
    assert weights == [weight for row in whole["token_weights"] for weight in row]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"score": "contrast", "reference_model": "a", "noisy_reference_model": "a"}, "all scores would be 0"),
        ({"noisy_reference_model": "a"}, "only score='contrast'"),
        ({"probe": "a"}, "set score='probe'"),
        ({"probe_clean": "a"}, "set score='probe'"),
        ({"score": "probe", "probe": "a", "probe_clean": "b"}, "exclude each other"),
        ({"target_precision": 0.0, "judged": "a"}, r"target_precision=0.0 is outside of \(0.0, 1.0\]"),
        ({"score_row_worst": 3}, "only 'row'"),
        ({"score_pooling": "row", "score_row_worst": 0}, "must be at least 1"),
        ({"score_pooling": "letter"}, "use one of token, word, word_sum, span, row"),
        ({"score_base_weight": -1.0}, "score_base_weight=-1.0 is outside"),
        ({"score": "oracle", "score_pooling": "word"}, "score_pooling='word' with score='oracle'"),
        ({"score": "probe", "gate_reference_prob": 0.1}, "has no reference"),
        ({"score": "random", "positive_fraction": 0.5, "score_lookahead": 0.5}, "leave it out"),
    ],
)
def test_contradictions_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        settings_of(**changes)
