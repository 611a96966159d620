"""The public Python functions, one after another, as a script would call them."""

import numpy as np
import pytest

import selsft
from selsft import SelectiveSFTConfig, SelectiveSFTTrainer, evaluate, load_scores, score_dataset, select_tokens
from tests.support import tiny


def test_every_public_name_is_there():
    for name in selsft.__all__:
        assert getattr(selsft, name).__doc__ or name.isupper()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        selsft.nothing  # noqa: B018


def test_from_scores_to_a_model_and_its_evaluation(options, tmp_path):
    settings = {**options, "max_steps": 2}
    scored = score_dataset(
        tiny.llama(), tiny.prompt_data(24), output_dir=tmp_path / "scored", reference_model=tiny.llama(seed=1),
        tokenizer=tiny.tokenizer(), args=SelectiveSFTConfig(**settings),
    )  # fmt: skip
    again = load_scores(tmp_path / "scored")
    assert again["ref_logps"] == scored["ref_logps"]
    chosen = select_tokens(
        scored,
        tiny.tokenizer(),
        SelectiveSFTConfig(**settings, negative_threshold=0.1, score_base_weight=1.0, score_pooling="token"),
    )
    scores = np.concatenate(scored["ref_logps"]) - np.concatenate(scored["base_logps"])
    weights = np.concatenate(chosen["token_weights"])
    special = np.isin(np.concatenate(scored["input_ids"]), tiny.tokenizer().all_special_ids)
    assert (weights == -1).sum() > 10
    assert ((weights == -1) == ((scores < -0.1) & ~special)).all()
    trainer = SelectiveSFTTrainer(
        tiny.llama(), SelectiveSFTConfig(**settings), train_dataset=chosen, processing_class=tiny.tokenizer()
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    args = SelectiveSFTConfig(**settings)
    from_disk = evaluate(tmp_path / "model", tiny.prompt_data(8), args=args, max_new_tokens=4)
    loaded = evaluate(trainer.model, tiny.prompt_data(8), tokenizer=tiny.tokenizer(), args=args, max_new_tokens=4)
    assert from_disk.metrics["nll"] == pytest.approx(loaded.metrics["nll"], rel=1e-5)
    assert from_disk.rows is not None and from_disk.rows.num_rows == 8
    with pytest.raises(ValueError, match="a loaded model needs its tokenizer"):
        evaluate(trainer.model, tiny.prompt_data(8), args=args)
