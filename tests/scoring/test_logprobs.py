"""Scores belong to their tokens in every packing mode."""

import pytest
import torch
from peft import LoraConfig

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from tests.support import tiny
from tests.support.oracle import assert_scored

PACKING = {
    "padded": {},
    "truncated": {"max_length": 12},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 16},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding_free": {"padding_free": True, "max_length": None},
    "multiple_of": {"pad_to_multiple_of": 7},
    "multiple_of_padding_free": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 7},
}


def trainer(options, tmp_path, data=None, peft_config=None, reference=None, **changes):
    settings = {
        **options,
        "scoring_cache_dir": str(tmp_path / "cache"),
        "negative_threshold": 0.1,
        "score_base_weight": 1.0,
        "score_pooling": "token",
        **changes,
    }
    return SelectiveSFTTrainer(
        model=tiny.llama(),
        args=SelectiveSFTConfig(**settings),
        train_dataset=data or tiny.prompt_data(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        reference_model=reference or tiny.llama(seed=1),
    )


@pytest.mark.parametrize("mode", PACKING)
def test_columns_match_the_models_own_logits(mode, options, tmp_path):
    run = trainer(options, tmp_path, **PACKING[mode])
    assert assert_scored(run.train_dataset, tiny.llama(), tiny.llama(seed=1)) > 40


@pytest.mark.parametrize("mode", PACKING)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_online_scores_equal_the_precomputed(mode, lora, options, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    changes = {**PACKING[mode], "forget_objective": "npo"}  # keeps base_logps in the batch
    offline = trainer(options, tmp_path, peft_config=config, **changes)
    online = trainer(options, tmp_path, peft_config=config, precompute_scores=False, **changes)
    batches = zip(offline.get_train_dataloader(), online.get_train_dataloader(), strict=True)
    negatives = 0
    for prepared, raw in batches:
        assert torch.equal(prepared["input_ids"], raw["input_ids"])
        online._weigher.weigh_batch(raw)
        torch.testing.assert_close(prepared["base_logps"], raw["base_logps"], rtol=0, atol=1e-5)
        assert torch.equal(prepared["token_weights"], raw["token_weights"])
        assert torch.equal(prepared["active_rows"], raw["active_rows"])
        negatives += (raw["token_weights"] < 0).sum()
    assert negatives > 10


def test_special_tokens_are_positive_unless_asked(options, tmp_path):
    for protect in (True, False):
        run = trainer(options, tmp_path, negative_threshold=-9.0, protect_special_tokens=protect)
        eos = [row["token_weights"][-1] for row in run.train_dataset if row["input_ids"][-1] == 1]
        assert len(eos) == 24 and set(eos) == {1.0 if protect else -1.0}
