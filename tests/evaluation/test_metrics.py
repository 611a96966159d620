"""AUC by counting pairs, and its interval over rows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selsft.evaluation.metrics import auc, auc_interval

EXAMPLES = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(examples=EXAMPLES)
def test_auc_is_the_share_of_pairs(examples):
    scores, positive, times = (np.array(column) for column in zip(*examples, strict=True))
    for weights in (None, times):
        repeated = np.repeat(np.arange(len(scores)), 1 if weights is None else weights)
        pairs = [
            (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
            for i in repeated
            for j in repeated
            if positive[i] and not positive[j]
        ]
        expected = np.mean(pairs) if pairs else math.nan
        assert auc(scores, positive, weights) == pytest.approx(expected, nan_ok=True)


def test_auc_of_nothing_is_nan():
    assert math.isnan(auc(np.array([]), np.array([], bool)))


def test_the_interval_of_an_auc_counts_rows_not_tokens():
    """Every token of a row says the same, so the rows are all there is to draw: 50 tokens a row make the interval no
    narrower, while tokens drawn one by one pretend to know seven times more."""
    rng = np.random.default_rng(0)
    wrong = rng.random(40) < 0.5
    scores = wrong + rng.normal(size=40)
    rows = np.repeat(np.arange(40), 50)
    found = auc_interval(scores, wrong, draws=1000)
    repeated = auc_interval(scores[rows], wrong[rows], rows, draws=1000)
    alone = auc_interval(scores[rows], wrong[rows], draws=1000)
    assert repeated == pytest.approx(found)
    assert found.low < found.value < found.high and found.value == pytest.approx(alone.value)
    assert alone.high - alone.low < (found.high - found.low) / 4
