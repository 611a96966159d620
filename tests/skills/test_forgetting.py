"""Gap, ratio, outcome, transitions and agreement, on tables whose accuracies are set by hand."""

import math

import numpy as np
import pytest

from selsft.skills import forgetting as fg
from selsft.skills import metrics
from selsft.skills.table import ALL_TASKS
from tests.support.skill_tables import columns, table


def answers(right: float, n: int = 100) -> np.ndarray:
    """(n,) margins with a share `right` positive, the first ones."""
    return np.where(np.arange(n) < round(right * n), 1.0, -1.0)


def model(stage="forgotten", task="a", method="uniform", seed=0, run=None):
    task = "" if stage == "base" else task
    return (run or f"x-seed{seed}", seed, stage, method if stage == "forgotten" else "", task)


def part(which, right, task="a", split="test", n=100, **more):
    margin = answers(right, n) if np.isscalar(right) else np.asarray(right, dtype=float)
    return columns(which, task, split, -1, margin, np.arange(len(margin)) % 2, **more)


def ends(*parts):
    return fg.Ends(metrics.questions(table(*parts).to_pandas()))


def result(*parts, chance=0.5, **more):
    found = ends(*parts)
    rows = fg.forgetting(found, dict.fromkeys(found.ids, chance), draws=400, **more)
    return rows.iloc[0] if len(rows) == 1 else rows


def three(base, tuned, left, method="uniform", n=100):
    return [
        part(model("base"), base, n=n),
        part(model("finetuned"), tuned, n=n),
        part(model(method=method), left, n=n),
    ]


def test_gap_and_ratio_by_hand():
    row = result(*three(0.6, 0.9, 0.7))
    assert row["base"] == pytest.approx(0.6) and row["finetuned"] == pytest.approx(0.9)
    assert row["drop"] == pytest.approx(0.2) and row["gap"] == pytest.approx(0.2)
    assert row["ratio"] == pytest.approx(0.5) and row["ratio_reason"] == ""
    assert (row["n_seeds"], row["n_examples"], row["variant"]) == (1, 100, "x")
    assert row["outcome"] == fg.PARTLY
    for name in ("base", "finetuned", "forgotten", "drop", "gap", "ratio"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"], name
    # The drop is of 20 examples of 100, paired: standard error sqrt(0.2 * 0.8 / 100) = 0.04.
    assert row["drop_high"] - row["drop_low"] == pytest.approx(2 * 1.96 * 0.04, rel=0.15)
    assert math.isnan(row["flipped_ratio"]) and row["flipped_reason"] == "labels were not flipped"
    p = 1 / (1 + math.exp(-1))
    assert row["base_confidence"] == pytest.approx(0.6 * p + 0.4 * (1 - p))
    assert row["forgotten_confidence"] == pytest.approx(0.7 * p + 0.3 * (1 - p))


def test_flipped_by_hand():
    row = result(*three(0.6, 0.9, 0.3, method="flip"))
    assert row["flipped_ratio"] == pytest.approx(0.75)  # (0.9 - 0.3) / (0.9 - 0.1)
    assert row["ratio"] == pytest.approx(1.5) and row["outcome"] == fg.TO_CHANCE and row["gap"] == pytest.approx(-0.2)
    row = result(*three(0.6, 0.9, 0.3, method="flip"), chance=0.25)
    assert math.isnan(row["flipped_ratio"]) and "two options" in row["flipped_reason"]
    assert row["ratio"] == pytest.approx(0.6 / 0.65)


def test_no_ratio_near_chance():
    row = result(*three(0.5, 0.6, 0.5))
    assert math.isnan(row["ratio"]) and math.isnan(row["ratio_low"]) and row["outcome"] is None
    assert (
        row["ratio_reason"].startswith("fine-tuned accuracy 0.60 (from 0.5") and "chance 0.50" in row["ratio_reason"]
    )
    assert row["drop"] == pytest.approx(0.1) and row["gap"] == pytest.approx(0.0, abs=1e-12)
    # With a hundred times the examples the same accuracies do, unless the margin asks for more.
    assert result(*three(0.5, 0.6, 0.5, n=10_000))["ratio"] == pytest.approx(1.0)
    assert math.isnan(result(*three(0.5, 0.6, 0.5, n=10_000), margin=0.1)["ratio"])


@pytest.mark.parametrize(
    ("tuned", "left", "n", "outcome"),
    [
        (0.9, 0.9, 200, fg.UNFORGOTTEN),
        (0.9, 0.92, 200, fg.UNFORGOTTEN),
        (0.9, 0.7, 200, fg.PARTLY),
        (0.9, 0.51, 200, fg.TO_CHANCE),
        (0.9, 0.1, 200, fg.TO_CHANCE),
    ],
)
def test_outcomes(tuned, left, n, outcome):
    assert result(*three(0.6, tuned, left, n=n))["outcome"] == outcome


def test_undecided_outcome():
    # 16 of 20 right before; after, other 14 of 20: neither the drop nor the rest is clear.
    after = np.ones(20)
    after[:6] = -1
    row = result(part(model("finetuned"), 0.8, n=20), part(model(), after), margin=0.0)
    assert row["ratio_low"] < 0 < row["ratio_high"] and row["drop_low"] <= 0
    assert row["outcome"] in (None, fg.UNFORGOTTEN)
    both = result(part(model("finetuned"), 0.8, n=20), part(model(), np.roll(answers(0.6, 20), 8)), margin=0.0)
    assert both["outcome"] is None and "too few examples" in both["outcome_reason"]


def test_seeds_are_paired_and_averaged():
    parts = []
    for seed, (tuned, left) in enumerate([(0.9, 0.6), (0.8, 0.7), (0.85, 0.5)]):
        parts += [part(model("finetuned", seed=seed), tuned), part(model(seed=seed), left)]
    row = result(*parts)
    assert row["n_seeds"] == 3 and row["variant"] == "x"
    assert row["finetuned"] == pytest.approx(0.85) and row["forgotten"] == pytest.approx(0.6)
    assert row["ratio"] == pytest.approx(0.25 / 0.35)  # Of the means, not the mean of ratios.
    assert math.isnan(row["base"])
    one = result(*parts[:2])
    assert one["n_seeds"] == 1 and row["drop_high"] - row["drop_low"] > one["drop_high"] - one["drop_low"]


def test_a_seed_without_its_stage_is_left_out():
    row = result(part(model("finetuned"), 0.9), part(model(), 0.6), part(model(seed=1), 0.1))
    assert row["n_seeds"] == 1 and row["forgotten"] == pytest.approx(0.6)


def test_without_a_fine_tuned_model():
    row = result(part(model("base"), 0.6), part(model(), 0.7))
    assert math.isnan(row["ratio"]) and row["outcome"] is None and math.isnan(row["drop"])
    assert row["ratio_reason"] == "no fine-tuned model (per_task) of the same seed was evaluated here"
    assert row["gap"] == pytest.approx(0.2) and row["n_seeds"] == 1 and row["gap_low"] < 0.2 < row["gap_high"]


def test_examples_that_a_stage_lacks_are_left_out():
    row = result(part(model("finetuned"), 1.0, n=60), part(model(), [1.0] * 45 + [-1.0] * 15 + [-1.0] * 40))
    assert row["n_examples"] == 60 and row["forgotten"] == pytest.approx(0.75) and row["finetuned"] == 1.0


def test_one_base_serves_all_seeds():
    parts = [part(model("base"), 0.6)]
    for seed in (0, 1):
        parts += [part(model("finetuned", seed=seed), 0.9), part(model(seed=seed), 0.7)]
    row = result(*parts)
    assert row["n_seeds"] == 2 and row["base"] == pytest.approx(0.6)
    assert row["base_high"] - row["base_low"] == pytest.approx(2 * 1.96 * np.sqrt(0.24 / 100), rel=0.15)


def test_references():
    parts = [
        part(model("finetuned", "a"), 0.7, task="b"),
        part(model("finetuned", "b"), 0.9, task="b"),
        part(model("finetuned", ALL_TASKS), 0.8, task="b"),
        part(model("forgotten", "a"), 0.6, task="b"),
    ]
    assert result(*parts, reference="per_task")["ratio"] == pytest.approx(0.3 / 0.4)
    assert result(*parts, reference="parent")["ratio"] == pytest.approx(0.1 / 0.2)
    assert result(*parts, reference="shared")["ratio"] == pytest.approx(0.2 / 0.3)
    assert result(*parts[1:], reference="parent")["ratio"] == pytest.approx(0.2 / 0.3)  # Its parent is the shared one.
    with pytest.raises(ValueError, match="reference must be one of per_task, parent, shared; got 'own'"):
        result(*parts, reference="own")


def test_runs_that_cannot_be_told_apart():
    parts = [
        part(model("finetuned", run="full-seed0"), 0.9),
        part(model("finetuned", run="lora-seed0"), 0.8),
    ]
    with pytest.raises(ValueError, match=r"several fine-tuned \(a\) models fit \(full-seed0, lora-seed0\)"):
        result(*parts, part(model(run="uniform-seed0"), 0.7))
    row = result(*parts, part(model(run="lora-seed0"), 0.7))
    assert row["finetuned"] == pytest.approx(0.8) and row["variant"] == "lora"


def test_variants():
    assert fg.Model("uniform-full-seed0", 0, "", "", "").variant == "uniform-full"
    assert fg.Model("seed12_lora", 12, "", "", "").variant == "lora"
    assert fg.Model("full-seed10", 1, "", "", "").variant == "full-seed10"  # Not seed 1.
    assert fg.Model("seed3", 3, "", "", "").variant == "run"


def test_transitions_by_hand():
    base = [1, 1, 1, 1, -1, -1, -1, -1, -1, -1]
    tuned = [1, 1, -1, -1, 1, 1, -1, -1, 1, 1]
    left = [1, -1, 1, -1, 1, -1, 1, -1, -1, -1]
    found = fg.transitions(ends(part(model("base"), base), part(model("finetuned"), tuned), part(model(), left)))
    counts = {(r.base, r.finetuned, r.forgotten): r.n for r in found.itertuples()}
    assert len(counts) == 8 and counts[False, True, False] == 3
    assert all(n == 1 for key, n in counts.items() if key != (False, True, False))
    assert found["share"].sum() == pytest.approx(1.0)
    assert fg.transitions(ends(part(model(), left))).empty


def test_agreement_by_hand():
    gold = np.arange(10) % 2
    assigned = np.where(np.arange(10) < 6, gold, 1 - gold)  # 4 of 10 are wrong.
    tuned = part(model("finetuned"), 1.0, split="train", n=10)
    # After: right on the first five; wrong, so with the assigned label, on three of the four wrong ones.
    after = part(model(), [1, 1, 1, 1, 1, -1, -1, -1, -1, 1], split="train", assigned=assigned)
    found = metrics.questions(table(tuned, after).to_pandas())
    row = fg.agreement(found, fg.Ends(found)).iloc[0]
    assert row["n"] == 10 and row["match_rate"] == 0.6
    assert row["gold_before"] == 1.0 and row["gold_after"] == 0.6
    assert row["assigned_before"] == 0.6 and row["assigned_after"] == pytest.approx(0.8)
    assert row["wrong_before"] == 0.0 and row["wrong_after"] == 0.75
    alone = metrics.questions(table(after).to_pandas())
    row = fg.agreement(alone, fg.Ends(alone)).iloc[0]
    assert math.isnan(row["assigned_before"]) and row["assigned_after"] == pytest.approx(0.8)
    none = metrics.questions(table(tuned, part(model(), 0.5, split="train", n=10)).to_pandas())
    assert fg.agreement(none, fg.Ends(none)).empty


def test_more_than_two_options():
    gold = np.arange(90) % 3
    parts = [columns(model("finetuned"), "a", "test", -1, answers(0.9, 90), gold, k=3)]
    parts += [columns(model(), "a", "test", -1, answers(0.6, 90), gold, k=3)]
    found = metrics.questions(table(*parts).to_pandas())
    chances = metrics.chances(found, table(*parts).to_pandas())
    row = fg.forgetting(fg.Ends(found), chances, draws=200).iloc[0]
    assert row["chance"] == pytest.approx(1 / 3)
    assert row["ratio"] == pytest.approx(0.3 / (0.9 - 1 / 3)) and row["gap"] == pytest.approx(0.6 - 1 / 3)
