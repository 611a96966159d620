"""Every scheme by name through the trainer: its labels and its loss against ordinary logits in float64."""

import copy
import functools
import math

import numpy as np
import pytest
import torch

from selsft import SelectiveSFTConfig
from selsft.config import TOKEN_CLEANING_2502_01968
from tests.support import tiny, trainers
from tests.support.oracle import plain_logps

pytestmark = pytest.mark.slow

EXCESS = {"score": "excess", "selection_scope": "batch"}
KEYS = ("loss", "grad_norm", "positive_loss", "negative_fraction")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


make = functools.partial(trainers.make, train_sampling_strategy="sequential")


def steps(trainer):
    return [row for row in trainer.state.log_history if "grad_norm" in row]


def same_runs(first, second, keys=KEYS, rel=1e-5):
    assert len(steps(first)) == len(steps(second)) > 1
    for row, wanted in zip(steps(first), steps(second), strict=True):
        for key in keys:
            assert row.get(key) == pytest.approx(wanted.get(key), rel=rel, abs=1e-7), (key, row, wanted)


PACKING = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 24},
    "streamed": {},
}


# --- presets ------------------------------------------------------------------------------------------------------


def test_token_cleaning_keeps_the_best_of_the_pool(options, tmp_path):
    run = make(options, reference=tiny.llama(seed=1), scoring_cache_dir=str(tmp_path), **TOKEN_CLEANING_2502_01968)
    rows = list(run.train_dataset)
    scores = np.concatenate([np.array(row["ref_logps"]) - np.array(row["base_logps"]) for row in rows])
    weights = np.concatenate([row["token_weights"] for row in rows])
    trained = np.concatenate([[y != -100 for y in row["labels"]] for row in rows])
    assert set(weights) == {0, 1} and (weights > 0).sum() == int(0.6 * trained.sum() + 1e-9)
    assert scores[weights > 0].min() > scores[trained & (weights == 0)].max()


@pytest.mark.parametrize("pooling", ["token", "word_sum"])
@pytest.mark.parametrize("mode", PACKING)
def test_surprisal_in_every_mode(mode, pooling, options, tmp_path):
    """Negative is what the policy at the start finds unlikely, computed beforehand or between the steps."""
    data = tiny.tokenised_data(24)
    shared = {"score": "surprisal", "score_pooling": pooling, "forget_schedule": "constant", **PACKING[mode]}
    shared |= {"negative_threshold": 4.0 if pooling == "token" else 6.0, "scoring_cache_dir": str(tmp_path)}
    before = make(options, data, **shared)
    if mode == "padded" and pooling == "token":
        for row in before.train_dataset:
            logps = plain_logps(tiny.llama().eval(), row["input_ids"])
            special = {tiny.tokenizer().eos_token_id, *tiny.tokenizer().all_special_ids}
            for t, (token, label, weight) in enumerate(
                zip(row["input_ids"], row["labels"], row["token_weights"], strict=True)
            ):
                if t and label != -100 and token not in special and abs(logps[t] + 4.0) > 1e-4:
                    assert (weight < 0) == (logps[t] < -4.0)
    if mode == "streamed":
        now = make(options, data.to_iterable_dataset(), **shared)
    else:
        now = make(options, data, precompute_scores=False, **shared)
    before.train()
    now.train()
    assert 0 < steps(before)[0]["negative_fraction"] < 1
    same_runs(before, now)


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
            online._weigher.weigh_batch(raw)
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
        "score='random' reads no reference",
    ),
    ({"score": "random", "positive_fraction": 0.5}, {"data": streamed}, "this one is streamed"),
    (
        {"score": "given", "positive_fraction": 0.5}, {"data": lambda: streamed(token_scores=ones)},
        "positive_fraction=0.5 ranks the tokens of the whole dataset",
    ),
    (
        {"score": "oracle", "forget_objective": "npo"}, {"data": lambda: streamed(negative_mask=ones)},
        "forget_objective='npo' and anchor_weight need the log-probabilities at the start",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "arguments", "message"), REFUSED)
def test_data_that_does_not_fit_the_scheme_is_refused(changes, arguments, message, options):
    with pytest.raises(ValueError, match=message):
        make(options, **{name: value() for name, value in arguments.items()}, **changes)
