"""`selsft run`: which flag decides which stage, what is skipped, what survives a kill, and one run from end to end."""

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from selsft.cli import main
from selsft.cli.run import check_flags
from selsft.errors import InputError
from selsft.pipeline.plan import Plan
from selsft.recipes import RECIPES
from tests.support import tiny
from tests.support.recipe import RECIPE, plan, run_here

pytestmark = pytest.mark.slow


def keys(found):
    return {stage.name: stage.key for stage in found.stages}


def changed(*overrides):
    """The stages that an override makes anew."""
    before, after = keys(plan()), keys(plan(*overrides))
    assert list(before) == list(after)
    return {name for name in before if before[name] != after[name]}


TRAINED = [f"train-{arm}-seed42" for arm in ("plain", "ignore", "forget")]
EVALUATED = [f"evaluate-{arm}-seed42" for arm in ("plain", "ignore", "forget")]
AFTER_SCORE = ["select", "triage", *TRAINED[1:], *EVALUATED[1:]]


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["--negative_threshold", "2.0"], AFTER_SCORE),
        (["--neutral_band", "0.1"], AFTER_SCORE),
        (["--forget_weight", "0.5"], [TRAINED[2], EVALUATED[2]]),
        (["--forget_objective", "npo"], AFTER_SCORE),  # which needs the log-probabilities of the start
        (["--forget_objective", "wga"], [TRAINED[2], EVALUATED[2]]),
        (["--train.learning_rate", "0.5"], [*TRAINED, *EVALUATED]),
        (["--learning_rate", "0.5"], [*TRAINED, *EVALUATED]),  # the reference has its own
        (["--evaluate.max_new_tokens", "5"], ["evaluate-base", "evaluate-reference", *EVALUATED]),
        (["--logging_steps", "3"], []),
        (["--save_total_limit", "2"], []),
        (["--go_on", "true"], []),
        (
            ["--reference.learning_rate", "0.5"],
            ["reference", "score", *AFTER_SCORE[:4], "evaluate-reference", *EVALUATED[1:]],
        ),
        (["--scoring_batch_size", "2"], ["score", *AFTER_SCORE]),
    ],
)  # fmt: skip
def test_a_flag_decides_the_stages_that_it_concerns(folder, overrides, stages):
    assert changed(*overrides) == set(stages)


def test_another_max_length_leaves_only_the_split(folder):
    assert changed("--max_length", "16") == set(keys(plan())) - {"split"}


def test_another_precision_chooses_another_threshold_and_scores_nothing(folder):
    rows = [row | {"spans": [[1, 4]] if n % 2 else []} for n, row in enumerate(tiny.prompt_data(48).to_list())]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = ["--split.judged_fraction", "0.5", "--split.reference_size", "5"]
    before, after = keys(plan(*judged, "--target_precision", "0.6")), keys(plan(*judged, "--target_precision", "0.7"))
    assert {name for name in before if before[name] != after[name]} == set(AFTER_SCORE)
    given = keys(plan(*judged, "--negative_threshold", "1.5"))
    assert given["score"] == before["score"] and given["select"] != before["select"]
    with pytest.raises(InputError, match=r"target_precision=0\.6 without judged rows"):
        plan("--target_precision", "0.6")


def test_content_decides_not_names_or_times(folder):
    before = keys(plan())
    os.utime("rows.jsonl", (0, 0))
    Path("rows.jsonl").rename("others.jsonl")
    assert keys(plan("--dataset_name", "others.jsonl")) == before
    rows = Path("others.jsonl").read_text()
    Path("others.jsonl").write_text(rows.replace("alpha", "zeta", 1))
    assert set(keys(plan("--dataset_name", "others.jsonl")).items()).isdisjoint(before.items())
    torch.manual_seed(5)
    tiny.llama(seed=9).save_pretrained("model")
    Path("others.jsonl").write_text(rows)
    other = keys(plan("--dataset_name", "others.jsonl"))
    assert other["split"] == before["split"] and other["reference"] != before["reference"]


def outputs(root):
    """What a run has made: weights, token weights, and metrics without times."""
    found = {}
    for path in sorted(Path(root).glob("stages/*/**/*")):
        name = str(path.relative_to(root))
        if Path(name).parts[1][-2] == ".":  # set aside
            continue
        if path.name == "adapter_model.safetensors" and path.parent.name == "model":
            found[name] = {key: value.numpy() for key, value in load_file(path).items()}
        elif path.suffix == ".parquet":
            found[name] = pq.read_table(path).to_pydict()
        elif path.name == "metrics.json":
            metrics = json.loads(path.read_text())
            found[name] = {k: v for k, v in metrics.items() if k not in ("seconds", "model")}
    return found


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        for key, value in left[name].items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, right[name][key], err_msg=name)
            else:
                assert value == right[name][key], (name, key)


def test_from_data_to_report_and_again(folder):
    commands = []

    def run(command, argv):
        commands.append(command)
        run_here(command, argv)

    first = plan(run=run)
    first.execute([])
    assert commands == ["train", "score", *["evaluate"] * 2, *["train", "evaluate"] * 3]
    train = Path("run/train/model")
    assert (train / "adapter_model.safetensors").is_file() and Path("run/report.html").is_file()
    selected = pq.read_table("run/select/selected.parquet").to_pydict()
    counts = json.loads(Path("run/select/selection.json").read_text())
    weights = np.concatenate([np.array(row) for row in selected["token_weights"]])
    assert counts["negative"] == (weights < 0).sum() > 0 and counts["positive"] == (weights > 0).sum() > 0
    assert [row["score"] for row in counts["worst"]] == sorted(row["score"] for row in counts["worst"])
    config = yaml.safe_load(Path("run/train/config.yaml").read_text())
    assert config["dataset_name"].endswith("selected.parquet") and "reference_model" not in config
    report = json.loads(Path("run/report.json").read_text())
    assert {row["name"] for row in report["measures"]} >= {"nll", "kl_to_base"}
    assert {row["name"] for row in report["left_out"]} >= {"exact_match", "eos_rate"}

    before = outputs("run")
    commands.clear()
    plan(run=run).execute([])
    assert commands == []
    plan("--negative_threshold", "0.02", run=run).execute([])  # no model for the selection
    assert commands == ["train", "evaluate"] * 2  # plain training knows no threshold
    assert len(list(Path("run/stages").glob("train-*"))) == 5
    plan(run=run).execute([])  # going back finds the old one
    assert (
        commands == ["train", "evaluate"] * 2
        and {k: v for k, v in outputs("run").items() if k in before}.keys() == before.keys()
    )

    commands.clear()
    (Path("run/select") / "selected.parquet").write_bytes(b"cut")
    plan(run=run).execute([])
    assert commands == [] and pq.read_table("run/select/selected.parquet").to_pydict() == selected
    assert len(list(Path("run/stages").glob("select-*.1"))) == 1

    plan(run=run).execute([], "train")
    assert commands == ["train", "evaluate"] * 3
    kept = outputs("run")
    for name, value in before.items():
        if name.startswith("stages/train"):
            assert_same({name: value}, {name: kept[name]})  # the same seeds, the same weights


def test_the_selected_run_is_training_with_the_reference(folder):
    """The stages split, reference, score, select, train give the model that one `selsft train` gives."""
    overrides = ["--negative_threshold", "0.02", "--lora_dropout", "0.0"]  # dropout would see other random numbers
    plan(*overrides).execute([])
    stages = {stage.name: stage.folder for stage in plan(*overrides).stages}
    flags = {key: value for key, value in RECIPE.items() if key != "stages"}
    flags |= {
        "dataset_name": str(stages["split"] / "train.parquet"),
        "reference_model": str(stages["reference"] / "model"),
        "output_dir": "direct",
        "negative_threshold": 0.02,
        "lora_dropout": 0.0,
        "data_seed": 42,
    }
    Path("direct.yaml").write_text(yaml.safe_dump(flags))
    assert main(["train", "--config", "direct.yaml"]) == 0
    direct = load_file("direct/adapter_model.safetensors")
    staged = load_file(stages["train-forget-seed42"] / "model" / "adapter_model.safetensors")
    for name, value in direct.items():
        torch.testing.assert_close(staged[name], value, rtol=0, atol=1e-5)
    start = load_file(stages["reference"] / "model" / "adapter_model.safetensors")
    assert any((start[name] - direct[name]).abs().max() > 1e-2 for name in direct)


class KilledAt:
    """An audit hook that counts what this process does to files whose path has `name` in it, and kills the process
    before the `at`-th: how far a run gets does not depend on how fast the machine is."""

    def __init__(self, name, at=None):
        self.name, self.at, self.count = name, at, 0
        sys.addaudithook(self)

    def __call__(self, event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink") and self.name in str(args[0]):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(root, at=None):
    """Run the recipe in a fork, where everything is imported already, and return its exit status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        hook = KilledAt(root, at)
        plan(root=root).execute([])
        Path("events").write_text(str(hook.count))
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def test_killed_at_random_moments_ends_as_if_undisturbed(folder):
    assert in_a_child("whole") == 0
    expected, events = outputs("whole"), int(Path("events").read_text())
    assert events > 100
    rng, kills = random.Random(0), 0
    # At most an eighth of the way each time, so that eight kills cannot miss; work done twice only adds to it
    while (status := in_a_child("cut-off", rng.randrange(1, events // 8) if kills < 10 else None)) != 0:
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 8
    found = outputs("cut-off")
    for name, value in expected.items():
        if "rows.parquet" in name or "metrics.json" in name or "adapter" in name or "select" in name:
            assert_same({name: value}, {name: found[name]})
    records = [json.loads(path.read_text()) for path in Path("cut-off").glob("stages/*/stage.json")]
    assert all(record["status"] == "finished" for record in records)
    assert any(record["interrupted"] for record in records)


def test_training_does_not_resume_from_half_a_checkpoint(folder):
    plan(root="whole").execute([])
    expected = outputs("whole")
    calls = []

    def run(command, argv):
        run_here(command, argv)
        calls.extend([command] if command == "train" else [])
        if command == "train" and len(calls) in (
            1,
            3,
        ):  # the end of training, killed while its last checkpoint was written
            model = Path(argv[1]).parent / "model"
            last = model / "checkpoint-4"
            last.mkdir()
            (last / "adapter_model.safetensors").write_bytes(b"")
            (last / "trainer_state.json").write_text('{"global_st' if len(calls) == 3 else "")
            raise InputError("killed")

    for _ in range(2):
        with pytest.raises(InputError, match="killed"):
            plan(root="cut", run=run).execute([])
    plan(root="cut", run=run).execute([])
    found = outputs("cut")
    for name, value in expected.items():
        if "adapter" in name:
            assert_same({name: value}, {name: found[name]})


def test_self_evolving_moves_the_reference(folder):
    commands = []

    def run(command, argv):
        commands.append((command, yaml.safe_load(Path(argv[1]).read_text())))
        run_here(command, argv)

    overrides = ["--split.parts", "3", "--split.reference_size", "0", "--forget_weight", "0.0"]
    evolving = plan(*overrides, run=run)
    names = [stage.name for stage in evolving.stages]
    assert names == ["split", "check", "train-1", "score-2", "select-2", "train-2", "score-3", "select-3", "train-3",
                     "evaluate-base", "evaluate-3"]  # fmt: skip
    evolving.execute([])
    folders = {stage.name: stage.folder for stage in evolving.stages}
    configs = [config for command, config in commands if command != "evaluate"]
    assert [config.get("reference_model") for config in configs] == [
        None, str(folders["train-1"] / "merged"), None, str(folders["train-2"] / "merged"), None
    ]  # fmt: skip
    assert [config["model_name_or_path"] for config in configs] == [
        "model", "model", str(folders["train-1"] / "merged"), "model", str(folders["train-2"] / "merged")
    ]  # fmt: skip
    assert "token_weights" not in pq.read_schema(configs[0]["dataset_name"]).names
    weights = load_file(folders["train-3"] / "merged" / "model.safetensors")
    start = load_file("model/model.safetensors")
    moved = [name for name in start if not torch.equal(start[name], weights[name])]
    assert moved and all("q_proj" in name or "v_proj" in name for name in moved)


def test_two_processes_do_not_share_a_run(folder):
    seen = []

    def run(command, argv):
        if not seen:
            seen.append(command)
            with pytest.raises(InputError, match="another process is at work in it"):
                plan().execute([])
        run_here(command, argv)

    plan(run=run).execute([])
    assert seen == ["train"]


def test_a_failed_stage_keeps_the_others_and_names_itself(folder):
    calls = []

    def run(command, argv):
        calls.append(command)
        if len(calls) == 2:
            raise InputError("no such thing")
        run_here(command, argv)

    with pytest.raises(InputError, match=r"stage score: no such thing\. What was finished is kept"):
        plan(run=run).execute([])
    plan(run=run).execute([])
    assert calls == ["train", "score", "score", *["evaluate"] * 2, *["train", "evaluate"] * 3]


def cli(*argv):
    return main(["run", *argv])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "recipe 'nothing': no such file (recipes that ship with selsft: demo, domain-lora"),
        (["recipe.yaml", "--learning_rat", "1"], "unknown argument --learning_rat: did you mean --learning_rate?"),
        (["recipe.yaml", "--split.eval_sise", "1"], "stages.split.eval_sise is unknown: did you mean eval_size?"),
        (["recipe.yaml", "--from", "nowhere"], "--from nowhere: the stages of this run are split, check, reference"),
        (["recipe.yaml", "--dataset_name", "none.jsonl", "--dry_run"], "dataset_name='none.jsonl': no such file"),
        (["recipe.yaml", "--model_name_or_path", "no-model"], "'no-model' is neither a folder with a model nor"),
        (["recipe.yaml", "--positive_fraction", "0.5", "--negative_threshold", "1"], "exclude each other"),
        (["recipe.yaml", "--arms", "plain,plain"], "arms: 'plain' is named twice"),
        (["recipe.yaml", "--arms", "plain,better"], "arms: 'better' is none of plain, ignore, forget, random, oracle"),
        (["recipe.yaml", "--arms", "plain,base", "--base.forget_weight", "1"], "'base' is the name of a stage"),
        (["recipe.yaml", "--better.forget_weight", "1"], "'better' is neither a stage"),
        (["recipe.yaml", "--forget.max_steps", "1"], "would change rows, order or steps"),
        (["recipe.yaml", "--forget.forget_wait", "1"], "is no flag of `selsft train`: did you mean forget_weight?"),
        (["recipe.yaml", "--headline", "bleu"], "headline='bleu' is none of the measures: exact_match, preference"),
        (["recipe.yaml", "--seeds", "0"], "seeds=0 must be a number of trainings"),
        (["recipe.yaml", "--eval_size", "3"], "eval_size belongs under `stages: split:`"),
        (["recipe.yaml", "--output_dir", "model"], "exists, is not empty and holds no run.json"),
        (["recipe.yaml", "stray"], "unexpected argument 'stray'"),
        (["recipe.yaml", "--dataset_streaming", "true"], "a run splits its data, which a stream cannot be"),
        (["domain-lora"], "model_name_or_path is missing"),
        (
            ["recipe.yaml", "--score", "probe"],
            "stage score: score='probe' has nothing to fit a probe on: give --judged",
        ),
        (
            ["recipe.yaml", "--lora_target_modules", "[q_proj, nose]"],
            "lora_target_modules: 'nose' is not a layer of",
        ),
        (["recipe.yaml", "--report_to", "paper"], "report_to='paper'"),
        (["recipe.yaml", "--model_name_or_path", "hollow"], "'hollow' holds a configuration but no weights"),
        (["recipe.yaml", "--reference_model", "runs.yaml"], "'runs.yaml' is neither a folder with a model nor"),
        (["recipe.yaml", "--forget.forget_objective", "oblivion"], "stage train-forget: "),
        (["broken.yaml"], "is not a YAML file"),
        (["recipe.yaml", "--learning_rate", "{1"], "--learning_rate '{1' is not YAML"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(folder, capsys, argv, message):
    Path("broken.yaml").write_text("a: [1")
    tiny.llama().config.save_pretrained("hollow")
    assert cli(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("selsft run: error: ") and message in error and "\n" not in error
    assert not Path("runs").exists() and not Path("model/stages").exists()


def test_dry_run_says_what_would_be_done(folder, capsys):
    assert cli("recipe.yaml", "--output_dir", "run", "--dry_run") == 0
    assert not Path("run").exists()
    plan().execute([])
    capsys.readouterr()
    assert cli("recipe.yaml", "--output_dir", "run", "--dry_run", "--negative_threshold", "2.0") == 0
    printed = capsys.readouterr().out
    assert "train 28 rows, 417 tokens" in printed and "measured here" in printed  # as the stage `check` counted
    lines = [line for line in printed.splitlines() if "skip" in line or " run" in line]
    told = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in lines if "│" in line}
    assert told["score"] == "skip" and told["select"] == told["train-forget-seed42"] == "run"
    assert cli("recipe.yaml", "--output_dir", "run", "--dry_run", "--from", "score") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "run anew" in line]
    assert len(lines) == 7 and not any("plain" in line or "base" in line for line in lines)  # which read no scores


@pytest.mark.parametrize(
    "name",
    ["domain-lora", "judged-lora", "spans", "forgetting-2508.04329", "rho-1", "token-cleaning", "self-evolving"],
)
def test_shipped_recipes_parse_and_plan(folder, name):
    flags = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--use_cpu", "true", "--bf16", "false"]
    flags += ["--split.judged_fraction", "0.5"] if name == "judged-lora" else []
    found = plan(*flags, source=name)
    check_flags(found)
    stages = [stage.name for stage in found.stages]
    assert stages[0] == "split" and stages[-1].startswith("evaluate-")
    assert ("score" in stages) == (name not in ("rho-1", "self-evolving", "spans"))
    assert ("reference" in stages) == (name not in ("judged-lora", "spans", "self-evolving"))


SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml") if "\nstages:" in path.read_text())
SMALL = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--use_cpu", "true", "--bf16", "false",
         "--dtype", "float32", "--max_length", "32", "--max_steps", "1", "--gradient_accumulation_steps", "1",
         "--gradient_checkpointing", "false", "--report_to", "none", "--evaluate.max_new_tokens", "0"]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "demo"])
def test_no_recipe_ends_well_when_nothing_was_selected(folder, capsys, monkeypatch, name):
    monkeypatch.setattr("selsft.pipeline.stages.run_child", lambda argv: main(argv[3:]))
    monkeypatch.setattr(Plan.__init__, "__defaults__", (run_here,))
    rows = [row | {"prompt": f"{row['prompt']} {n}"} for n, row in enumerate(tiny.prompt_data(48).to_list())]
    if name in ("spans", "judged-lora"):
        wrong = [1, 3] if name == "judged-lora" else None
        rows = [row | {"spans": [wrong] if wrong and n % 2 else []} for n, row in enumerate(rows)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nothing = {
        "rho-1": ["--positive_fraction", "1.0", "--logging_steps", "1"],
        "spans": [],
        "judged-lora": ["--negative_threshold", "1.5", "--split.judged_fraction", "0.5"],
    }.get(name, ["--negative_threshold", "1e3"])
    status = cli(name, "--output_dir", "run", *SMALL, *nothing)
    printed = capsys.readouterr()
    assert status == 3, printed.err
    verdict = json.loads(Path("run/report.json").read_text())["verdict"]
    assert (
        verdict["kind"] in ("nothing selected", "stopped")
        and "verdict better" not in Path("run/report.html").read_text()
    )


def test_tokens_that_are_ranked_in_every_step_are_selected_without_being_forgotten(folder, capsys, monkeypatch):
    """rho-1 leaves the others out, so that no step has a negative one."""
    monkeypatch.setattr("selsft.pipeline.stages.run_child", lambda argv: main(argv[3:]))
    monkeypatch.setattr(Plan.__init__, "__defaults__", (run_here,))
    rows = [row | {"prompt": f"{row['prompt']} {n}"} for n, row in enumerate(tiny.prompt_data(48).to_list())]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learn = [
        "--logging_steps",
        "1",
        "--warmup_steps",
        "0",
        "--learning_rate",
        "1e-3",
        "--reference.learning_rate",
        "1e-2",
    ]
    assert cli("rho-1", "--output_dir", "run", *SMALL, *learn) == 0, capsys.readouterr().err
    report = json.loads(Path("run/report.json").read_text())
    (arm,) = (each for each in report["arms"] if each["name"] == report["method"])
    assert arm["negative"] == 0 and arm["selected"] == pytest.approx(0.4, abs=0.05)
    assert report["verdict"]["kind"] != "nothing selected"


def test_settings_of_the_loss_go_to_the_arms_and_not_to_the_selection(folder):
    given = {"entropy_gate": 3.0, "z_loss_weight": 1e-4, "anchor_weight": 0.1}
    found = plan(*(part for name, value in given.items() for part in (f"--{name}", str(value))))
    stages = {stage.name: stage.settings for stage in found.stages}
    for name in given:
        assert name in stages["train-forget-seed42"] and name in stages["train-ignore-seed42"], name
        assert name not in stages["train-plain-seed42"] and name not in stages["select"], name
    assert stages["select"]["base_logps"] is True  # with which the anchor compares


@pytest.mark.parametrize("kept", [False, True])
def test_whole_models_of_other_arms_make_room_once_they_are_evaluated(folder, kept):
    commands = []

    def run(command, argv):
        commands.append(command)
        run_here(command, argv)

    gently = ["--learning_rate", "1e-4", "--reference.learning_rate", "1e-3", "--go_on", "true"]
    flags = ["--use_peft", "false", "--arms", "plain,forget", *gently, *(["--keep_models", "true"] if kept else [])]
    found = plan(*flags, run=run)
    found.execute([])
    at = {stage.name: stage.folder / "model" for stage in found.stages if stage.name.startswith("train")}
    weights = {name: bool(list(model.rglob("*.safetensors"))) for name, model in at.items()}
    assert weights == {"train-plain-seed42": kept, "train-forget-seed42": True}
    assert Path("run/train/model/model.safetensors").is_file()
    report = Path("run/report.json").read_text()
    commands.clear()
    plan(*flags, run=run).execute([])
    assert (
        commands == [] and json.loads(Path("run/report.json").read_text())["verdict"] == json.loads(report)["verdict"]
    )
    plan(*flags, "--evaluate.max_new_tokens", "2", run=run).execute([])  # plain is read again
    assert commands.count("train") == (0 if kept else 1) and commands.count("evaluate") == 4
    state = json.loads(Path("run/run.json").read_text())["stages"]
    assert all(stage["state"] == "finished" for stage in state.values())


def test_report_escapes_the_text_of_the_data(folder):
    rows = tiny.prompt_data(48).to_list()
    for row in rows:
        row["completion"] = ' <script>alert("x")</script>'
    Dataset.from_list(rows).to_json("rows.jsonl")
    plan().execute([])
    page = Path("run/report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        (["--score", "excess", "--selection_scope", "batch"], ["split", "check", "reference", *TRAINED]),
        (["--score", "random"], ["split", "check", *TRAINED]),
        (
            ["--selection_scope", "sequence", "--max_negative_share", "0.2"],
            ["split", "check", "reference", "score", "select", "triage", *TRAINED],
        ),
        (["--gate_reference_prob", "0.5", "--reference_model", "base"], None),
    ],
)  # fmt: skip
def test_every_scheme_runs(folder, flags, stages):
    share = ["--positive_fraction", "0.6", "--logging_steps", "1"]
    if stages is None:
        with pytest.raises(InputError, match="stage score: reference_model='base' needs a model with a PEFT adapter"):
            plan(*share, *flags).execute([])
        return
    found = plan(*share, *flags)
    check_flags(found)
    assert [stage.name for stage in found.stages if not stage.name.startswith("evaluate")] == stages
    found.execute([])
    folders = {stage.name: stage.folder for stage in found.stages}
    state = json.loads((folders[TRAINED[2]] / "model" / "checkpoint-3" / "trainer_state.json").read_text())
    shares = [log["negative_fraction"] for log in state["log_history"] if "negative_fraction" in log]
    assert shares and 0 < max(shares) <= (0.21 if "select" in stages else 0.61)


def test_gated_selection_needs_no_other_flag(folder):
    plan("--gate_reference_prob", "1.0").execute([])
    open_gate = json.loads(Path("run/select/selection.json").read_text())
    plan("--gate_reference_prob", "0.000001", "--go_on", "true").execute([])
    shut = json.loads(Path("run/select/selection.json").read_text())
    assert open_gate["negative"] > 0 == shut["negative"]
