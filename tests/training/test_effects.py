"""What would have no effect is refused by name, and a threshold that selects nothing or most is said."""

import logging
import math
import re

import pytest
from transformers import TrainerCallback

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from tests.support import tiny


def make(options, data, reference=None, **changes):
    return SelectiveSFTTrainer(
        tiny.llama(), SelectiveSFTConfig(**{**options, **changes}), train_dataset=data,
        processing_class=tiny.tokenizer(), reference_model=reference,
    )  # fmt: skip


def zeros(index, row):
    return [0.0] * len(row)


def ladder(index, row):
    return [-0.1 * place for place in range(len(row))]


PLAIN: dict = {}
WEIGHTED = {"token_weights": lambda i, row: [-1.0] * len(row)}
SCORED = {"base_logps": zeros, "ref_logps": ladder}
UNREAD = [
    (PLAIN, {"negative_threshold": 2.0}),
    (PLAIN, {"positive_fraction": 0.7}),
    (PLAIN, {"forget_objective": "npo"}),
    (PLAIN, {"forget_weight": 0.5}),
    (PLAIN, {"entropy_gate": 3.0}),
    (PLAIN, {"anchor_weight": 0.1}),
    (PLAIN, {"z_loss_weight": 1e-4}),
    (PLAIN, {"protect_special_tokens": False}),
    (PLAIN, {"score_base_weight": 0.625}),
    (PLAIN, {"score_lookahead": 0.5}),
    (PLAIN, {"score_pooling": "row"}),
    (PLAIN, {"judged": "judged.jsonl"}),
    (PLAIN, {"target_precision": 0.5}),
    (PLAIN, {"reference_model_init_kwargs": {"dtype": "float32"}}),
    (WEIGHTED, {"negative_threshold": 2.0}),
    (WEIGHTED, {"max_negative_share": 0.5}),
    (WEIGHTED, {"score_pooling": "row"}),
    (WEIGHTED, {"forget_beta": 0.3}),
    (SCORED, {"forget_beta": 0.3}),
    (SCORED, {"selection_scope": "sequence"}),
    (SCORED, {"excess_decay": 0.5}),
    (SCORED, {"score": "surprisal", "score_base_weight": 0.625}),
    ({"token_scores": zeros}, {}),
    ({"negative_mask": lambda i, row: [0] * len(row)}, {}),
    ({"token_scores": zeros, **SCORED}, {}),
]


@pytest.mark.parametrize(("columns", "settings"), UNREAD, ids=[f"{list(c)} {s}" for c, s in UNREAD])
def test_without_effect_is_refused_by_name(columns, settings, options):
    name, value = list(settings.items())[-1] if settings else (next(iter(columns)), None)
    said = f"{name}={value!r} has no effect" if settings else f"{name!r}, which has no effect"
    if name == "reference_model_init_kwargs":
        said = f"{name} has no effect"
    with pytest.raises(ValueError, match=re.escape(said)):
        make(options, tiny.tokenised_data(8, **columns), **settings)


@pytest.mark.parametrize("score", ["surprisal", "random", "probe"])
def test_a_reference_that_is_not_read_is_refused(score, options):
    rule = {"positive_fraction": 0.5} if score == "random" else {}
    with pytest.raises(ValueError, match=f"score='{score}' reads no reference"):
        make(options, tiny.prompt_data(8), reference=tiny.llama(seed=1), score=score, **rule)


@pytest.mark.parametrize(
    ("threshold", "said"),
    [(100.0, "makes none of the tokens"), (-1.0, "makes 100.0% of the tokens"), (0.25, r"makes \d\d.\d% of"),
     (0.95, None)],
)  # fmt: skip
def test_thresholds_that_select_nothing_or_most_are_said_before_training(threshold, said, options, caplog):
    data = tiny.tokenised_data(24, prompt=1, base_logps=zeros, ref_logps=ladder)
    with caplog.at_level(logging.WARNING):
        run = make(options, data, negative_threshold=threshold)
    lines = [record.message for record in caplog.records if "negative_threshold" in record.message]
    assert len(lines) == (said is not None)
    if said is not None:
        assert re.search(said, lines[0]) and f"negative_threshold={threshold:g}" in lines[0]
        # a threshold that is proposed selects about what it promises
        proposed = float(re.findall(r"([-\d.e]+) -> 20%", lines[0])[0])
        rows = [zip(row["ref_logps"][1:], row["labels"][1:], strict=True) for row in run.train_dataset]
        scores = [score for row in rows for score, label in row if label != -100]
        assert sum(score < -proposed for score in scores) / len(scores) == pytest.approx(0.2, abs=0.1)


def test_a_weight_that_does_not_reach_the_loss_stops_construction(options, monkeypatch):
    """The head is called but what it says is dropped: a renamed field, a loss that TRL computes itself."""
    data = tiny.tokenised_data(8, **WEIGHTED)
    make(options, data)
    whole = SelectiveSFTTrainer._sft_loss
    monkeypatch.setattr(SelectiveSFTTrainer, "_sft_loss", lambda self, *args: whole(self, *args) * 0 + math.log(300))
    with pytest.raises(RuntimeError, match="token weights would have no effect"):
        make(options, data)


def test_a_step_whose_head_did_not_run_stops_training(options, monkeypatch):
    run = make(options, tiny.tokenised_data(8, **WEIGHTED))

    class Forgets(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            monkeypatch.setattr("selsft.trainer._with_head", lambda model, head, kept=None: model)

    run.add_callback(Forgets())
    with pytest.raises(RuntimeError, match="token weights would have no effect"):
        run.train()
    assert run.state.global_step == 1
