"""The hash of a model follows its weights, whatever is wrapped around them."""

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer, score_dataset
from selsft.data.scored_folder import read_manifest
from selsft.training.fingerprint import model_fingerprint
from tests.support import tiny

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
EXPERTS = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def adapted(model, seed: int, name: str = "default", **settings):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{**LORA, "init_lora_weights": False, **settings}), adapter_name=name)


def test_weights_and_configuration_decide():
    base = model_fingerprint(tiny.llama())
    assert model_fingerprint(tiny.llama()) == base
    assert model_fingerprint(tiny.llama(seed=1)) != base
    assert model_fingerprint(tiny.llama().bfloat16()) != base
    assert model_fingerprint(tiny.llama(rms_norm_eps=1e-3)) != base


def test_the_base_has_one_hash_with_and_without_adapters():
    base = model_fingerprint(tiny.llama())
    for config in (
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ):
        assert model_fingerprint(get_peft_model(tiny.llama(), config), adapter=None) == base
    trained = adapted(tiny.llama(), seed=1)
    assert model_fingerprint(trained) not in (base, model_fingerprint(adapted(tiny.llama(), seed=2)))


def test_an_adapter_is_hashed_with_the_base_and_without_the_others():
    model = adapted(tiny.llama(), seed=1)
    alone = model_fingerprint(model, "default")
    assert alone == model_fingerprint(model)
    model.add_adapter("default_2", LoraConfig(**LORA, init_lora_weights=False))  # a name that starts with the other's
    assert model_fingerprint(model, "default") == alone
    assert model_fingerprint(model, "default_2") not in (alone, model_fingerprint(model, None))


def test_adapters_on_the_parameters_of_experts():
    """They lie in each other, and without the wrappers their factors have equal names and other shapes."""
    base = model_fingerprint(tiny.build("qwen3_moe"))
    model = adapted(tiny.build("qwen3_moe"), seed=1, **EXPERTS)
    assert model_fingerprint(model, None) == base
    whole = model_fingerprint(model)
    assert whole not in (base, model_fingerprint(adapted(tiny.build("qwen3_moe"), seed=2, **EXPERTS)))
    with torch.no_grad():  # each factor counts
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter[(0,) * parameter.dim()] += 1
                changed = model_fingerprint(model)
                assert changed != whole, name
                whole = changed


def test_lora_on_experts_trains_with_a_reference(options, tmp_path):
    run = SelectiveSFTTrainer(
        tiny.build("qwen3_moe"),
        SelectiveSFTConfig(
            **{
                **options,
                "scoring_cache_dir": str(tmp_path),
                "negative_threshold": 0.01,
                "score_base_weight": 1.0,
                "score_pooling": "token",
            }
        ),
        train_dataset=tiny.prompt_data(12),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**EXPERTS),
        reference_model=tiny.build("qwen3_moe", seed=1),
    )
    before = {name: p.clone() for name, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    assert any(not torch.equal(p, before[name]) for name, p in run.model.named_parameters() if name in before)


def _logps(model, ids):
    """As `plain_logps`, in float32: torch has no grouped product of experts in float64."""
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return np.concatenate([[0.0], logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()])


@pytest.mark.parametrize("peft", [True, False], ids=["trained with an adapter", "trained in full"])
def test_scores_with_lora_on_experts(peft, options, tmp_path):
    """Equal to those of the adapter on a model of its own, and of the base."""
    trained = adapted(tiny.build("qwen3_moe"), seed=1, **EXPERTS)
    trained.save_pretrained(tmp_path / "adapter")
    scored = score_dataset(
        tiny.build("qwen3_moe"), tiny.prompt_data(12), reference_model=tmp_path / "adapter",
        output_dir=tmp_path / "scored", tokenizer=tiny.tokenizer(), args=SelectiveSFTConfig(**options),
        peft_config=LoraConfig(**EXPERTS) if peft else None,
    )  # fmt: skip
    for column, model in (("base_logps", tiny.build("qwen3_moe")), ("ref_logps", trained)):
        for row in scored:
            expected = np.where(np.array(row["labels"]) == -100, 0, _logps(model, row["input_ids"]))
            np.testing.assert_allclose(row[column], expected, atol=2e-5)
    identity = read_manifest(tmp_path / "scored")["identity"]
    assert identity["model_sha256"] == model_fingerprint(tiny.build("qwen3_moe")) != identity["reference_sha256"]


def test_a_model_without_weights_has_no_hash():
    with torch.device("meta"):
        empty = tiny.llama()
    with pytest.raises(ValueError, match="is on the meta device: a model without weights has no hash"):
        model_fingerprint(empty)
