"""Every kind of reference gives the scores of the model that it names, and leaves the trained model as it was."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.support import tiny, trainers

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def folders(tmp_path):
    """A base model, another model, and an adapter of the base, each saved with a tokenizer."""
    base, other = tmp_path / "base", tmp_path / "other"
    for folder, seed in ((base, 0), (other, 1)):
        tiny.llama(seed=seed).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    adapter = adapted(tiny.llama(), seed=7)
    adapter.save_pretrained(tmp_path / "adapter")
    return {"base": str(base), "other": str(other), "adapter": str(tmp_path / "adapter")}


def adapted(model, seed) -> PeftModel:
    """`model` with a LoRA adapter that changes what it says."""
    adapter = get_peft_model(model, LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def make(options, tmp_path, model, reference=None, **changes):
    cache = {"scoring_cache_dir": str(tmp_path / "cache")}
    return trainers.make(options, tiny.prompt_data(12), model, reference, **{**cache, **changes})


def logps(model, dataset) -> list[np.ndarray]:
    """Plain log-probabilities of the labels of unpacked rows under `model`."""
    rows = []
    model.eval()
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        values = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        rows.append(torch.nn.functional.pad(values, (1, 0)).masked_fill(labels == -100, 0).numpy())
    return rows


def assert_scores(run, base, reference):
    for column, model in (("base_logps", base), ("ref_logps", reference)):
        for found, wanted in zip(run.train_dataset[column], logps(model, run.train_dataset), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=column)


def test_folder_of_a_model(options, tmp_path, folders):
    run = make(options, tmp_path, tiny.llama(), reference_model=folders["other"])
    assert_scores(run, tiny.llama(), tiny.llama(seed=1))


def test_loaded_model(options, tmp_path):
    reference = tiny.llama(seed=1)
    run = make(options, tmp_path, tiny.llama(), reference)
    assert_scores(run, tiny.llama(), tiny.llama(seed=1))


def test_adapter_on_the_base_of_a_trained_adapter(options, tmp_path, folders):
    run = make(options, tmp_path, tiny.llama(), peft_config=LoraConfig(**LORA), reference_model=folders["adapter"])
    assert_scores(run, tiny.llama(), adapted(tiny.llama(), seed=7))
    assert list(run.model.peft_config) == ["default"] and run.model.active_adapter == "default"
    trainable = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".default." in name for name in trainable)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable


def test_adapter_of_a_model_that_is_trained_in_full(options, tmp_path, folders):
    model = tiny.llama()
    run = make(options, tmp_path, model, reference_model=folders["adapter"])
    assert_scores(run, tiny.llama(), adapted(tiny.llama(), seed=7))
    # the layers of the adapter are gone again, all parameters train and a checkpoint is a plain model
    assert run.model is model and not any("lora" in name for name, _ in model.named_parameters())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in tiny.llama().named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    run.train()
    run.save_model(tmp_path / "saved")
    assert type(model).from_pretrained(tmp_path / "saved")(torch.tensor([[5, 6]])).logits.isfinite().all()
    assert not (tmp_path / "saved" / "adapter_config.json").exists()


@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "online"])
def test_base_below_a_trained_adapter(precompute, options, tmp_path):
    policy = adapted(tiny.llama(), seed=3)
    if not precompute:
        changes = {"precompute_scores": False, "negative_threshold": 1.0}
        with pytest.raises(ValueError, match="comes with a trained adapter"):
            make(options, tmp_path, policy, reference_model="base", **changes)
        return
    run = make(options, tmp_path, policy, reference_model="base")
    assert_scores(run, adapted(tiny.llama(), seed=3), tiny.llama())


def test_adapter_reference_online(options, tmp_path, folders):
    changes = {
        "reference_model": folders["adapter"],
        "negative_threshold": 0.1,
        "score_base_weight": 1.0,
        "score_pooling": "token",
        "optim": "sgd",
    }
    offline = make(options, tmp_path, tiny.llama(), peft_config=LoraConfig(**LORA), **changes)
    online = make(options, tmp_path, tiny.llama(), peft_config=LoraConfig(**LORA), precompute_scores=False, **changes)
    offline.train(), online.train()
    for row, wanted in zip(online.state.log_history[:-1], offline.state.log_history[:-1], strict=True):
        assert row["negative_fraction"] > 0.05
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_model_itself_is_refused(options, tmp_path):
    model = tiny.llama()
    with pytest.raises(ValueError, match="all scores would be 0"):
        make(options, tmp_path, model, model)


def test_base_needs_an_adapter(options, tmp_path):
    with pytest.raises(ValueError, match="reference_model='base' needs a model with a PEFT adapter"):
        make(options, tmp_path, tiny.llama(), reference_model="base")


def test_other_tokenizer_is_refused(options, tmp_path, folders):
    """Same size, but two tokens are swapped: the shapes fit and every score would be wrong."""
    description = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    made = Tokenizer.from_str(json.dumps(description))
    swapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
    swapped.save_pretrained(folders["other"])
    with pytest.raises(ValueError, match=r"has another tokenizer than the trained model: .*token '[ab]' is"):
        make(options, tmp_path, tiny.llama(), reference_model=folders["other"])


def test_other_vocabulary_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="has a vocabulary of 310 tokens, the trained model"):
        make(options, tmp_path, tiny.llama(), tiny.llama(seed=1, vocab_size=310))


def test_adapter_of_another_model_is_refused(options, tmp_path):
    adapted(tiny.llama(hidden_size=16), seed=1).save_pretrained(tmp_path / "wrong")
    for config in (None, LoraConfig(**LORA)):
        with pytest.raises(ValueError, match="does not fit the trained model"):
            make(options, tmp_path, tiny.llama(), peft_config=config, reference_model=str(tmp_path / "wrong"))


def test_missing_reference_is_refused(options, tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        make(options, tmp_path, tiny.llama(), reference_model=str(tmp_path / "nowhere"))
