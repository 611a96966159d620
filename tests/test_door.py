"""Types at the door: every public function takes paths, and says in one line what it was given instead of what."""

import pytest
from datasets import Dataset, DatasetDict

from selsft import (
    SelectiveSFTConfig,
    SelectiveSFTTrainer,
    evaluate,
    load_scores,
    score_dataset,
    select_tokens,
    use_folder,
)
from tests.support import tiny

EMPTY = Dataset.from_dict({"text": []})
ROWS = [{"text": "alpha beta"}]
NOT_DATA = {
    "a list": (ROWS, "is a list: give a datasets.Dataset, such as Dataset.from_list"),
    "no rows": (EMPTY, "has no rows"),
    "None": (None, "is a NoneType: give a datasets.Dataset"),
    "splits": (DatasetDict({"train": Dataset.from_list(ROWS)}), "is a DatasetDict: give a datasets.Dataset"),
}


@pytest.mark.parametrize("wrong", NOT_DATA)
@pytest.mark.parametrize("function", ["train", "train, eval", "score", "select", "evaluate"])
def test_data(function, wrong, options, tmp_path):
    data, message = NOT_DATA[wrong]
    if (function, wrong) in {("train, eval", "None"), ("train, eval", "splits")}:
        pytest.skip("is a value that eval_dataset may have")
    args, model, tokenizer = SelectiveSFTConfig(**options), tiny.llama(), tiny.tokenizer()
    calls = {
        "train": lambda: SelectiveSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer),
        "train, eval": lambda: SelectiveSFTTrainer(
            model, args, train_dataset=tiny.text_data(), eval_dataset=data, processing_class=tokenizer
        ),
        "score": lambda: score_dataset(model, data, output_dir=tmp_path / "scored", args=args, tokenizer=tokenizer),
        "select": lambda: select_tokens(data, tokenizer, args),
        "evaluate": lambda: evaluate(model, data, tokenizer=tokenizer, args=args),
    }
    with pytest.raises(ValueError, match=message):
        calls[function]()


SETTINGS = {
    "negative_threshold": "1", "positive_fraction": "0.7", "forget_weight": "0.5", "neutral_band": [0.1],
    "score_base_weight": None, "protect_special_tokens": "false", "precompute_scores": 1, "scoring_batch_size": 2.5,
    "scoring_batch_tokens": "8", "max_negative_share": True, "excess_decay": "0.9", "reference_model": 3,
    "forget_beta": {}, "probe": 1.0, "score": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, options):
    with pytest.raises(ValueError, match=f"^{name}=.* is of the type .*: it needs "):
        SelectiveSFTConfig(**options, **{name: SETTINGS[name]})


def test_paths_are_taken_for_names(options, tmp_path):
    for name in ("model", "reference"):
        tiny.llama(seed=len(name)).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    reference, cache = tmp_path / "reference", tmp_path / "cache"
    args = SelectiveSFTConfig(**options, reference_model=reference, scoring_cache_dir=cache)
    assert (args.reference_model, args.scoring_cache_dir) == (str(reference), str(cache))
    trainer = SelectiveSFTTrainer(tmp_path / "model", args, train_dataset=tiny.prompt_data(8))
    assert {"base_logps", "ref_logps", "token_weights"} <= set(trainer.train_dataset.column_names)
    plain = SelectiveSFTConfig(**options)
    SelectiveSFTTrainer(tmp_path / "model", plain, train_dataset=tiny.prompt_data(8), reference_model=reference)
    scored = score_dataset(
        tmp_path / "model", tiny.prompt_data(8), output_dir=tmp_path / "scored", reference_model=reference, args=plain
    )
    assert load_scores(tmp_path / "scored")["ref_logps"] == scored["ref_logps"]
    use_folder(plain, tmp_path / "scored")
    assert evaluate(tmp_path / "model", tiny.prompt_data(4), args=plain, max_new_tokens=0).metrics["nll"] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data, args: SelectiveSFTTrainer(None, args, train_dataset=data), "model is a NoneType"),
        (lambda data, args: SelectiveSFTTrainer(tiny.llama(), {}, train_dataset=data), "args is a dict"),
        (
            lambda data, args: SelectiveSFTTrainer(
                tiny.llama(), args, train_dataset=data, eval_dataset=Dataset.from_dict({"words": ["a"]})
            ),
            "eval_dataset has the columns 'words' and none that can be trained on",
        ),
        (lambda data, args: select_tokens(data, tiny.tokenizer(), args), "scored has no column 'base_logps'"),
    ],
)
def test_other_arguments(call, message, options):
    with pytest.raises(ValueError, match=message):
        call(tiny.tokenised_data(4), SelectiveSFTConfig(**options))
