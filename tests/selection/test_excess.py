"""`score="excess"`: its labels and its loss against ordinary logits in float64, in every mode it must work in."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from selsft.config import RHO_1_2404_07965
from tests.selection.test_schemes import EXCESS, KEYS, PACKING, make, same_runs, steps
from tests.support import tiny
from tests.support.oracle import expected_loss, label_tokens, plain_logps

pytestmark = pytest.mark.slow

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def excess(options, tmp_path):
    """Settings of a short online run over 8 rows a step."""
    return {
        **options, **EXCESS, "scoring_cache_dir": str(tmp_path / "cache"), "per_device_train_batch_size": 8,
        "optim": "sgd", "learning_rate": 0.3, "forget_schedule": "constant", "forget_weight": 0.5,
    }  # fmt: skip


def excess_by_hand(rows, model, reference, **rule):
    """Rows with the token weights of one ranking over all of them, scores from ordinary logits."""
    rows = [dict(row) for row in rows]
    masks = [np.array([t > 0 and y != -100 for t, y in enumerate(row["labels"])]) for row in rows]
    scores = [
        (plain_logps(reference, row["input_ids"]) - plain_logps(model, row["input_ids"]))[mask]
        for row, mask in zip(rows, masks, strict=True)
    ]
    special = [np.isin(row["input_ids"], [0, 1, 2, 3])[mask] for row, mask in zip(rows, masks, strict=True)]
    flat = label_tokens(np.concatenate(scores), protected=np.concatenate(special), **rule)
    ends = np.cumsum([len(part) for part in scores])[:-1]
    for row, mask, labels in zip(rows, masks, np.split(flat, ends), strict=True):
        row["token_weights"] = np.zeros(mask.size)
        row["token_weights"][mask] = labels
    return rows


# --- excess, two passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [{"positive_fraction": 0.6}, {"negative_threshold": 0.05}], ids=["share", "threshold"]
)
@pytest.mark.parametrize("micro", [8, 2])
def test_excess_ranks_the_step_under_the_current_model(rule, micro, excess):
    """The second step too: its scores are those of the model that the first step has made."""
    size = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
    run, first = (make(excess, reference=tiny.llama(seed=1), max_steps=2, **size, **rule) for _ in range(2))
    data = list(run.train_dataset)
    first.args.max_steps = 1
    run.train(), first.train()
    models = [tiny.llama(), first.model]
    assert any(not torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    for step, model in enumerate(models):
        rows = excess_by_hand(data[8 * step : 8 * step + 8], model, tiny.llama(seed=1), **rule)
        labels = np.concatenate([row["token_weights"] for row in rows])
        found = steps(run)[step]
        assert (labels < 0).sum() > 5 and found["negative_fraction"] == pytest.approx(
            (labels < 0).sum() / (labels != 0).sum(), abs=1e-9
        )
        assert found["loss"] == pytest.approx(expected_loss(model, rows, "unlikelihood", "joint", 0.5), rel=1e-5)


@pytest.mark.parametrize("normalization", ["joint", "separate"])
def test_excess_does_not_depend_on_micro_batches(normalization, excess):
    runs = []
    for micro in (8, 4, 1):
        run = make(
            excess, reference=tiny.llama(seed=1), positive_fraction=0.6, forget_normalization=normalization,
            per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
        )  # fmt: skip
        run.train()
        runs.append(run)
    for run in runs[1:]:
        same_runs(run, runs[0], (*KEYS, "score_boundary"))


@pytest.mark.parametrize("passes", [2, 1])
@pytest.mark.parametrize("mode", PACKING)
def test_excess_with_the_reference_online_is_that_with_it_precomputed(mode, passes, excess):
    changes = {**excess, **PACKING[mode], "excess_passes": passes, "per_device_train_batch_size": 4}
    rule = {"positive_fraction": 0.6, "gradient_accumulation_steps": 2, "forget_objective": "npo"}
    ready = make(changes, reference=tiny.llama(seed=1), **rule)
    assert "ref_logps" in ready.train_dataset.column_names and "token_weights" not in ready.train_dataset.column_names
    data = tiny.tokenised_data().to_iterable_dataset() if mode == "streamed" else None
    online = make(changes, data, reference=tiny.llama(seed=1), precompute_scores=False, **rule)
    if mode != "streamed":
        assert "ref_logps" not in online.train_dataset.column_names
    ready.train(), online.train()
    same_runs(online, ready, (*KEYS, "score_boundary", "forget_loss"))
    assert 0.2 < steps(ready)[0]["negative_fraction"] < 0.5


def test_padding_does_not_change_the_excess(excess):
    runs = [make({**excess, **PACKING[mode]}, reference=tiny.llama(seed=1), positive_fraction=0.6) for mode in list(PACKING)[:2]]  # noqa: E501  # fmt: skip
    [run.train() for run in runs]
    same_runs(*runs, (*KEYS, "score_boundary"), rel=1e-4)


def saved_adapter(folder):
    model = get_peft_model(tiny.llama(), LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("online", [False, True], ids=["precomputed", "online"])
@pytest.mark.parametrize("passes", [2, 1])
def test_excess_of_a_lora_against_another_adapter(passes, online, excess, tmp_path):
    """One model in memory: the adapter in training against the adapter of the reference, and against a merged copy."""
    folder = saved_adapter(tmp_path / "adapter")
    merged = get_peft_model(tiny.llama(), LoraConfig(**LORA))
    merged.load_adapter(folder, "clean")
    merged.set_adapter("clean")
    merged = merged.merge_and_unload()
    runs = [
        make(
            excess, peft_config=LoraConfig(**LORA), reference=reference, positive_fraction=0.6, excess_passes=passes,
            precompute_scores=not online, learning_rate=1.0,
        )
        for reference in (folder, merged)
    ]  # fmt: skip
    [run.train() for run in runs]
    same_runs(*runs, (*KEYS, "score_boundary"))
    assert steps(runs[0])[0]["score_boundary"] != steps(runs[0])[-1]["score_boundary"]
    assert all(p.requires_grad for n, p in runs[0].model.named_parameters() if "lora_" in n and "selsft" not in n)


def test_excess_against_the_base_below_an_adapter(excess):
    """At the start the model is its base, all scores are 0 and tie: all positive; after a step they differ."""
    run = make(
        excess,
        peft_config=LoraConfig(**LORA),
        reference="base",
        positive_fraction=0.6,
        precompute_scores=False,
        learning_rate=1.0,
    )
    run.train()
    shares = [row["negative_fraction"] for row in steps(run)]
    assert shares[0] == 0 and 0.2 < shares[1] < 0.5


def test_dropout_does_not_blur_the_excess(excess):
    """Two passes score in evaluation mode: the boundary of the first step is that of the model without dropout."""
    boundaries = []
    for dropout in (0.0, 0.5):
        run = make(
            excess, model=tiny.llama(attention_dropout=dropout), reference=tiny.llama(seed=1), positive_fraction=0.6,
            max_steps=1,
        )  # fmt: skip
        run.train()
        assert run.model.training
        boundaries.append(steps(run)[0]["score_boundary"])
    assert boundaries[0] == boundaries[1]


def test_excess_from_a_column_needs_no_model(excess):
    ready = make(excess, reference=tiny.llama(seed=1), positive_fraction=0.6)
    again = make(excess, ready.train_dataset, positive_fraction=0.6)
    ready.train(), again.train()
    same_runs(again, ready)


# --- excess, one pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 3.3e-3])
@pytest.mark.parametrize("peft", [None, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)], ids=["full", "prompt"])  # noqa: E501  # fmt: skip
def test_one_pass_at_a_threshold_is_two_passes(peft, gate, excess):
    """Without dropout both see the same log-probabilities, so the whole runs agree."""
    rule = {"negative_threshold": 0.05, "gate_reference_prob": gate, "per_device_train_batch_size": 4}
    runs = [
        make(
            excess,
            peft_config=peft,
            reference=tiny.llama(seed=1),
            excess_passes=passes,
            gradient_accumulation_steps=2,
            **rule,
        )
        for passes in (2, 1)
    ]
    forwards = []
    for run in runs:
        calls = []
        run.model.get_input_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run.train()
        forwards.append(len(calls))
    same_runs(*runs)
    assert forwards[0] == 2 * forwards[1] and not runs[1]._excess._seen
    assert all(0.1 < row["negative_fraction"] < 0.95 for row in steps(runs[0]))
    if gate:
        plain = make(excess, peft_config=peft, reference=tiny.llama(seed=1), **{**rule, "gate_reference_prob": None})
        plain.train()
        assert steps(plain)[0]["negative_fraction"] > steps(runs[1])[0]["negative_fraction"]


def test_one_pass_follows_the_average_of_the_quantiles(excess):
    """With a learning rate of 0 the quantile of each step can be worked out beforehand."""
    run = make(
        excess, reference=tiny.llama(seed=1), positive_fraction=0.6, excess_passes=1, excess_decay=0.75,
        learning_rate=0.0,
    )  # fmt: skip
    data = list(run.train_dataset)
    run.train()
    quantiles = []
    for step in range(3):
        scores = np.concatenate(
            [
                (plain_logps(tiny.llama(seed=1), row["input_ids"]) - plain_logps(tiny.llama(), row["input_ids"]))[3:]
                for row in data[8 * step : 8 * step + 8]
            ]
        )
        quantiles.append(np.sort(scores)[scores.size - int(0.6 * scores.size + 1e-9)])
    first, second, third = quantiles
    # the first step is exact and starts the average; the second is selected with it and moves it
    wanted = [first, first, 0.75 * first + 0.25 * second]
    assert [row["score_boundary"] for row in steps(run)] == pytest.approx(wanted, abs=1e-6)
    assert run._excess.boundary == pytest.approx(0.75 * wanted[2] + 0.25 * third, abs=1e-6)


@pytest.mark.parametrize("forget_weight", [0.5, 0.0])
def test_one_pass_is_normalised_by_what_is_known_before(forget_weight, excess):
    """With forgetting: by all candidates. Dropping: by the share of them (Rho-1, eq. 5), not by how many passed."""
    run = make(
        excess, reference=tiny.llama(seed=1), positive_fraction=0.6, excess_passes=1, learning_rate=0.0,
        forget_weight=forget_weight, max_steps=2,
    )  # fmt: skip
    data = list(run.train_dataset)
    run.train()
    boundary = steps(run)[1]["score_boundary"]
    rows = excess_by_hand(data[8:16], tiny.llama(), tiny.llama(seed=1), negative_threshold=-boundary)
    labels = np.concatenate([row["token_weights"] for row in rows])
    mean = expected_loss(tiny.llama(), rows, "unlikelihood", "joint", forget_weight)
    total = mean * (labels != 0).sum()
    candidates = sum(len(row["input_ids"]) - 3 for row in rows)
    assert (labels != 0).sum() == candidates and (labels > 0).sum() != int(0.6 * candidates)
    assert steps(run)[1]["selected_fraction"] == pytest.approx((labels > 0).sum() / candidates)
    assert steps(run)[1]["loss"] == pytest.approx(total / (candidates * (1.0 if forget_weight else 0.6)), rel=1e-5)


def test_one_pass_resumes_with_its_average(excess, tmp_path):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "positive_fraction": 0.6, "excess_passes": 1}
    whole = make(excess, reference=tiny.llama(seed=1), **changes)
    whole.train()
    saved = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["ExcessSelector"]["attributes"]["boundary"]
    assert kept == pytest.approx(steps(whole)[3]["score_boundary"])
    resumed = make({**excess, **changes, "output_dir": str(tmp_path / "two")}, reference=tiny.llama(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    after = {row["step"]: row for row in steps(resumed)}
    for row in steps(whole)[3:]:
        for key in (*KEYS, "score_boundary"):
            assert after[row["step"]][key] == pytest.approx(row[key], rel=1e-6), key


def test_resuming_two_passes_continues_the_same_trajectory(excess, tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "positive_fraction": 0.6}
    whole = make(excess, reference=tiny.llama(seed=1), **changes)
    whole.train()
    resumed = make({**excess, **changes, "output_dir": str(tmp_path / "two")}, reference=tiny.llama(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    after = {row["step"]: row for row in steps(resumed)}
    for row in steps(whole)[2:]:
        for key in (*KEYS, "score_boundary"):
            assert after[row["step"]][key] == pytest.approx(row[key], rel=1e-6), key


@pytest.mark.parametrize("passes", [2, 1])
def test_rho_1_is_the_mean_over_the_kept_tokens(passes, excess):
    """Eq. 5: the NLL of the best 60 % of the step, divided by their number; nothing is forgotten."""
    run = make({**excess, **RHO_1_2404_07965}, reference=tiny.llama(seed=1), max_steps=1, excess_passes=passes)
    data = list(run.train_dataset)[:8]
    run.train()
    scores, nll = [], []
    for row in data:
        current = plain_logps(tiny.llama(), row["input_ids"])
        scores.append((plain_logps(tiny.llama(seed=1), row["input_ids"]) - current)[3:])
        nll.append(-current[3:])
    best = np.argsort(-np.concatenate(scores))[: int(0.6 * sum(map(len, scores)) + 1e-9)]
    assert steps(run)[0]["loss"] == pytest.approx(np.concatenate(nll)[best].mean(), rel=1e-5)
    assert steps(run)[0]["negative_fraction"] == 0
