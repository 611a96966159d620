"""What a dry run says of costs."""

import pytest

from selsft.pipeline.budget import Speed, costs, count_tokens, measure
from tests.support.recipe import plan


def test_tokens_of_a_sample_are_those_that_the_check_counts(folder):
    found = plan()
    before = count_tokens(found)
    assert before["train"][0] == 48 - 5 - 14 and before["eval"][0] == 5
    for stage in found.stages[:2]:
        stage.run()
    after = count_tokens(found)
    assert after["train"][1] == pytest.approx(before["train"][1], rel=0.1)


def test_costs_follow_from_tokens_and_speeds(folder):
    speed = Speed(scoring=100.0, training=10.0, decoding=1.0, overhead=7.0)
    tokens = {"train": (20, 1000), "reference": (10, 500), "eval": (5, 100)}
    found = costs(plan("--num_train_epochs", "2", "--max_steps", "-1"), tokens, speed)
    assert found["train-plain-seed42"].seconds == pytest.approx(2 * 1000 / 10 + 7)
    assert found["reference"].seconds == pytest.approx(2 * 500 / 10 + 7)
    assert found["score"].seconds == pytest.approx(2 * 1000 / 100 + 7)  # policy and reference
    assert found["evaluate-base"].seconds == pytest.approx(2 * 100 / 100 + 5 * 3 / 1 + 7)
    steps = costs(plan("--max_steps", "3"), tokens, speed)
    assert steps["train-plain-seed42"].tokens == 3 * 8 * 1000 // 20
    assert "select" not in found


def test_a_second_is_measured(folder, monkeypatch):
    monkeypatch.setattr("selsft.pipeline.budget.MEASURED", 0.01)
    speed = measure(plan(), 12)
    assert min(speed.scoring, speed.training, speed.decoding, speed.overhead) > 0
