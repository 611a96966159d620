"""Without reference and weights the trainer is `SFTTrainer`, bit for bit; with all weights +1 to rounding."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from trl import SFTConfig, SFTTrainer

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from tests.support import tiny

pytestmark = pytest.mark.slow

# Each changes between two runs of the same trainer
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second")

VARIANTS = {
    "plain": ({}, tiny.text_data, None),
    "completion_only": ({}, tiny.prompt_data, None),
    "whole_prompt_completion": ({"completion_only_loss": False}, tiny.prompt_data, None),
    "assistant_only": ({"assistant_only_loss": True, "max_length": 64}, tiny.chat_data, None),
    "bfd": ({"packing": True}, tiny.prompt_data, None),
    "bfd_split": ({"packing": True, "packing_strategy": "bfd_split", "max_length": 16}, tiny.text_data, None),
    "wrapped": ({"packing": True, "packing_strategy": "wrapped"}, tiny.text_data, None),
    "padding_free": ({"padding_free": True, "max_length": None}, tiny.prompt_data, None),
    "lora": ({}, tiny.prompt_data, lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
    "prompt_tuning": ({}, tiny.prompt_data, lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "dft": ({"loss_type": "dft"}, tiny.prompt_data, None),
    "accumulation": ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}, tiny.prompt_data, None),
    "checkpointing": ({"gradient_checkpointing": True}, tiny.prompt_data, None),
    "shuffled": ({"shuffle_dataset": True, "seed": 7}, tiny.prompt_data, None),
}


def run(trainer_class, config_class, options, data, peft_config, weights=None):
    dataset = data()
    args = config_class(**options, eval_strategy="steps", eval_steps=2)
    trainer = trainer_class(
        model=tiny.llama(),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(6)),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config and peft_config(),
    )
    if weights is not None:
        weights(trainer)
    trainer.train()
    history = [{k: v for k, v in row.items() if not k.endswith(TIMINGS)} for row in trainer.state.log_history]
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return history, state


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_weights_nothing_differs(variant, options):
    changes, data, peft_config = VARIANTS[variant]
    options |= changes
    expected, expected_state = run(SFTTrainer, SFTConfig, options, data, peft_config)
    history, state = run(SelectiveSFTTrainer, SelectiveSFTConfig, options, data, peft_config)
    assert any("eval_loss" in row for row in expected) and any("entropy" in row for row in expected)
    assert history == expected
    assert state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        assert torch.equal(state[name], value), name


def test_takes_plain_configs(options):
    expected, _ = run(SFTTrainer, SFTConfig, options, tiny.prompt_data, None)
    history, _ = run(SelectiveSFTTrainer, SFTConfig, options, tiny.prompt_data, None)
    assert history == expected


def all_positive(trainer):
    """Make the run selective, with weight +1 for every label."""
    rows = trainer.train_dataset
    trainer.train_dataset = rows.map(lambda row: {"token_weights": [1.0] * len(row["input_ids"])})
    trainer._selective = True
    trainer._select_tokens(None, ["token_weights"])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "shuffled"])
def test_all_positive_weights_give_the_same_trajectory(variant, options):
    changes, data, peft_config = VARIANTS[variant]
    # Adam divides by the gradient's size and turns the rounding of a gradient near 0 into a whole step
    options |= {**changes, "optim": "sgd", "learning_rate": 0.5}
    expected, expected_state = run(SFTTrainer, SFTConfig, options, data, peft_config)
    history, state = run(SelectiveSFTTrainer, SelectiveSFTConfig, options, data, peft_config, all_positive)
    for row, wanted in zip(history, expected, strict=True):
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (key, row, wanted)
    steps = [row for row in history if "positive_loss" in row]
    assert len(steps) == 3 and all(row["negative_fraction"] == 0 for row in steps)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
