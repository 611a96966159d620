"""Progress bars count all of their work: both models of a score, every token of an answer."""

import pytest
from tqdm import tqdm

from selsft.config import SelectiveSFTConfig
from selsft.evaluation.generation import greedy_answers
from selsft.score import score_dataset
from tests.support import tiny


@pytest.fixture
def bars(monkeypatch):
    """The bars that were shown."""
    shown = []

    def record(*args, **kwargs):
        shown.append(tqdm(*args, **{**kwargs, "disable": False, "leave": True}))
        return shown[-1]

    monkeypatch.setattr("selsft.score.tqdm", record)
    monkeypatch.setattr("selsft.evaluation.kept.tqdm", record)
    return shown


def test_scoring_counts_both_models(bars, options, tmp_path):
    args = SelectiveSFTConfig(**options)
    data = tiny.prompt_data()
    scored = score_dataset(
        tiny.llama(), data, output_dir=tmp_path / "scored", reference_model=tiny.llama(seed=1),
        tokenizer=tiny.tokenizer(), args=args,
    )  # fmt: skip
    (bar,) = bars
    assert bar.total == 2 * sum(map(len, scored["input_ids"])) and bar.n == bar.total


def test_answers_count_tokens(bars):
    found = greedy_answers(tiny.llama(), tiny.tokenizer(), [[5, 6, 7], [8, 9]], max_new_tokens=7)
    (bar,) = bars
    assert bar.total == 14 and bar.n == 14 and len(found) == 2
