"""The selective step: what is counted, weighted, logged, resumed and refused."""

import inspect
import math
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig
from trl import SFTConfig, SFTTrainer

from selsft import PAPER_2508_04329, SelectiveSFTConfig
from tests.support import tiny, trainers
from tests.support.oracle import expected_loss

# Of TRL, about what its own loss does with settings that are refused here
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v2.0.0:FutureWarning")
OBJECTIVES = ("unlikelihood", "probability", "npo", "wga", "gradient_ascent")


def signed(index, row):
    """Weights of every sign and of several sizes; the prompt's are ignored since it has no labels."""
    return [(-1.0, 1.0, 0.5, -0.5, 0.0)[(index + position) % 5] for position in range(len(row))]


def weighted_data(rows=24):
    return tiny.tokenised_data(rows, token_weights=signed)


def make(options, data=None, peft_config=None, reference=None, **changes):
    data = data if data is not None else weighted_data()
    return trainers.make(options, data, peft_config=peft_config, reference=reference, **changes)


def steps(trainer):
    return [row for row in trainer.state.log_history if "grad_norm" in row]


@pytest.mark.parametrize("normalization", ["joint", "separate"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.filterwarnings("ignore:forget_objective='gradient_ascent'")
def test_first_loss_is_the_documented_formula(objective, normalization, options, tmp_path):
    beta = {"forget_beta": 1.5} if objective in ("npo", "wga") else {}
    run = make(
        options, weighted_data(12), forget_objective=objective, forget_normalization=normalization, forget_weight=0.7,
        forget_schedule="constant", **beta, per_device_train_batch_size=4, gradient_accumulation_steps=3,
        max_steps=1, scoring_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    if objective == "npo":  # the start of training is the model itself: move it away, so that it matters
        run.train_dataset = run.train_dataset.map(lambda row: {"base_logps": [x - 0.3 for x in row["base_logps"]]})
    rows = list(run.train_dataset)
    run.train()
    wanted = expected_loss(tiny.llama(), rows, objective, normalization, 0.7, beta=1.5)
    assert steps(run)[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_anchor_adds_the_divergence_from_the_start(options, tmp_path):
    losses, kept = [], None
    for weight in (None, 0.5):
        run = make(
            options, weighted_data(12), anchor_weight=weight, max_steps=1, per_device_train_batch_size=12,
            scoring_cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        if weight is not None:  # the start of training is the model itself: move it away, so that it matters
            kept = list(run.train_dataset)
            run.train_dataset = run.train_dataset.map(lambda row: {"base_logps": [x / 4 for x in row["base_logps"]]})
        run.train()
        losses.append(steps(run)[0]["loss"])
    columns = [zip(row["base_logps"][1:], row["token_weights"][1:], row["labels"][1:], strict=True) for row in kept]
    lp = torch.tensor([x for each in columns for x, w, y in each if w and y != -100]).double()
    p, q = lp.exp(), (lp / 4).exp()
    divergence = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    assert losses[1] - losses[0] == pytest.approx(0.5 * divergence.mean().item(), rel=1e-4)


@pytest.mark.parametrize("normalization", ["joint", "separate"])
def test_terms_beside_the_objective_on_materialised_logits(normalization, options):
    """Loss and gradient of the first step, against autograd through ordinary logits in float64."""
    gate, data = 5.698, weighted_data(12)  # the tiny model's entropies lie on both sides
    run = make(
        options, data, entropy_gate=gate, z_loss_weight=0.01, forget_normalization=normalization, forget_weight=0.7,
        forget_schedule="constant", per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=1,
    )  # fmt: skip
    rows = list(run.train_dataset)
    run.train()
    model = tiny.llama().double()
    positive, negative, squares, shares = [], [], [], []
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        logps = logits.log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1).detach()
        for place, weight in enumerate(row["token_weights"][1:]):
            if not weight or row["labels"][place + 1] == -100:
                continue
            logp = logps[place, row["input_ids"][place + 1]]
            squares.append(logits[place].logsumexp(-1) ** 2)
            if weight > 0:
                shares.append(min(1.0, entropy[place].item() / gate))
                positive.append(-weight * shares[-1] * logp)
            else:
                negative.append(weight * torch.log1p(-logp.exp()))
    assert min(shares) < 1.0 == max(shares)
    counts = (len(positive) + len(negative),) * 2 if normalization == "joint" else (len(positive), len(negative))
    loss = (sum(positive) + 0.01 * sum(squares)) / counts[0] + 0.7 * sum(negative) / counts[1]
    loss.backward()
    norm = torch.stack([each.grad.norm() for each in model.parameters()]).norm().item()
    assert steps(run)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert steps(run)[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("normalization", ["joint", "separate"])
def test_batches_of_a_step_are_one_batch(normalization, options):
    histories, states = [], []
    for size in (8, 4, 1):
        run = make(
            options, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, optim="sgd",
            learning_rate=0.3, forget_normalization=normalization, forget_weight=1.0, max_steps=4,
        )  # fmt: skip
        run.train()
        histories.append(steps(run))
        states.append({name: value.clone() for name, value in run.model.state_dict().items()})
    for other, state in zip(histories[1:], states[1:], strict=True):
        for row, wanted in zip(other, histories[0], strict=True):
            for key in ("loss", "grad_norm", "positive_loss", "forget_loss", "negative_fraction", "negative_prob"):
                assert row[key] == pytest.approx(wanted[key], rel=2e-5), key
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_forget_weight_zero_is_ignoring(options):
    """lambda = 0 gives the run in which negatives have no label at all, as SFTTrainer trains it."""
    sign = lambda index, row: [-1.0 if (index + t) % 4 == 0 else 1.0 for t in range(len(row))]  # noqa: E731
    data = tiny.tokenised_data(token_weights=sign)
    ignored = data.map(
        lambda row: {
            "labels": [-100 if w < 0 else y for w, y in zip(row["token_weights"], row["labels"], strict=True)]
        }
    )
    changes = {"optim": "sgd", "learning_rate": 0.3}
    run = make(options, data, forget_weight=0.0, protect_special_tokens=False, **changes)
    plain = SFTTrainer(
        tiny.llama(), SFTConfig(**options | changes), train_dataset=ignored.remove_columns("token_weights"),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    run.train(), plain.train()
    for row, wanted in zip(steps(run), steps(plain), strict=True):
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), key


def test_forgetting_lowers_and_learning_keeps_probability(options):
    model, data = tiny.llama(), tiny.tokenised_data(8)
    settings = {**options, "max_steps": 60, "per_device_train_batch_size": 8}
    SFTTrainer(model, SFTConfig(**settings), train_dataset=data, processing_class=tiny.tokenizer()).train()
    signs = tiny.tokenised_data(8, token_weights=lambda i, row: [-1.0 if t % 2 else 1.0 for t in range(len(row))])
    run = make(settings, signs, model=model, forget_weight=1.0, forget_schedule="constant", max_steps=20)
    run.train()
    first, last = steps(run)[0], steps(run)[-1]
    assert first["negative_prob"] > 0.5 and last["negative_prob"] < 0.05
    assert last["positive_loss"] < first["positive_loss"] + 0.1


def test_metrics_describe_the_tokens(options):
    run = make(options, max_steps=2, forget_weight=0.5, logging_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    weights, labels = batch["token_weights"][:, 1:], batch["labels"][:, 1:]
    with torch.no_grad():
        logits = run.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    positive, negative = weights > 0, weights < 0
    run.train()
    row = steps(run)[0]
    assert row["negative_fraction"] == pytest.approx(float(negative.sum() / (weights != 0).sum()))
    assert row["positive_loss"] == pytest.approx(float(nll[positive].mean()), rel=1e-5)
    assert row["negative_prob"] == pytest.approx(float((-nll[negative]).exp().mean()), rel=1e-5)
    assert row["forget_loss"] == pytest.approx(float(-torch.log1p(-(-nll[negative]).exp()).mean()), rel=1e-4)
    below = (-nll[negative] < math.log(0.01)).float().mean()
    assert row["negative_below_1e-2"] == pytest.approx(float(below)) and row["negative_below_1e-6"] == 0
    assert row["mean_token_accuracy"] == pytest.approx(
        float(((logits.argmax(-1) == labels) & positive).sum() / positive.sum())
    )
    assert [r["forget_weight"] for r in steps(run)] == pytest.approx([0.0, 0.25])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forget_objective": "unlikelihood"}, True),
        ({"forget_objective": "unlikelihood", "warmup_steps": 2}, True),
        ({"forget_objective": "unlikelihood", "warmup_steps": 9}, False),
        ({"forget_objective": "npo"}, False),
        ({"forget_objective": "wga", "forget_beta": 0.5}, False),
        ({"forget_objective": "unlikelihood", "forget_weight": 0.0}, False),
    ],
)
def test_an_objective_without_gradient_is_named_once(changes, said, options, caplog):
    model = tiny.llama()
    with torch.no_grad():  # far from uniform: nearly all of these tokens have p < 0.01
        model.lm_head.weight.mul_(1000)
    data = tiny.tokenised_data(24, token_weights=lambda i, row: [-1.0 if t % 2 else 1.0 for t in range(len(row))])
    run = make({**options, "learning_rate": 0.0}, data, model=model, **changes)
    run.train()
    if changes.get("forget_weight") != 0.0:
        assert steps(run)[0]["negative_below_1e-2"] > 0.9
    assert caplog.text.count("has next to no gradient") == said


def test_metrics_are_sums_over_all_steps_between_logs(options, monkeypatch):
    """Also when more steps go by than are kept one by one."""
    settings = {"max_steps": 5, "forget_schedule": "constant", "learning_rate": 0.0}
    each = make(options, **settings)
    each.train()
    monkeypatch.setattr("selsft.trainer._KEPT", 2)
    once = make({**options, "logging_steps": 5}, **settings)
    once.train()
    counts = [(batch["token_weights"][:, 1:] > 0).sum().item() for batch in make(options).get_train_dataloader()][:5]
    wanted = sum(n * row["positive_loss"] for n, row in zip(counts, steps(each), strict=True)) / sum(counts)
    assert len(set(counts)) > 1 and steps(once)[0]["positive_loss"] == pytest.approx(wanted, rel=1e-5)
    assert len(steps(once)) == 1 and not once._outputs


def test_eval_loss_is_the_plain_nll(options):
    run = make(options, max_steps=2)
    plain = SFTTrainer(
        tiny.llama(), SFTConfig(**options), train_dataset=tiny.text_data(), processing_class=tiny.tokenizer()
    )
    held_out = tiny.prompt_data(8)
    wanted, found = plain.evaluate(held_out), run.evaluate(held_out)
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert found[key] == wanted[key], key


def test_resuming_continues_the_same_trajectory(options, tmp_path):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "forget_weight": 1.0}
    whole = make(options, **changes)
    whole.train()
    resumed = make(options, **{**changes, "output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=options["output_dir"] + "/checkpoint-3")
    assert [row["forget_weight"] for row in steps(whole)] == pytest.approx([step / 6 for step in range(6)])
    after = {row["step"]: row for row in steps(resumed)}
    for row in steps(whole)[3:]:
        for key in ("loss", "grad_norm", "forget_weight", "negative_prob"):
            assert after[row["step"]][key] == pytest.approx(row[key], rel=1e-6), key
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("streamed", [False, True], ids=["loaded", "streamed"])
def test_reference_trains_online(streamed, options, tmp_path):
    """Scoring each step first gives the run that scored everything before."""
    changes = {
        "negative_threshold": 0.1,
        "score_base_weight": 1.0,
        "score_pooling": "token",
        "optim": "sgd",
        "scoring_cache_dir": str(tmp_path / "c"),
        "seed": 1,
    }
    data = tiny.prompt_data()
    offline = make(options, data, reference=tiny.llama(seed=1), **changes)
    if streamed:
        offline.get_train_dataloader = lambda: torch.utils.data.DataLoader(
            offline.train_dataset.select_columns(["input_ids", "labels", "token_weights"]),
            batch_size=4, collate_fn=offline.data_collator,
        )  # fmt: skip
        data = data.to_iterable_dataset()
    online = make(options, data, reference=tiny.llama(seed=1), precompute_scores=False, **changes)
    offline.train(), online.train()
    for row, wanted in zip(steps(online), steps(offline), strict=True):
        assert row["negative_fraction"] > 0.1
        for key in ("loss", "grad_norm", "negative_fraction", "positive_loss"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), key


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["lora", "dora", "modules_to_save", "prompt_tuning"],
)
def test_adapters_train_selectively(config, options, tmp_path):
    run = make(
        options, tiny.prompt_data(), config, tiny.llama(seed=1), negative_threshold=0.1,
        score_base_weight=1.0, score_pooling="token", learning_rate=0.1,
        max_steps=6, scoring_cache_dir=str(tmp_path / "c"), forget_weight=1.0,
    )  # fmt: skip
    before = {name: value.clone() for name, value in run.model.named_parameters() if value.requires_grad}
    run.train()
    assert all(np.isfinite(row["loss"]) and row["negative_fraction"] > 0.1 for row in steps(run))
    moved = [
        name for name, value in run.model.named_parameters() if name in before and not torch.equal(value, before[name])
    ]
    assert moved == list(before)


def test_prompt_tuning_loss_does_not_see_virtual_tokens(options):
    """The weights must move right by the number of virtual tokens; all rows +1 equals SFTTrainer (test_equals_sft), so
    here only one token of each row has a weight."""
    last = tiny.tokenised_data(8, token_weights=lambda i, row: [0.0] * (len(row) - 1) + [1.0])
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    run = make(options, last, config, max_steps=1, per_device_train_batch_size=8)
    batch = next(iter(run.get_train_dataloader()))
    ends = batch["attention_mask"].sum(1) - 1
    run.model.eval()
    with torch.no_grad():
        logits = run.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # virtual tokens come first, so position V + t - 1 predicts token t
    wanted = torch.stack(
        [F.cross_entropy(logits[i, 3 + end - 1], batch["input_ids"][i, end]) for i, end in enumerate(ends)]
    ).mean()
    run.train()
    assert steps(run)[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_paper_preset_warns_and_runs(options, tmp_path):
    with pytest.warns(UserWarning, match="has no bound"):
        run = make(
            options,
            tiny.prompt_data(),
            reference=tiny.llama(seed=1),
            scoring_cache_dir=str(tmp_path),
            **PAPER_2508_04329,
        )
    weights = np.concatenate([np.array(row["token_weights"]) for row in run.train_dataset])
    assert (weights > 0).sum() == int(0.7 * (weights != 0).sum())
    run.train()


REFUSED = {
    "label_smoothing": ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1"),
    "reference_and_weights": ({}, {"reference": lambda: tiny.llama(seed=1)}, "both say what is negative"),
    "half_a_score": ({}, {"data": lambda: tiny.tokenised_data(base_logps=signed)}, "the column .base_logps. alone"),
    "short_column": (
        {}, {"data": lambda: tiny.tokenised_data(token_weights=lambda i, row: [1.0] * (len(row) - (i == 3)))},
        "row 3: column 'token_weights' has",
    ),
    "not_finite": (
        {}, {"data": lambda: tiny.tokenised_data(token_weights=lambda i, row: [math.nan] * len(row))},
        "row 0: column 'token_weights' holds a value that is missing or not finite",
    ),
    "online_fraction": (
        {"precompute_scores": False, "positive_fraction": 0.5},
        {"data": tiny.prompt_data, "reference": lambda: tiny.llama(seed=1)}, "positive_fraction=0.5 ranks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case, options):
    changes, arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(options, **{name: value() for name, value in arguments.items()}, **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("forget_weight", -0.1), ("forget_weight", math.nan), ("positive_fraction", 1.5), ("neutral_band", -1.0),
        ("forget_beta", 0.0), ("forget_floor", 0.5), ("entropy_gate", 0.0), ("entropy_gate", math.inf),
        ("anchor_weight", 0.0), ("z_loss_weight", 0.0), ("scoring_batch_size", 0), ("forget_objective", "ascent"),
        ("forget_schedule", "step"), ("selection_scope", "batch"), ("forget_normalization", "mean"), ("score", "loss"),
    ],
)  # fmt: skip
def test_config_names_field_and_value(field, value, options):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        SelectiveSFTConfig(**options, **{field: value})


def test_config_excludes_two_rules(options):
    with pytest.raises(ValueError, match="exclude each other"):
        SelectiveSFTConfig(**options, negative_threshold=1.0, positive_fraction=0.5)


LM_HEAD_LORA = {"r": 4, "target_modules": ["q_proj", "lm_head"]}


def test_lora_on_the_head_is_trained_and_evaluated(options):
    """TRL refuses it, since its loss would drop the adapter. What it must be is the model's own forward."""
    run = make(options, peft_config=LoraConfig(**LM_HEAD_LORA), forget_weight=1.0, learning_rate=0.1, max_steps=5)
    factors = {n: p.clone() for n, p in run.model.named_parameters() if "lm_head" in n and p.requires_grad}
    run.train()
    assert len(factors) == 2
    assert all(not torch.equal(p, factors[n]) for n, p in run.model.named_parameters() if n in factors)
    batch = next(iter(run.get_train_dataloader()))
    run.model.eval()
    with torch.no_grad():
        logits = run.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:])
    inputs = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
    with torch.no_grad():
        assert float(run.compute_loss(run.model, inputs)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("change", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "dora"])
def test_other_adapters_on_the_head_are_refused(change, options):
    with pytest.raises(ValueError, match="lm_head has an adapter that the fused loss cannot follow"):
        make(options, peft_config=LoraConfig(**LM_HEAD_LORA, **change))


def test_lora_on_the_head_without_selection_is_trls_error(options):
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        make(options, tiny.prompt_data(), LoraConfig(**LM_HEAD_LORA))


def renamed_compute_loss():
    """`SFTTrainer.compute_loss` of a TRL that calls its fused head by another keyword."""
    source = textwrap.dedent(inspect.getsource(SFTTrainer.compute_loss)).replace("fused_lm_head", "fused_head")
    names = {**vars(sys.modules[SFTTrainer.__module__]), "__class__": SFTTrainer}
    exec(source.replace("super()", "super(SFTTrainer, self)"), names)
    return names["compute_loss"]


def test_a_trl_that_does_not_call_the_head_is_refused_at_construction(options, monkeypatch):
    monkeypatch.setattr(SFTTrainer, "compute_loss", renamed_compute_loss())
    with pytest.raises(RuntimeError, match="does not go through the fused head as selsft expects"):
        make(options)


def test_a_step_without_the_head_is_an_error(options, monkeypatch):
    run = make(options)
    monkeypatch.setattr(SFTTrainer, "compute_loss", renamed_compute_loss())
    with pytest.raises((RuntimeError, TypeError)) as error:
        run.train()
    assert "does not go through the fused head" in str(error.value) or "fused_head" in str(error.value)


def test_the_probe_leaves_no_trace(options):
    run = make(options)
    assert not any(run._metrics["train"].values()) and not any(run._metrics["eval"].values())
    assert run._total_train_tokens == 0 and not run._outputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative_threshold": 2.0}, "negative_threshold=2.0 has no effect: without a reference_model"),
        ({"positive_fraction": 0.7}, "positive_fraction=0.7 has no effect"),
        ({"forget_weight": 0.5}, "forget_weight=0.5 has no effect"),
        ({"reference_model_init_kwargs": {"dtype": "float32"}}, "reference_model_init_kwargs has no effect"),
    ],
)
def test_settings_without_effect_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        make(options, tiny.prompt_data(), **changes)


def test_a_rule_beside_given_weights_is_refused(options):
    with pytest.raises(ValueError, match=r"neutral_band=0\.5 has no effect: the column 'token_weights'"):
        make(options, neutral_band=0.5)


@pytest.mark.parametrize("column", ["token_scores", "negative_mask"])
def test_a_column_that_the_score_does_not_read_is_refused(options, column):
    data = tiny.tokenised_data(8).map(lambda row: {column: [0.0] * len(row["input_ids"])})
    with pytest.raises(ValueError, match=f"column '{column}', which has no effect under score='influence'"):
        make(options, data)
