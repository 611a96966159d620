"""`score_dataset`: what `selsft score` does, from Python."""

from pathlib import Path

import numpy as np
import pytest

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer, load_scores, score_dataset
from selsft.data.scored_folder import read_manifest
from tests.support import tiny
from tests.support.oracle import plain_logps


@pytest.fixture
def args(options, tmp_path):
    return SelectiveSFTConfig(**{**options, "output_dir": str(tmp_path / "unused")})


def test_scores_are_those_of_the_models(args, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.llama(seed=1).save_pretrained(tmp_path / "reference")
    scored = score_dataset(
        tmp_path / "model", tiny.prompt_data(), reference_model=tmp_path / "reference", tokenizer=tiny.tokenizer(),
        args=args, output_dir=tmp_path / "scored",
    )  # fmt: skip
    assert len(scored) == 24 and not (tmp_path / "unused").exists()
    for column, model in (("base_logps", tiny.llama()), ("ref_logps", tiny.llama(seed=1))):
        for row in scored:
            expected = np.where(np.array(row["labels"]) == -100, 0, plain_logps(model, row["input_ids"]))
            np.testing.assert_allclose(row[column], expected, atol=2e-5)
    run = SelectiveSFTTrainer(tiny.llama(), args, train_dataset=scored, processing_class=tiny.tokenizer())
    assert "token_weights" in run.train_dataset.column_names


def test_a_finished_folder_is_not_scored_again(args, tmp_path, monkeypatch):
    def score(reference, **changes):
        return score_dataset(
            tiny.llama(), tiny.prompt_data(), reference_model=reference, tokenizer=tiny.tokenizer(), args=args,
            output_dir=str(tmp_path / "scored"), shard_tokens=60, **changes,
        )  # fmt: skip

    first = score(tiny.llama(seed=1))["ref_logps"][:]
    (tmp_path / "scored" / "shard-00001.parquet").unlink()
    calls = []
    original = score_dataset.__globals__["FrozenModels"].score
    monkeypatch.setattr(
        score_dataset.__globals__["FrozenModels"], "score", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    assert score(tiny.llama(seed=1))["ref_logps"][:] == first and len(calls) == 1
    with pytest.raises(ValueError, match=r"another reference .*--rescore true"):
        score(tiny.llama(seed=2))
    assert score(tiny.llama(seed=2), rescore=True)["ref_logps"][:] != first


def test_settings_of_selection_are_for_training(args, tmp_path):
    args.positive_fraction, args.negative_threshold, args.forget_weight = 0.5, None, 1.0
    args.reference_model_init_kwargs = {"dtype": "bfloat16"}
    tiny.llama(seed=1).save_pretrained(tmp_path / "reference")
    args.reference_model = str(tmp_path / "reference")
    score_dataset(
        tiny.llama(), tiny.prompt_data(), tokenizer=tiny.tokenizer(), args=args, output_dir=tmp_path / "scored"
    )
    assert read_manifest(tmp_path / "scored")["identity"]["reference_dtype"] == "bfloat16"


def test_bad_settings_are_refused_before_anything_is_loaded(args, tmp_path):
    def refused(match, **changes):
        settings = {"reference_model": "nowhere", "output_dir": tmp_path / "scored", "args": args, **changes}
        with pytest.raises(ValueError, match=match):
            score_dataset("nowhere", tiny.prompt_data(), **settings)

    refused("reference_model is missing", reference_model=None)
    refused("exclude each other", ref_logps="file.parquet")
    refused("shard_tokens=0 must be at least 1", shard_tokens=0)
    (tmp_path / "thesis").mkdir()
    Path(tmp_path / "thesis" / "chapter.txt").write_text("keep")
    refused("exists and is not empty, nothing was overwritten", output_dir=tmp_path / "thesis")


def test_imported_values_take_the_place_of_a_model(args, tmp_path):
    settings = {"tokenizer": tiny.tokenizer(), "args": args}
    whole = score_dataset(
        tiny.llama(), tiny.prompt_data(), reference_model=tiny.llama(seed=1), output_dir=tmp_path / "a", **settings
    )
    again = score_dataset(
        tiny.llama(), tiny.prompt_data(), base_logps=tmp_path / "a", ref_logps=tmp_path / "a",
        output_dir=tmp_path / "b", **settings,
    )  # fmt: skip
    for column in ("input_ids", "labels", "base_logps", "ref_logps"):
        assert again[column][:] == whole[column][:]
    assert len(load_scores(tmp_path / "b")) == 24
