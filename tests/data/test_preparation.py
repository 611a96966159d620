"""Weights of tokens and of messages survive truncation and packing, and reach the tokens that they belong to."""

import numpy as np
import pytest
from datasets import Dataset

from selsft import DataCollatorForSelectiveSFT
from selsft.data.columns import shift
from selsft.data.preparation import message_token_weights
from tests.support import tiny
from tests.support.trainers import make

MODES = {
    "padded": {},
    "truncated": {"max_length": 7},
    "keep_end": {"max_length": 7, "truncation_mode": "keep_end"},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 16},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding_free": {"padding_free": True, "max_length": None},
    "multiple_of": {"pad_to_multiple_of": 8},
    "shuffled": {"shuffle_dataset": True},
}


@pytest.mark.parametrize("streamed", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("mode", MODES)
def test_a_weight_stays_with_its_token(mode, streamed, options):
    """Each weight encodes its token's id, so that any shift shows."""
    data = tiny.tokenised_data(token_weights=lambda i, row: [token + 0.5 for token in row])
    data = data.to_iterable_dataset() if streamed else data
    run = make(options, data, **MODES[mode])
    seen = 0
    for batch in run.get_train_dataloader():
        trained = batch["labels"] != -100
        assert (batch["token_weights"][trained] == batch["input_ids"][trained] + 0.5).all()
        assert (batch["token_weights"][~trained] == 0).all()
        grid = shift(batch["token_weights"], batch["input_ids"].size(1) - 1)
        assert grid.flatten().nonzero().flatten().tolist() == batch["active_rows"].tolist()
        seen += int(trained.sum())
    assert seen > 30


def test_rows_are_those_of_sft_trainer(options):
    """Packing with columns packs the same rows as TRL does without."""
    from trl import SFTConfig, SFTTrainer

    for changes in MODES.values():
        data = tiny.tokenised_data(token_weights=lambda i, row: [1.0] * len(row))
        mine = make(options, data, **changes)
        plain = SFTTrainer(
            tiny.llama(), SFTConfig(**{**options, **changes}), train_dataset=data.remove_columns("token_weights"),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        for name in ("input_ids", "labels"):
            assert mine.train_dataset[name][:] == plain.train_dataset[name][:], (name, changes)


def weigh(*weights):
    """A conversation of user and assistant turns with these weights."""
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": tiny.sentence(turn, 3), "weight": weight}
        for turn, weight in enumerate(weights)
    ]
    ids = tiny.tokenizer().apply_chat_template(messages, return_dict=True)["input_ids"]
    return messages, ids, message_token_weights(messages, ids, tiny.tokenizer())


def text_of(ids, weights, weight):
    return tiny.tokenizer().decode([token for token, value in zip(ids, weights, strict=True) if value == weight])


def test_message_weight_covers_text_and_end_of_turn():
    messages, ids, weights = weigh(None, -1.0, None, 0.5)
    assert text_of(ids, weights, -1.0) == messages[1]["content"] + "<|im_end|>"
    assert text_of(ids, weights, 0.5) == messages[3]["content"] + "<|im_end|>"
    assert len(weights) == len(ids) and set(weights) == {1.0, -1.0, 0.5}


@pytest.mark.parametrize("form", ["messages", "prompt_completion"])
@pytest.mark.parametrize("changes", [{}, {"packing": True}], ids=["padded", "packed"])
def test_message_weights_reach_the_loss(form, changes, options):
    turns = [
        {"role": "user", "content": "alpha beta", "weight": None},
        {"role": "assistant", "content": "gamma delta", "weight": -1.0},
        {"role": "user", "content": "eta", "weight": None},
        {"role": "assistant", "content": "theta", "weight": None},
    ]
    if form == "messages":
        data, changes = Dataset.from_dict({"messages": [turns] * 8}), {**changes, "assistant_only_loss": True}
    else:
        data = Dataset.from_dict({"prompt": [turns[:1]] * 8, "completion": [turns[1:]] * 8})
    run = make(options, data, max_length=64, **changes)
    negative, special = [], []
    for row in run.train_dataset:
        for token, weight, label in zip(row["input_ids"], row["token_weights"], row["labels"], strict=True):
            if label != -100 and weight < 0:
                negative.append(token)
            if token == tiny.tokenizer().convert_tokens_to_ids("<|im_end|>") and label != -100:
                special.append(weight)
    assert tiny.tokenizer().decode(negative).replace("\n", "") == "gamma delta" * 8
    # the end of a negative turn is neither forgotten nor learnt, that of others is learnt
    assert set(special) == {0.0, 1.0}
    run.train()
    assert run.state.log_history[0]["negative_fraction"] > 0.1


def test_template_that_rewrites_history_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] if loop.last else 'earlier' }} {{ m['content'] }} {% endfor %}"
    )
    messages = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta", "weight": -1.0}] * 2
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    with pytest.raises(ValueError, match="renders message 1 \\(assistant\\) differently"):
        message_token_weights(messages, ids, tokenizer)


@pytest.mark.parametrize("weight", ["-1", float("nan"), float("inf")])
def test_message_weight_must_be_a_number(weight):
    with pytest.raises(ValueError, match="of message 1 must be a finite number"):
        weigh(None, weight)


def test_scored_columns_select_without_a_reference(options):
    """What `selsft score` writes: other thresholds give other weights and need no model."""
    score = lambda i, row: [float(-(t % 4)) for t in range(len(row))]  # noqa: E731
    data = tiny.tokenised_data(base_logps=lambda i, row: [0.0] * len(row), ref_logps=score)
    for threshold, expected in ((1.5, {2, 3}), (2.5, {3})):
        run = make(
            options, data, negative_threshold=threshold, protect_special_tokens=False, score_base_weight=1.0,
            score_pooling="token",
        )  # fmt: skip
        found = {t % 4 for row in run.train_dataset for t, weight in enumerate(row["token_weights"]) if weight < 0}
        assert found == expected


@pytest.mark.parametrize("changes", [MODES["wrapped"], MODES["bfd_split"], MODES["keep_end"]])
def test_scores_of_another_context_are_refused(changes, options):
    data = tiny.tokenised_data(base_logps=lambda i, row: [0.0] * len(row), ref_logps=lambda i, row: [0.0] * len(row))
    with pytest.raises(ValueError, match="were computed in another context"):
        make(options, data, **changes)


def test_collator_without_columns_is_the_parents():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    for settings in ({}, {"padding_free": True}, {"pad_to_multiple_of": 8}):
        parent = DataCollatorForLanguageModeling(pad_token_id=0, **settings)
        mine = DataCollatorForSelectiveSFT.from_parent(parent)
        wanted, found = parent(rows), mine(rows)
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(value, found[key])


def test_collator_refuses_a_short_column():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "token_weights": [1.0, 1.0]}]
    with pytest.raises(ValueError, match="column 'token_weights' has 2 values in a row of 3 tokens"):
        DataCollatorForSelectiveSFT(pad_token_id=0)(rows)


def test_collator_refuses_rows_without_the_column():
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "token_weights": [1.0, 1.0]}, {"input_ids": [7], "labels": [7]}]
    for order in (rows, rows[::-1]):
        with pytest.raises(ValueError, match=r"rows \[[01]\] of a batch have no 'token_weights'"):
            DataCollatorForSelectiveSFT(pad_token_id=0)(order)


def test_packed_rows_are_not_packed_again(options):
    data = tiny.tokenised_data(4, token_weights=lambda i, row: [1.0] * len(row))
    data = data.add_column("seq_lengths", [[len(row)] for row in data["input_ids"]])
    with pytest.raises(ValueError, match="is packed already"):
        make(options, data, packing=True)
