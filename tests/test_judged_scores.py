"""`score_dataset` with judged rows: what it fits, measures, refuses, and hands to training."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.cli import main
from selsft.data.scored_folder import load_scores, read_manifest
from selsft.errors import InputError
from selsft.evaluation.judging import choose_threshold
from selsft.records import write_sealed
from selsft.report.terminal import print_judged
from selsft.score import score_dataset
from selsft.selection.chosen import use_folder
from tests.support import judged, tiny
from tests.support.oracle import plain_logps

pytestmark = pytest.mark.slow


@pytest.fixture
def score(options, tmp_path):
    def run(folder="scored", model=None, data=None, reference=None, rows=None, **changes):
        settings = {**options, "max_length": 64, "output_dir": str(tmp_path / "unused"), **changes}
        extra = {name: settings.pop(name) for name in ("judged", "judged_test", "probe_clean", "rescore") if name in settings}  # fmt: skip  # noqa: E501
        for name in [name for name, rows in extra.items() if isinstance(rows, str)]:
            settings[name] = extra.pop(name)
        return score_dataset(
            model or tiny.llama(), data or judged.data(12, 9, judged=False), output_dir=tmp_path / folder,
            reference_model=reference, tokenizer=tiny.tokenizer(), args=SelectiveSFTConfig(**settings), **extra,
        )  # fmt: skip

    return run


def measured(folder: Path) -> dict:
    return json.loads((folder / "judged.json").read_text())


def train_settings(options, **changes):
    return SelectiveSFTConfig(**{**options, "max_length": 64, **changes})


def test_a_probe_is_fitted_measured_and_used_by_training(score, options, tmp_path):
    scored = score(score="probe", judged=judged.data(40), judged_test=judged.data(20, 7), target_precision=0.9)
    assert set(scored.column_names) == {"input_ids", "labels", "base_logps", "probe_scores"}
    found = measured(tmp_path / "scored")
    for sample, rows in (("judged", 40), ("test", 20)):
        assert set(found[sample]) == {"probe", "surprisal", "random"}
        token = found[sample]["probe"]["token"]
        assert token["auc"] > 0.99 and token["n_rows"] == rows and token["n_wrong"] == rows / 2
        assert set(token) >= {"auc", "auc_low", "auc_high", "ap", "n_rows", "n_wrong"}
        assert set(found[sample]["probe"]) == {"token", "onset", "span", "row"}
        assert found[sample]["random"]["token"]["auc"] < 0.7
    assert found["probe"]["labels"] == "judged rows" and found["test_threshold"]["precision"] > 0.8
    assert [line["share"] for line in found["learning_curve"]] == [0.25, 0.5, 1.0, 2.0]
    again, threshold = choose_threshold(tmp_path / "scored", 0.9)  # from the folder, without a model
    assert again == {name: found[name] for name in ("threshold", "test_threshold")}
    assert asdict(threshold) == found["threshold"]
    args = train_settings(options)
    use_folder(args, tmp_path / "scored")
    assert args.score == "probe" and args.pooling == "word"
    assert args.negative_threshold == found["threshold"]["negative_threshold"]
    run = SelectiveSFTTrainer(tiny.llama(), args, train_dataset=scored, processing_class=tiny.tokenizer())
    mu = set(tiny.tokenizer()(" mu")["input_ids"])
    negative = [
        [token for token, weight in zip(row["input_ids"], row["token_weights"], strict=True) if weight < 0]
        for row in run.train_dataset
    ]
    assert sum(map(len, negative)) >= 6 and {token for row in negative for token in row} <= mu


def test_the_users_own_settings_stay(score, options, tmp_path):
    score(score="probe", judged=judged.data(40), target_precision=0.9)
    for changes in ({"negative_threshold": 0.25}, {"positive_fraction": 0.8}, {"score": "probe", "negative_threshold": 0.25}):  # fmt: skip  # noqa: E501
        args = train_settings(options, **changes)
        use_folder(args, tmp_path / "scored")
        assert args.score == "probe"
        assert args.negative_threshold == changes.get("negative_threshold")
    other = train_settings(options, score="surprisal")
    use_folder(other, tmp_path / "scored")
    assert other.score == "surprisal" and other.effective_fraction == 0.95


def test_rows_that_were_fitted_on_count_nowhere(score, tmp_path):
    both = judged.rows(40) + judged.rows(10, 7)
    score(score="probe", judged=judged.data(40), judged_test=Dataset.from_list(both))
    found = measured(tmp_path / "scored")
    assert found["test"]["probe"]["token"]["n_rows"] == 10 and found["test_rows_left_out"] == 40
    with pytest.raises(InputError, match="every row of judged_test is among the judged rows"):
        score("b", score="probe", judged=judged.data(40), judged_test=judged.data(40))
    # a saved probe knows its rows
    probe = str(tmp_path / "scored" / "probe")
    score("c", score="probe", probe=probe, judged=Dataset.from_list(both))
    assert measured(tmp_path / "c")["judged"]["probe"]["token"]["n_rows"] == 10
    with pytest.raises(InputError, match="fitted on every one of the judged rows"):
        score("d", score="probe", probe=probe, judged=judged.data(40))
    with pytest.raises(InputError, match="other weights"):
        score("e", model=tiny.llama(seed=4), score="probe", probe=probe)


def test_a_score_like_chance_is_refused(score, options, tmp_path):
    rng = np.random.default_rng(0)
    rows = [{**row, "spans": [[1, 3]] if rng.random() < 0.5 else []} for row in judged.rows(30)]
    score(score="surprisal", judged=Dataset.from_list(rows))
    with pytest.raises(InputError, match=r"not shown to be better than chance: AUC .*--go_on true"):
        use_folder(train_settings(options), tmp_path / "scored")
    args = train_settings(options, go_on=True)
    use_folder(args, tmp_path / "scored")
    assert args.score == "surprisal" and args.effective_fraction == 0.95


def test_a_precision_that_is_not_reached_has_no_default_threshold(score, options, tmp_path):
    wrong = [{**row, "spans": [[1, 4]] if index % 2 else []} for index, row in enumerate(judged.rows(60))]
    score(score="probe", judged=Dataset.from_list(wrong), target_precision=1.0)
    found = measured(tmp_path / "scored")
    if found["threshold"]["negative_threshold"] is None:
        with pytest.raises(InputError, match=r"no threshold reaches precision 1"):
            use_folder(train_settings(options, go_on=True), tmp_path / "scored")
    manifest = read_manifest(tmp_path / "scored")
    manifest["selection"] |= {"negative_threshold": None, "threshold": "no threshold reaches precision 1: the best"}
    manifest["selection"]["refusal"] = None
    write_sealed(tmp_path / "scored" / "selsft_scores.json", manifest)
    with pytest.raises(InputError, match=r"no threshold reaches precision 1: the best.*Set negative_threshold"):
        use_folder(train_settings(options), tmp_path / "scored")
    args = train_settings(options, negative_threshold=0.5)
    use_folder(args, tmp_path / "scored")
    assert args.negative_threshold == 0.5


def test_without_judged_rows_the_score_is_unverified(score, options, tmp_path, caplog):
    score(score="surprisal")
    assert not (tmp_path / "scored" / "judged.json").exists()
    assert read_manifest(tmp_path / "scored")["selection"]["verified"] is False
    args = train_settings(options)
    use_folder(args, tmp_path / "scored")
    assert args.score == "surprisal" and "unverified" not in caplog.text
    scored = load_scores(tmp_path / "scored")
    SelectiveSFTTrainer(tiny.llama(), args, train_dataset=scored, processing_class=tiny.tokenizer())
    said = "score='surprisal' is unverified: no judged rows have chosen a threshold, so the worst 5% of the tokens"
    assert caplog.text.count(said) == 1
    caplog.clear()
    args.positive_fraction = 0.9  # a choice of the user's
    SelectiveSFTTrainer(tiny.llama(), args, train_dataset=scored, processing_class=tiny.tokenizer())
    assert "unverified" not in caplog.text


def test_a_probe_without_labels_says_so(score, tmp_path):
    clean = Dataset.from_list([row for row in judged.rows(80, 3, judged=False) if " mu" not in row["completion"]])
    score(score="probe", probe_clean=clean, judged=judged.data(20), probe_corruptions="spell,case")
    found = measured(tmp_path / "scored")
    assert found["probe"]["labels"] == "clean rows corrupted by rules: spell, case"
    assert found["judged"]["probe"]["token"]["n_rows"] == 20  # nothing was fitted on them
    assert "learning_curve" not in found
    facts = json.loads((tmp_path / "scored" / "probe" / "probe.json").read_text())
    assert facts["labels"].startswith("clean rows corrupted") and facts["model_sha256"]


def test_an_interrupted_run_keeps_its_probe(score, tmp_path, monkeypatch):
    settings = {"score": "probe", "judged": judged.data(40)}
    score(**settings)
    files = {path: path.read_bytes() for path in sorted((tmp_path / "scored").rglob("*")) if path.is_file()}
    (tmp_path / "scored" / "shard-00000.parquet").unlink()
    monkeypatch.setattr("selsft.evaluation.judging.fit_probe", None)  # not fitted again
    score(**settings)
    for path, content in files.items():
        assert path.read_bytes() == content, path
    with pytest.raises(ValueError, match="another probe"):
        score(score="probe", judged=judged.data(30))


@pytest.mark.parametrize("kind", ["models", "adapters", "peft"])
def test_contrast_is_of_two_references(kind, score, tmp_path):
    references = {}
    for name, seed in (("clean", 1), ("noisy", 2)):
        model = tiny.llama(seed=seed)
        if kind != "models":
            model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data *= seed
        model.save_pretrained(tmp_path / name)
        references[name] = model
    policy = tiny.llama()
    if kind == "peft":
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["v_proj"]))
    scored = score(
        model=policy, reference=str(tmp_path / "clean"), score="contrast", judged=judged.data(20),
        noisy_reference_model=str(tmp_path / "noisy"),
    )  # fmt: skip
    for row in scored.select(range(3)):
        mask = np.array(row["labels"]) != -100
        for column, name in (("ref_logps", "clean"), ("noisy_logps", "noisy")):
            expected = plain_logps(references[name].eval(), row["input_ids"])
            np.testing.assert_allclose(np.array(row[column])[mask], np.array(expected)[mask], atol=2e-5)
    assert set(measured(tmp_path / "scored")["judged"]) == {"contrast", "surprisal", "reference", "random"}


def test_shards_are_streamed_and_equal(score, tmp_path):
    data = judged.data(12, 9, judged=False)
    whole = score(score="probe", judged=judged.data(40))
    streamed = score("b", data=data.to_iterable_dataset(), score="probe", judged=judged.data(40))
    for column in whole.column_names:
        assert whole[column][:] == streamed[column][:]
    assert len(load_scores(tmp_path / "b")) == 12


def test_whole_rows(score, tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"], "weight": -1.0 if row["spans"] else 1.0}
        for row in judged.rows(60)
    ]
    score(score="probe", judged=Dataset.from_list(rows), target_precision=0.7)
    found = measured(tmp_path / "scored")
    assert list(found["judged"]["probe"]) == ["row"] and found["level"] == "row"
    with pytest.raises(InputError, match="set score_pooling='row'"):
        score("b", score="surprisal", judged=Dataset.from_list(rows), target_precision=0.7)
    score("c", score="surprisal", judged=Dataset.from_list(rows), score_pooling="row", score_row_worst=2)
    assert measured(tmp_path / "c")["judged"]["surprisal"]["row"]["n_rows"] == 60


def test_groups_are_kept_in_one_fold(score, tmp_path, capsys):
    rows = [{**row, "essay": f"e{index // 4}"} for index, row in enumerate(judged.rows(40))]
    score(score="probe", judged=Dataset.from_list(rows), judged_group="essay")
    record = measured(tmp_path / "scored")
    print_judged(record, dict.fromkeys(("threshold", "refusal")))
    assert "AUC within 10 groups of judged rows: 1.000" in capsys.readouterr().out
    with pytest.raises(InputError, match="judged_group='text' is not a column"):
        score("b", score="probe", judged=Dataset.from_list(rows), judged_group="text")


def test_bad_settings(score, tmp_path):
    for match, changes in (
        ("nothing to fit a probe on", {"score": "probe"}),
        ("set probe_clean", {"score": "surprisal", "probe_corruptions": "swap"}),
        ("without judged rows: set judged", {"score": "surprisal", "target_precision": 0.5}),
        ("judged_test without judged rows", {"score": "surprisal", "judged_test": judged.data(4)}),
        ("probe_clean with score='surprisal'", {"score": "surprisal", "probe_clean": judged.data(4)}),
        ("exclude each other", {"score": "probe", "probe": "x", "probe_clean": judged.data(4)}),
        ("reference_model is missing", {"score": "influence"}),
        ("noisy_reference_model is missing", {"score": "contrast", "reference": tiny.llama(seed=1)}),
        ("score='oracle' is not computed beforehand", {"score": "oracle"}),
        (
            "chooses the threshold",
            {"score": "surprisal", "judged": judged.data(20), "target_precision": 0.5, "negative_threshold": 1.0},
        ),
        ("judged='nowhere.jsonl'", {"score": "surprisal", "judged": "nowhere.jsonl"}),
    ):
        with pytest.raises(InputError, match=match):
            score(**changes)


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    for name, rows in (("judged", judged.rows(40)), ("data", judged.rows(12, 9, judged=False))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "--model_name_or_path model --use_cpu true --bf16 false --max_length 64 --dtype float32 --report_to none"
    command = ["score", *common.split(), "--dataset_name", "data.jsonl", "--scored_dir", "scored"]
    assert main([*command, *"--score probe --judged judged.jsonl --target_precision 0.8".split()]) == 0
    out = capsys.readouterr().out
    assert "probe by threshold, judged rows" in out and "for precision 0.8: " in out and "1: " in out
    train = ["train", *common.split(), "--dataset_name", "scored", "--max_steps", "1", "--output_dir", "out"]
    assert main(train) == 0
    capsys.readouterr()
    assert main([*command[:-1], "b", "--score", "surprisal"]) == 0
    assert "is unverified" in capsys.readouterr().out
