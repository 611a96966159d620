"""Types at the door: every public function takes paths, and says in one line what it was given instead of what."""

import pytest
from datasets import Dataset, DatasetDict

from selsft import (
    DataCollatorForSelectiveSFT,
    SelectiveSFTConfig,
    SelectiveSFTTrainer,
    compare_arms,
    evaluate,
    judged_rows,
    load_marked,
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
@pytest.mark.parametrize(
    "function", ["train", "train, eval", "score", "select", "evaluate", "judged", "arms", "arms, eval"]
)
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
        "judged": lambda: judged_rows(data, tokenizer, args),
        "arms": lambda: compare_arms("model", data, tiny.text_data(), {"plain": {}}, tmp_path / "arms"),
        "arms, eval": lambda: compare_arms("model", tiny.text_data(), data, {"plain": {}}, tmp_path / "arms"),
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


IDS, TOKENIZER = tiny.tokenised_data(4), tiny.tokenizer()
CALLS = [
    (lambda args: SelectiveSFTTrainer(None, args, train_dataset=IDS), "model is a NoneType: give a name, a folder"),
    (lambda args: SelectiveSFTTrainer(tiny.llama(), {}, train_dataset=IDS), "args is a dict: give a Selective"),
    (lambda args: SelectiveSFTTrainer(
        tiny.llama(), args, train_dataset=IDS, eval_dataset=Dataset.from_dict({"words": ["a"]})
    ), "eval_dataset has the columns 'words' and none that can be trained on"),
    (lambda args: score_dataset(3, IDS, output_dir="unused", args=args), "model is a int: give a name, a folder"),
    (lambda args: score_dataset("model", IDS, output_dir=None, args=args), "output_dir is a NoneType: give a folder"),
    (lambda args: score_dataset("model", IDS, output_dir="unused", args={}), "args is a dict"),
    (lambda args: score_dataset("model", IDS, output_dir="unused", tokenizer="t"), "tokenizer is a str"),
    (lambda args: evaluate(3, IDS, args=args), "model is a int"),
    (lambda args: evaluate("model", IDS, args=args, base_model=[]), "base_model is a list"),
    (lambda args: evaluate("model", IDS, args={}), "args is a dict"),
    (lambda args: evaluate(tiny.llama(), IDS, args=args), "tokenizer=None: a loaded model needs its tokenizer"),
    (lambda args: select_tokens(IDS, TOKENIZER, args), "scored has no column 'base_logps'"),
    (lambda args: select_tokens(IDS, "t", args), "tokenizer is a str"),
    (lambda args: select_tokens(IDS, TOKENIZER, {}), "args is a dict"),
    (lambda args: judged_rows(IDS, "t", args), "tokenizer is a str"),
    (lambda args: judged_rows(IDS, TOKENIZER, {}), "args is a dict"),
    (lambda args: judged_rows(tiny.text_data(), TOKENIZER, args), "the judged sample has the columns text and no jud"),
    (lambda args: use_folder({}, "nowhere"), "args is a dict"),
    (lambda args: use_folder(args, None), "folder is a NoneType: give the folder of `selsft score`"),
    (lambda args: use_folder(args, "nowhere"), "'nowhere' holds no scores: give a folder that `selsft score`"),
    (lambda args: load_scores("nowhere"), "'nowhere' holds no scores: give a folder that `selsft score`"),
    (lambda args: load_scores(None), "path is a NoneType"),
    (lambda args: load_marked("nowhere.m2"), "'nowhere.m2': no such file"),
    (lambda args: load_marked("nowhere.json"), "'nowhere.json': give format, one of"),
    (lambda args: compare_arms(tiny.llama(), IDS, IDS, {"plain": {}}, "unused"), "model is a LlamaForCausalLM"),
    (lambda args: compare_arms("model", IDS, IDS, ["plain"], "unused"), "arms is a list: give a mapping"),
    (lambda args: compare_arms("model", IDS, IDS, {"plain": 1}, "unused"), r"arms\['plain'\] is a int: give"),
    (lambda args: collate([{"text": "a"}]), "row 0 of a batch has no 'input_ids': give rows that are tokenised"),
    (lambda args: collate([IDS[0], 3]), "row 1 of a batch has no 'input_ids'"),
    (lambda args: collate([{**IDS[0], "token_weights": ["a"] * len(IDS[0]["input_ids"])}]),
     "column 'token_weights' holds something else than numbers"),
    (lambda args: collate([{**IDS[0], "token_weights": [1.0]}]), "column 'token_weights' has 1 values in a row of "),
]  # fmt: skip


def collate(rows):
    return DataCollatorForSelectiveSFT(pad_token_id=0)(rows)


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_other_arguments(number, options):
    call, message = CALLS[number]
    with pytest.raises(ValueError, match=message):
        call(SelectiveSFTConfig(**options))


def test_every_public_function_is_here():
    import selsft

    presets = {name for name in selsft.__all__ if name.isupper()}
    assert set(selsft.__all__) - presets - {"ArmComparison", "Evaluation", "JudgedRows"} <= set(globals())
