"""Every scheme by name through the trainer: its labels and its loss against ordinary logits in float64."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.config import RHO_1_2404_07965, TOKEN_CLEANING_2502_01968
from selsft.labels import label_tokens

from . import tiny
from .oracle import expected_loss, plain_logps

EXCESS = {"score": "excess", "selection_scope": "batch"}
KEYS = ("loss", "grad_norm", "positive_loss", "negative_fraction")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def make(options, data=None, peft_config=None, reference=None, model=None, **changes):
    return SelectiveSFTTrainer(
        model=model or tiny.llama(),
        args=SelectiveSFTConfig(**{**options, "train_sampling_strategy": "sequential", **changes}),
        train_dataset=data if data is not None else tiny.tokenised_data(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        reference_model=reference,
    )


def steps(trainer):
    return [row for row in trainer.state.log_history if "grad_norm" in row]


def same_runs(first, second, keys=KEYS, rel=1e-5):
    assert len(steps(first)) == len(steps(second)) > 1
    for row, wanted in zip(steps(first), steps(second), strict=True):
        for key in keys:
            assert row.get(key) == pytest.approx(wanted.get(key), rel=rel, abs=1e-7), (key, row, wanted)


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


PACKING = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 24},
    "streamed": {},
}


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
            excess, None, LoraConfig(**LORA), reference, positive_fraction=0.6, excess_passes=passes,
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
        excess, None, LoraConfig(**LORA), "base", positive_fraction=0.6, precompute_scores=False, learning_rate=1.0
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
        make(excess, None, peft, tiny.llama(seed=1), excess_passes=passes, gradient_accumulation_steps=2, **rule)
        for passes in (2, 1)
    ]
    forwards = []
    for run in runs:
        calls = []
        run.model.get_input_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run.train()
        forwards.append(len(calls))
    same_runs(*runs)
    assert forwards[0] == 2 * forwards[1]
    assert all(0.1 < row["negative_fraction"] < 0.95 for row in steps(runs[0]))
    if gate:
        plain = make(excess, None, peft, tiny.llama(seed=1), **{**rule, "gate_reference_prob": None})
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


# --- presets ------------------------------------------------------------------------------------------------------


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


def test_token_cleaning_keeps_the_best_of_the_pool(options, tmp_path):
    run = make(options, reference=tiny.llama(seed=1), scoring_cache_dir=str(tmp_path), **TOKEN_CLEANING_2502_01968)
    rows = list(run.train_dataset)
    scores = np.concatenate([np.array(row["ref_logps"]) - np.array(row["base_logps"]) for row in rows])
    weights = np.concatenate([row["token_weights"] for row in rows])
    trained = np.concatenate([[y != -100 for y in row["labels"]] for row in rows])
    assert set(weights) == {0, 1} and (weights > 0).sum() == int(0.6 * trained.sum() + 1e-9)
    assert scores[weights > 0].min() > scores[trained & (weights == 0)].max()


def test_self_evolving_scores_part_t_with_the_model_of_part_t_minus_1(options, tmp_path):
    """Three parts, a moving reference: the base stays the first model, the reference is the last one trained."""
    parts = [tiny.tokenised_data(24).select(range(8 * t, 8 * t + 8)) for t in range(3)]
    settings = {
        **options,
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_steps": 2,
        "scoring_cache_dir": str(tmp_path / "c"),
    }
    first = make(settings, parts[0].add_column("token_weights", [[1.0] * len(row) for row in parts[0]["input_ids"]]))
    first.train()
    model = first.model.eval()
    for part in parts[1:]:
        base, reference = tiny.llama(), copy.deepcopy(model)
        scorer = make(settings, part, model=base, reference=reference, **TOKEN_CLEANING_2502_01968)
        wanted = [plain_logps(model, ids) - plain_logps(tiny.llama(), ids) for ids in part["input_ids"]]
        model.float()
        found = [np.array(row["ref_logps"]) - np.array(row["base_logps"]) for row in scorer.train_dataset]
        for have, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(have[3:], want[3:], atol=2e-5)
        assert all(np.abs(want[3:]).max() > 1e-3 for want in wanted)
        selected = scorer.train_dataset.select_columns(["input_ids", "labels", "token_weights"])
        trainer = make(settings, selected, model=model, forget_weight=0.0)
        before = {name: value.clone() for name, value in model.named_parameters()}
        trainer.train()
        model = trainer.model.eval()
        assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())


# --- controls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_oracle_is_a_weights_column_of_signs(packing, options):
    def mask(index, row):
        return [bool((index + t) % 3 == 0) for t in range(len(row))]

    def signs(index, row):
        return [-1.0 if value else 1.0 for value in mask(index, row)]

    # (a protected special token stays positive under a score, and is neutral in a span that was weighted negative)
    changes = {**PACKING[packing], "protect_special_tokens": False}
    runs = [
        make(options, tiny.tokenised_data(negative_mask=mask), score="oracle", **changes),
        make(options, tiny.tokenised_data(token_weights=signs), **changes),
    ]
    [run.train() for run in runs]
    same_runs(*runs)
    assert steps(runs[0])[0]["negative_fraction"] > 0.2


def test_oracle_of_a_stream(options):
    data = tiny.tokenised_data(negative_mask=lambda i, row: [t % 2 for t in range(len(row))])
    runs = [make(options, rows, score="oracle") for rows in (data, data.to_iterable_dataset())]
    [run.train() for run in runs]
    same_runs(*runs)
    assert steps(runs[0])[0]["negative_fraction"] > 0.2


def test_random_keeps_the_share_whatever_the_batches(options):
    labels = []
    for size in (1, 4):
        run = make(
            options,
            score="random",
            positive_fraction=0.7,
            per_device_train_batch_size=size,
            protect_special_tokens=False,
        )
        labels.append(run.train_dataset["token_weights"])
        run.train()
    flat = np.concatenate(labels[0])
    assert labels[0] == labels[1] and (flat > 0).sum() == int(0.7 * (flat != 0).sum() + 1e-9)
    assert make(options, score="random", positive_fraction=0.7, seed=1).train_dataset["token_weights"] != labels[0]


def test_given_scores_train(options):
    data = tiny.tokenised_data(token_scores=lambda i, row: [float((i + t) % 5) for t in range(len(row))])
    run = make(options, data, score="given", positive_fraction=0.5, protect_special_tokens=False)
    for row in run.train_dataset:
        assert [s >= 2 for s in row["token_scores"][3:]] == [w > 0 for w in row["token_weights"][3:]]
    run.train()


def test_gate_and_cap_reach_the_trainer(options, tmp_path):
    settings = {**options, "scoring_cache_dir": str(tmp_path), "negative_threshold": 0.05}
    runs = {
        name: make(settings, reference=tiny.llama(seed=1), **changes).train_dataset
        for name, changes in {
            "plain": {}, "gate": {"gate_reference_prob": 3.3e-3}, "cap": {"max_negative_share": 0.1}
        }.items()
    }  # fmt: skip
    gated = 0
    for plain, gate, cap in zip(*runs.values(), strict=True):
        for t, weight in enumerate(plain["token_weights"]):
            likely = math.exp(plain["ref_logps"][t]) >= 3.3e-3
            assert gate["token_weights"][t] == (1 if weight < 0 and likely else weight)
            gated += weight < 0 and likely
        trained = len(plain["labels"]) - 3
        assert sum(w < 0 for w in cap["token_weights"]) == min(int(0.1 * trained), plain["token_weights"].count(-1))
    assert gated > 5


def test_gate_and_cap_online_are_those_precomputed(options, tmp_path):
    for mode in ("padded", "padding_free", "packed"):
        changes = {
            **options, **PACKING[mode], "scoring_cache_dir": str(tmp_path), "negative_threshold": 0.02,
            "gate_reference_prob": 4e-3, "max_negative_share": 0.3,
        }  # fmt: skip
        offline = make(changes, reference=tiny.llama(seed=1))
        online = make(changes, reference=tiny.llama(seed=1), precompute_scores=False)
        values = set()
        for ready, raw in zip(offline.get_train_dataloader(), online.get_train_dataloader(), strict=True):
            online._annotator.annotate_batch(raw)
            assert torch.equal(ready["token_weights"], raw["token_weights"]), mode
            values |= set(ready["token_weights"][ready["labels"] != -100].tolist())
        assert values == {-1.0, 0.0, 1.0}


# --- refusals -----------------------------------------------------------------------------------------------------

CONTRADICTIONS = [
    ({"score": "excess"}, "selection_scope='global' with score='excess'"),
    ({"selection_scope": "batch", "positive_fraction": 0.5}, "selection_scope='batch' with score='influence'"),
    ({"excess_passes": 1}, "excess_passes=1 with score='influence'"),
    ({"excess_passes": 3}, "excess_passes=3 is unknown"),
    ({**EXCESS, "excess_decay": 1.0}, "excess_decay=1.0 is outside"),
    ({"score": "random"}, "positive_fraction is not set"),
    ({"score": "random", "negative_threshold": 1.0}, "positive_fraction is not set"),
    ({"score": "random", "positive_fraction": 0.5, "reference_model": "x"}, "reference_model='x' with score='random'"),
    ({"score": "oracle", "positive_fraction": 0.5}, "score='oracle' takes the labels"),
    ({"score": "oracle", "neutral_band": 0.5}, "score='oracle' takes the labels"),
    ({"score": "oracle", "max_negative_share": 0.5}, "max_negative_share=0.5 with score='oracle'"),
    ({"score": "given", "gate_reference_prob": 0.5}, "gate_reference_prob=0.5 with score='given'"),
    ({"gate_reference_prob": 0.0}, "gate_reference_prob=0.0 is outside"),
    ({"max_negative_share": 1.5}, "max_negative_share=1.5 is outside"),
    ({**EXCESS, "excess_passes": 1, "neutral_band": 0.5}, "neutral_band=0.5 with excess_passes=1"),
    ({**EXCESS, "excess_passes": 1, "max_negative_share": 0.5}, "max_negative_share=0.5 with excess_passes=1"),
    ({**EXCESS, "excess_passes": 1, "forget_normalization": "separate"}, "forget_normalization='separate' with"),
    ({**EXCESS, "excess_passes": 1, "forget_weight": 0.0}, "forget_weight=0 and negative_threshold with"),
    (
        {**EXCESS, "excess_passes": 1, "forget_weight": 0.0, "positive_fraction": 0.5, "gate_reference_prob": 0.5},
        "forget_weight=0 and gate_reference_prob with",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_contradictory_settings_get_one_clear_error(changes, message, options):
    with pytest.raises(ValueError, match=message):
        SelectiveSFTConfig(**options, **changes)


def streamed(**columns):
    return tiny.tokenised_data(**columns).to_iterable_dataset()


def ones(index, row):
    return [1.0] * len(row)


REFUSED = [
    (EXCESS, {}, "score='excess' compares with a reference"),
    ({"score": "oracle"}, {}, "score='oracle' needs the column 'negative_mask'"),
    ({"score": "given"}, {}, "score='given' needs the column 'token_scores'"),
    ({"score": "oracle"}, {"data": lambda: tiny.tokenised_data(token_weights=ones, negative_mask=ones)}, "both"),
    (
        {"score": "random", "positive_fraction": 0.5}, {"reference": lambda: tiny.llama(seed=1)},
        "score='random' needs no reference",
    ),
    ({"score": "random", "positive_fraction": 0.5}, {"data": streamed}, "this one is streamed"),
    (
        {"score": "given", "positive_fraction": 0.5}, {"data": lambda: streamed(token_scores=ones)},
        "positive_fraction=0.5 ranks the tokens of the whole dataset",
    ),
    (
        {"score": "oracle", "forget_objective": "npo"}, {"data": lambda: streamed(negative_mask=ones)},
        "forget_objective='npo' needs the log-probabilities at the start",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "arguments", "message"), REFUSED)
def test_data_that_does_not_fit_the_scheme_is_refused(changes, arguments, message, options):
    with pytest.raises(ValueError, match=message):
        make(options, **{name: value() for name, value in arguments.items()}, **changes)
