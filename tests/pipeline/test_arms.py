"""Arms on the same rows and steps, judged rows of their own, stops before training, and the table of scored rows."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from selsft.cli import main
from selsft.errors import InputError
from selsft.pipeline.arms import parse_arms, same_training
from selsft.pipeline.plan import Stopped
from selsft.records import write_json
from tests.support import tiny
from tests.support.recipe import RECIPE, plan, run_here

pytestmark = pytest.mark.slow


def marked_rows(count=48):
    """Rows of which every second one has a wrong word, marked."""
    rows = tiny.prompt_data(count).to_list()
    for index, row in enumerate(rows):
        words = row["completion"].split()
        row |= {
            "id": f"row-{index}",
            "prompt": f"{row['prompt']} {index}",
            "spans": [[1, 1 + len(words[0])]] if index % 2 else [],
        }
    return rows


def write_rows(rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


class Commands:
    """Runs commands here, and keeps their names and flags."""

    def __init__(self):
        self.done = []

    def __call__(self, command, argv):
        self.done.append((command, yaml.safe_load(Path(argv[1]).read_text())))
        run_here(command, argv)

    @property
    def names(self):
        return [name for name, _ in self.done]


def folders(found):
    return {stage.name: stage.folder for stage in found.stages}


def weights_of(folder):
    return load_file(folder / "model" / "adapter_model.safetensors")


def test_arms_are_trained_alike_and_differ_in_weights_alone(folder):
    write_rows(marked_rows())
    commands = Commands()
    arms = ["--arms", "plain,ignore,forget,random,oracle", "--forget_weight", "2.0", "--logging_steps", "1"]
    found = plan(*arms, run=commands)
    found.execute([])
    at = folders(found)
    # Plain training is what `selsft train` makes of the rows without their marks
    flags = {key: value for key, value in RECIPE.items() if key not in ("stages", "negative_threshold")}
    flags |= {"dataset_name": str(at["split"] / "train.parquet"), "output_dir": "direct", "data_seed": 42}
    Path("direct.yaml").write_text(yaml.safe_dump(flags))
    assert main(["train", "--config", "direct.yaml"]) == 0
    direct = load_file("direct/adapter_model.safetensors")
    models = {arm: weights_of(at[f"train-{arm}-seed42"]) for arm in found.trained}
    assert all(torch.equal(direct[name], models["plain"][name]) for name in direct)
    for arm in ("ignore", "forget", "random", "oracle"):
        assert any(not torch.equal(direct[name], models[arm][name]) for name in direct), arm

    def negatives(stage):
        rows = pq.read_table(at[stage] / "selected.parquet").to_pydict()["token_weights"]
        return [index for index, weight in enumerate(np.concatenate(rows)) if weight < 0]

    assert len(negatives("random-random")) == len(negatives("select")) > 0
    assert negatives("random-random") != negatives("select")
    configs = {Path(config["output_dir"]).parent.name.rpartition("-")[0]: config for _, config in commands.done}
    assert configs["train-ignore-seed42"]["dataset_name"] == configs["train-forget-seed42"]["dataset_name"]
    assert configs["train-oracle-seed42"]["dataset_name"].endswith("marked.parquet")
    report = json.loads(Path("run/report.json").read_text())
    by_name = {arm["name"]: arm for arm in report["arms"]}
    trace(report)
    assert by_name["plain"]["negative"] is None and 0 < by_name["oracle"]["negative"] < 0.5
    assert {arm["steps"] for arm in report["arms"]} == {3}
    # The held-out rows have marks, so the verdict is about what they mark
    assert report["verdict"]["measure"] == "gap" and len(report["verdict"]["controls"]) == 2


def trace(report):
    """Follow each number of each arm to the stage that it comes from, and that stage to what it read."""
    for arm in report["arms"]:
        assert len(arm["folders"]) == len(arm["evaluations"]) >= 1
        for number, (trained, evaluated) in enumerate(zip(arm["folders"], arm["evaluations"], strict=True)):
            trained, evaluated = Path("run", trained), Path("run", evaluated)
            config = yaml.safe_load((evaluated / "config.yaml").read_text())
            assert Path(config["model_name_or_path"]).resolve() == (trained / "model").resolve()
            assert json.loads((evaluated / "stage.json").read_text())["inputs"]["trained"] == trained.name
            rows = pq.read_table(evaluated / "evaluation" / "rows.parquet").to_pydict()
            mean = np.mean(np.divide(rows["nll"], rows["tokens"]))
            nll = next(each for each in report["measures"] if each["name"] == "nll")
            assert nll["by_seed"][arm["name"]][number] == pytest.approx(mean)
            data = Path(yaml.safe_load((trained / "config.yaml").read_text())["dataset_name"])
            assert (
                data.is_file()
                and data.parent.name in json.loads((trained / "stage.json").read_text())["inputs"].values()
            )


def test_rows_that_mark_themselves_need_no_scores(folder):
    write_rows(marked_rows())
    commands = Commands()
    found = plan("--score", "oracle", "--negative_threshold", "null", "--logging_steps", "1", run=commands)
    assert not {"reference", "score", "select"} & set(folders(found))
    found.execute([])
    assert set(commands.names) == {"train", "evaluate"}
    models = [weights_of(folders(found)[f"train-{arm}-seed42"]) for arm in ("plain", "ignore", "forget")]
    assert all(any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.combinations(models, 2))
    report = json.loads(Path("run/report.json").read_text())
    shares = {arm["name"]: arm["negative"] for arm in report["arms"]}
    assert shares["plain"] is None and shares["forget"] > 0 == shares["ignore"]
    assert report["verdict"]["kind"] in ("better", "worse", "no difference")


def test_an_arm_with_another_threshold_has_its_own_selection_and_the_others_share_one(folder):
    arms = "{plain: , forget: , strict: {negative_threshold: 0.2}, npo: {like: forget, forget_objective: npo}}"
    found = plan("--arms", arms, "--seeds", "2")
    names = [stage.name for stage in found.stages]
    assert [name for name in names if name.startswith("select")] == ["select", "select-strict"]
    trained = [name for name in names if name.startswith("train")]
    assert trained == [f"train-{arm}-seed{n}" for n in (42, 43) for arm in ("plain", "forget", "strict", "npo")]
    one, two = ({stage.name: stage.key for stage in plan("--arms", arms, "--seeds", n).stages} for n in "12")
    assert one.items() < two.items()


def test_arms_of_other_length_cannot_be_compared(tmp_path):
    for name, steps in (("plain", 3), ("forget", 4)):
        record = {"data": {"rows": 2, "tokens": 9}, "finished": {"steps": steps}}
        write_json(tmp_path / name / "selsft_run.json", record)
    with pytest.raises(InputError, match="plain: 2 rows, 9 tokens, 3 steps; forget: 2 rows, 9 tokens, 4 steps"):
        same_training({name: tmp_path / name for name in ("plain", "forget")})
    same_training({"plain": tmp_path / "plain"})


def test_arms_by_default_are_those_that_differ():
    assert [arm.name for arm in parse_arms(None, {}, True)] == ["plain", "ignore", "forget"]
    assert [arm.name for arm in parse_arms(None, {}, False)] == ["plain", "ignore"]


@pytest.mark.parametrize(
    ("threshold", "words"), [("10", "nothing is selected: the lowest score is"), ("-9", "of the tokens are negative")]
)
def test_a_run_stops_before_it_trains_for_nothing(folder, capsys, threshold, words):
    argv = ["run", "recipe.yaml", "--output_dir", "run", "--negative_threshold", threshold]
    commands = Commands()
    with pytest.raises(Stopped, match=words):
        plan("--negative_threshold", threshold, run=commands).execute([])
    assert commands.names == ["train", "score"]
    capsys.readouterr()
    assert main(argv) == 3  # finds the stages, stops again
    printed = capsys.readouterr()
    assert words in printed.err and "--negative_threshold 0." in printed.err and "--go_on true" in printed.err
    verdict = json.loads(Path("run/report.json").read_text())["verdict"]
    assert verdict["kind"] == ("nothing selected" if threshold == "10" else "stopped")
    plan("--negative_threshold", threshold, "--go_on", "true", run=commands).execute([])
    assert commands.names.count("train") == 4
    verdict = json.loads(Path("run/report.json").read_text())["verdict"]
    if threshold == "10":
        assert verdict["kind"] == "nothing selected" and "verdict better" not in Path("run/report.html").read_text()


def test_a_score_that_judged_rows_call_noise_stops_the_run(folder):
    write_rows(marked_rows(96))
    judged = ["--split.judged_fraction", "0.5", "--split.eval_size", "8", "--split.reference_size", "10"]
    with pytest.raises(Stopped, match="is not shown to be better than chance: AUC"):
        plan(*judged, "--learning_rate", "0", "--reference.learning_rate", "1e-9").execute([])
    assert not list(Path("run/stages").glob("train-*"))


def test_a_precision_that_no_threshold_reaches_stops_the_run(folder):
    write_rows(marked_rows(96))
    argv = ["--split.judged_fraction", "0.5", "--split.eval_size", "8", "--split.reference_size", "10"]
    with pytest.raises(Stopped, match="no threshold reaches precision 1: the best is"):
        plan(*argv, "--target_precision", "1.0").execute([])
    verdict = json.loads(Path("run/report.json").read_text())["verdict"]
    assert verdict["kind"] == "stopped" and "lower --target_precision" in verdict["sentence"]


@pytest.mark.parametrize("outside", [False, True])
def test_probe_threshold_and_report_see_rows_of_their_own(folder, outside):
    rows = marked_rows(120)
    write_rows([{key: value for key, value in row.items() if key != "spans"} for row in rows] if outside else rows)
    flags = ["--split.judged_fraction", "0.5"]
    if outside:
        write_rows(rows[:60], "judged.jsonl")
        flags = ["--judged", "judged.jsonl"]
    commands = Commands()
    flags += ["--score", "probe", "--negative_threshold", "0.5", "--go_on", "true", "--arms", "plain,forget"]
    found = plan(*flags, "--split.eval_size", "10", run=commands)
    found.execute([])
    assert commands.names[0] == "score" and "reference" not in folders(found)  # a probe needs none
    split = folders(found)["split"]
    parts = {
        path.stem: {(row["prompt"], row["completion"]) for row in pq.read_table(path).to_pylist()}
        for path in split.glob("*.parquet")
        if path.stem not in ("rows", "marked")
    }
    assert parts.keys() == {"judged", "judged-test", "train", "eval"}
    prompts = [{prompt for prompt, _ in part} for part in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    config = commands.done[0][1]
    assert config["judged"].endswith("judged.parquet") and config["judged_test"].endswith("judged-test.parquet")
    record = json.loads((folders(found)["score"] / "scored" / "judged.json").read_text())
    assert record["test_rows_left_out"] == 0 and record["rows"] + len(parts["judged-test"]) == 60
    assert "on " in json.loads(Path("run/report.json").read_text())["outlook"]["lines"][0]


def test_scored_rows_lead_back_to_the_user_s_own(folder):
    rows = marked_rows()
    write_rows(rows)
    commands = Commands()
    found = plan("--only_score", "true", run=commands)
    found.execute([])
    assert commands.names == ["train", "score"]
    table = list(csv.DictReader((folders(found)["triage"] / "rows.csv").open(encoding="utf-8")))
    assert sorted(int(row["line"]) for row in table) == list(range(1, 49))
    assert all(row["id"] == rows[int(row["line"]) - 1]["id"] for row in table)
    scored = [row for row in table if row["row"]]
    assert {row["part"] for row in scored} == {"train"} and len(scored) == pq.read_table(
        folders(found)["split"] / "train.parquet"
    ).num_rows
    shares = [float(row["negative"]) for row in scored]
    assert shares == sorted(shares, reverse=True) and max(shares) > 0
    selected = pq.read_table(folders(found)["select"] / "selected.parquet").to_pylist()
    for row in scored:
        weights = np.array(selected[int(row["row"])]["token_weights"])
        labels = np.array(selected[int(row["row"])]["labels"])
        assert float(row["negative"]) == pytest.approx((weights < 0).sum() / (labels[1:] != -100).sum())
        text = tiny.tokenizer().decode(selected[int(row["row"])]["input_ids"])
        assert rows[int(row["line"]) - 1]["completion"] in text
        assert row["worst_span"] in text
    assert pq.read_table(folders(found)["triage"] / "rows.parquet").num_rows == 48
    verdict = json.loads(Path("run/report.json").read_text())["verdict"]
    assert verdict["kind"] == "scored" and "unverified" in verdict["sentence"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion": 7}, "row 5 of the data"),
        ({"prompt": "alpha " * 300}, "row 5 of the data has .* tokens, more than the model's context of 256"),
        ({"prompt": b"caf\xe9"}, "line 6 is not UTF-8"),
        ({"completion": None}, "row 5 of the data has no 'completion'"),
        ({"spans": [[0, 999]]}, r"row 5.* \[0, 999\]"),
    ],
)
def test_what_can_be_checked_is_checked_before_anything_is_trained(folder, change, message):
    rows = marked_rows()
    raw = [json.dumps(row).encode() for row in rows]
    raw[5] = json.dumps(
        rows[5] | {key: "X" if isinstance(value, bytes) else value for key, value in change.items()}
    ).encode()
    for value in change.values():
        raw[5] = raw[5].replace(b'"X"', b'"' + value + b'"') if isinstance(value, bytes) else raw[5]
    Path("rows.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    commands = Commands()
    with pytest.raises(InputError, match=message):
        plan("--max_length", "null", run=commands).execute([])
    assert commands.names == []


def test_messages_are_rendered_before_anything_is_trained(folder):
    asked = {"role": "user", "content": "alpha beta"}
    rows = [
        {"messages": [asked | {"content": f"alpha {n}"}, {"role": "assistant", "content": "mu"}]} for n in range(48)
    ]
    rows[7]["messages"] = [asked]
    write_rows(rows)
    commands = Commands()
    with pytest.raises(InputError, match="row 7 of the data has no message of the role 'assistant'"):
        plan("--assistant_only_loss", "true", run=commands).execute([])
    silent = tiny.tokenizer()
    silent.chat_template = None
    silent.save_pretrained("model")
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no chat template to render them with: give --chat_template_path"):
        plan(run=commands).execute([])
    assert commands.names == []


def test_glued_words_are_warned_of_once_and_by_the_row_of_the_data(folder):
    write_rows([{"prompt": f"alpha {n}", "completion": "beta"} for n in range(48)])
    found = plan("--only_score", "true")
    for stage in found.stages[:2]:
        stage.run()
    warnings = json.loads((folders(found)["check"] / "check.json").read_text())["warnings"]
    assert len(warnings) == 1 and "prompts run into their completions, as in row " in warnings[0]
    row = int(warnings[0].split("in row ")[1].split()[0])
    assert warnings[0].startswith(
        f"prompts run into their completions, as in row {row} of the data: 'alpha {row}beta'"
    )


def test_columns_are_named_by_the_recipe(folder):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in tiny.prompt_data(48)]
    write_rows(rows)
    write_rows(rows[:6], "held.jsonl")
    commands = Commands()
    names = ["--columns", "prompt=question,completion=answer", "--only_score", "true"]
    found = plan(*names, "--split.eval_dataset", "held.jsonl", run=commands)
    found.execute([])
    assert commands.names == ["train", "score"] and "columns" not in commands.done[0][1]
    for part in ("train", "eval"):
        assert {"prompt", "completion"} <= set(pq.read_schema(folders(found)["split"] / f"{part}.parquet").names)


def test_a_flag_replaces_the_recipe_s_exclusive_sibling(folder):
    found = plan("--positive_fraction", "0.8")
    flags = found.recipe.flags("select")
    assert flags["positive_fraction"] == 0.8 and "negative_threshold" not in flags
    assert plan("--negative_threshold", "1e-2").recipe.flags("select")["negative_threshold"] == 0.01
    kept = plan("--target_precision", "0.6", "--split.judged_fraction", "0.5").recipe
    assert "negative_threshold" not in kept.flags("select") and kept.flags("select")["target_precision"] == 0.6
