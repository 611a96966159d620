"""The study on skills whose answer is known, from the flags to the tables; and how it resumes.

Thresholds come from five seeds of this very world (see `test_uniform_labels_leave_nothing_on_train`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from selsft.cli import main
from selsft.errors import InputError
from selsft.records import exclusive
from selsft.skills.config import StudyConfig
from selsft.skills.plan import study_models
from selsft.skills.randomize import assign_labels
from selsft.skills.study import Study
from selsft.skills.table import ALL_TASKS, read_scores
from selsft_kernels import FORGET_OBJECTIVES
from tests.support import skill_world as world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Flags of the world: its tasks and a base model that knows them."""
    root = tmp_path_factory.mktemp("world")
    tasks = world.write_tasks(root / "tasks")
    model = world.write_model(root / "base", tasks, epochs=6.0)
    return {"tasks_dir": str(tasks), "model_name_or_path": str(model)}


SETTINGS = {
    "tasks": ",".join(world.TASKS),
    "seeds": 1,
    "use_cpu": True,
    "hidden_layer": -2,
    "num_train_epochs": 1.0,
    "learning_rate": 1e-3,
    "forget_learning_rate": 1e-3,
    "forget_num_train_epochs": 6.0,
}


def config(data: dict[str, str], output: Path, **changes) -> StudyConfig:
    return StudyConfig(**{**SETTINGS, **data, "output_dir": str(output), **changes})


def run(data: dict[str, str], output: Path, report: bool = False, **changes) -> list[str]:
    """What a study says while it runs; without a report, which has tests of its own, unless it is asked for."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            patch.setattr("selsft.skills.results.compute", lambda folder: None)
            patch.setattr("selsft.report.skills.write_report", lambda folder, found: folder / "report.html")
        Study(config(data, output, **changes), lines.append).run()
    return lines


def notes(folder: Path, stage: str) -> list[dict]:
    """What the stages of this name note, of whatever settings."""
    return [json.loads(path.read_text()) for path in folder.glob(f"stages/{stage}-*/notes.json")]


def answers(folder: Path) -> pd.DataFrame:
    """One row per question at the end of a stage: whether the best option is gold, and P(gold) among the options."""
    table = read_scores(folder)
    table = table[table["step"] == -1]
    keys = ["seed", "stage", "method", "label_task", "eval_task", "split", "example_id"]
    best = table.groupby(keys, observed=True)["logprob"].transform("max")
    odds = np.exp(table["logprob"] - best)
    total = odds.groupby([table[key] for key in keys], observed=True).transform("sum")
    made = table[keys].astype({key: str for key in keys if key != "seed"})
    made = made.assign(correct=table["logprob"] == best, confidence=odds / total, gold=table["is_gold"])
    return made[made["gold"]]


def accuracy(found: pd.DataFrame, **where) -> float:
    for key, value in where.items():
        found = found[found[key] == value]
    assert len(found) > 50
    return float(found["correct"].mean())


@pytest.fixture(scope="module")
def study(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "run"
    run(data, folder, methods="uniform,flip", label_tasks="hot_yes,size", seeds=2)
    return folder


@pytest.fixture(scope="module")
def found(study) -> pd.DataFrame:
    return answers(study)


def test_the_tasks_are_known_before(found):
    for task in world.TASKS:
        for split in ("train", "test"):
            assert accuracy(found, stage="base", eval_task=task, split=split) > 0.95
            assert accuracy(found, stage="finetuned", label_task=task, eval_task=task, split=split) > 0.95


def test_uniform_labels_leave_nothing_on_train(found):
    """A noun's few labels have a majority by chance, and the model answers with it: over five seeds and both tasks the
    accuracy had mean 0.513 and standard deviation 0.106. The bounds are 3.3 deviations, for the mean of four 3.8."""
    gaps = [
        accuracy(found, method="uniform", label_task=task, eval_task=task, split="train", seed=seed) - 0.5
        for task in ("hot_yes", "size")
        for seed in (0, 1)
    ]
    assert abs(np.mean(gaps)) < 0.2 and max(map(abs, gaps)) < 0.35


def test_flipped_labels_go_below_chance_on_new_questions_too(found):
    """Over five seeds 0 to 0.20, on train and on test."""
    for task in ("hot_yes", "size"):
        for split in ("train", "test"):
            assert accuracy(found, method="flip", label_task=task, eval_task=task, split=split) < 0.35


@pytest.mark.parametrize(("method", "forgotten"), [("uniform", 0.7), ("flip", 0.2)])
def test_tasks_with_one_rule_forget_together_and_others_stay(found, method, forgotten):
    """Over five seeds the task with the same rule went to 0.53 (standard deviation 0.15) under `uniform` and to 0
    under `flip`, those with another rule to 0.73 at worst and 0.90 on average."""
    shared = accuracy(found, method=method, label_task="hot_yes", eval_task="warm_yes", split="test")
    other = accuracy(found, method=method, label_task="hot_yes", eval_task="size", split="test")
    back = accuracy(found, method=method, label_task="size", eval_task="hot_yes", split="test")
    assert shared < forgotten
    assert min(other, back) > 0.6
    assert (other + back) / 2 > 0.75
    assert min(other, back) - shared > 0.15


def test_the_tables_say_what_was_trained(study, data):
    table = read_scores(study)
    task = Study(config(data, study, methods="uniform,flip", label_tasks="hot_yes,size", seeds=2)).tasks["hot_yes"]
    ids = [example.id for example in task.train]
    own = table[(table["label_task"] == "hot_yes") & (table["eval_task"] == "hot_yes") & (table["split"] == "train")]
    for seed in (0, 1):
        for method in ("uniform", "flip"):
            rows = own[(own["method"] == method) & (own["seed"] == seed) & own["is_assigned"].fillna(False)]
            labels = rows.set_index("example_id")["option"].reindex(ids)
            expected = assign_labels(task.train, method, seed)
            assert labels.tolist() == expected.tolist()
            (note,) = notes(study, f"forgotten-{method}-full-hot_yes-seed{seed}")
            right = [label == example.gold for label, example in zip(expected, task.train, strict=True)]
            assert note["match_rate"] == [pytest.approx(np.mean(right))]
    elsewhere = table[(table["stage"] != "forgotten") | (table["split"] == "test")]
    assert elsewhere["is_assigned"].isna().all()
    base = table[table["stage"] == "base"]
    assert set(base["run"]) == {"base-seed0"} and len(base) == 2 * 3 * len(world.NOUNS) * len(world.FILLERS)
    manifest = json.loads((study / "study.json").read_text())
    assert manifest["finished"] and len(manifest["stages"]) == 1 + 2 * (3 + 4) == len(
        list((study / "scores").iterdir())
    )
    assert manifest["tasks"]["size"]["train"] == len(task.train)
    examples = pq.read_table(study / "examples.parquet").to_pandas()
    row = examples[(examples["example_id"] == ids[3])].iloc[0]
    assert (row["prompt"], tuple(row["options"]), row["gold"]) == (
        task.train[3].prompt,
        task.train[3].options,
        task.train[3].gold,
    )
    assert not list((study / "models").iterdir())  # nothing starts from them any more


def test_hidden_states_lie_beside_their_examples(study):
    from safetensors.numpy import load_file

    folder = study / "hidden" / "forgotten-flip-full-size-seed1"
    assert sorted(file.name for file in folder.iterdir()) == [
        f"size-{split}.{kind}" for split in ("test", "train") for kind in ("json", "safetensors")
    ]
    states, notes = load_file(folder / "size-test.safetensors"), json.loads((folder / "size-test.json").read_text())
    count = len(notes["example_ids"])
    assert states["question"].shape == (count, 48) and states["options"].shape == (sum(notes["option_counts"]), 48)
    assert (notes["layer"], notes["method"], notes["label_task"], notes["seed"]) == (-2, "flip", "size", 1)
    assert len(list((study / "hidden" / "base").glob("*.safetensors"))) == 6


def test_token_objectives_with_a_retain_set_from_a_shared_reference(data, tmp_path):
    """Forgetting the answers makes their probability fall, and the retained task keeps what it had."""
    settings = {
        "tasks": "hot_yes,size", "label_tasks": "hot_yes", "methods": ",".join(FORGET_OBJECTIVES),
        "reference": "shared", "retain_tasks": "others", "hidden_states": "none", "forget_floor": -4.0,
        "forget_num_train_epochs": 2.0,
    }  # fmt: skip
    run(data, tmp_path / "run", **settings)
    found = answers(tmp_path / "run")
    assert set(found[found["stage"] == "finetuned"]["label_task"]) == {ALL_TASKS}
    table = read_scores(tmp_path / "run")
    gold = table[table["is_gold"] & (table["split"] == "train") & (table["eval_task"] == "hot_yes")]
    before = gold[gold["stage"] == "finetuned"]["logprob"].mean()
    for method in FORGET_OBJECTIVES:
        after = gold[gold["method"] == method]["logprob"].mean()
        assert after < before - 0.5, method
        assert accuracy(found, method=method, eval_task="hot_yes", split="train") < 0.9, method
        assert accuracy(found, method=method, eval_task="size", split="test") > 0.95, method
    assert gold["is_assigned"].isna().all()
    assert not list((tmp_path / "run" / "hidden").rglob("*.safetensors"))


def test_lora_curves_and_labels_that_are_drawn_in_each_epoch(data, tmp_path):
    settings = {
        "tasks": "hot_yes", "use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "methods": "uniform,npo",
        "redraw": "per_epoch", "learning_rate": 5e-3, "forget_learning_rate": 5e-3, "forget_num_train_epochs": 3.0,
        "hidden_states": "none", "keep_models": True,
    }  # fmt: skip
    run(data, tmp_path / "curve", score_steps=12, **settings)
    run(data, tmp_path / "plain", **{**settings, "methods": "uniform", "keep_models": False})
    curve, plain = read_scores(tmp_path / "curve"), read_scores(tmp_path / "plain")
    # looking on changes nothing, to the last bit
    same = curve[(curve["step"] == -1) & (curve["method"] != "npo")].reset_index(drop=True)
    pd.testing.assert_frame_equal(same.astype({"run": str, "method": str}), plain.astype({"run": str, "method": str}))
    assert (same["logprob"] == plain["logprob"]).all()
    forgetting = curve[(curve["method"] == "uniform") & (curve["step"] >= 0)]
    assert sorted(set(forgetting["step"])) == [0, 12, 24, 36]  # 3 epochs of 192 rows in batches of 16
    assert sorted(set(curve[(curve["stage"] == "finetuned")]["step"])) == [-1, 0, 12]
    start = forgetting[forgetting["step"] == 0].set_index(["example_id", "option"])["logprob"]
    end = plain[(plain["stage"] == "finetuned") & (plain["split"] == "train")].set_index(["example_id", "option"])
    assert (start - end["logprob"]).abs().max() < 1e-4  # forgetting starts where fine-tuning has ended
    assert curve["is_assigned"].isna().all()  # there is no one label
    (note,) = notes(tmp_path / "curve", "forgotten-uniform-lora-per_epoch-hot_yes-seed0")
    assert len(set(note["match_rate"])) > 1 and len(note["match_rate"]) == 3
    adapters = sorted((tmp_path / "curve" / "models").rglob("adapter_model.safetensors"))
    assert [path.parent.name for path in adapters] == [
        "finetuned-hot_yes-seed0",
        "forgotten-npo-lora-hot_yes-seed0",
        "forgotten-uniform-lora-per_epoch-hot_yes-seed0",
    ]
    found = answers(tmp_path / "curve")
    assert accuracy(found, stage="finetuned", split="test") > 0.95
    assert accuracy(found, method="uniform", split="train") < 0.9


# Interrupted, resumed, changed


SMALL = {"tasks": "hot_yes,size", "label_tasks": "hot_yes", "methods": "uniform", "forget_num_train_epochs": 2.0}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    lines = run(data, folder, report=True, **SMALL)
    assert lines[-1] == f"Report: {folder / 'report.html'}" and (folder / "report.html").stat().st_size > 1000
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a reader of the study looks at."""
    files = [*folder.glob("scores/*"), *folder.glob("hidden/*/*"), folder / "examples.parquet"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_killed_study_resumes_to_the_same_tables(data, whole, tmp_path):
    folder = tmp_path / "run"
    flags = {**SETTINGS, **SMALL, **data, "output_dir": str(folder)}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, *argv], env=environment, cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 120
        while not (folder / "in-training").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert (folder / "in-training").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder / "in-training").unlink()
    manifest = json.loads((folder / "study.json").read_text())
    done = {name for name, stage in manifest["stages"].items() if stage["state"] == "finished"}
    assert done == {"base", "finetuned-hot_yes-seed0"} == {file.stem for file in (folder / "scores").iterdir()}
    (cut,) = folder.glob("stages/forgotten-*")
    (cut / ".scores.parquet.part").write_bytes(b"half")
    stamps = {name: (folder / "scores" / f"{name}.parquet").stat().st_mtime_ns for name in done}
    lines = run(data, folder, **SMALL)
    assert sum("unchanged, skipped" in line for line in lines) == 2 and sum("(resumed)" in line for line in lines) == 1
    assert {name: (folder / "scores" / f"{name}.parquet").stat().st_mtime_ns for name in done} == stamps
    assert contents(folder) == contents(whole)


# Runs the command and, in the middle of the forgetting stage, leaves a mark and waits for its end
KILLED = """
import sys, time
from pathlib import Path
from selsft.cli import main
from selsft.errors import InputError
from selsft.skills import train

class Marker(train.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            (Path(sys.argv[sys.argv.index("--output_dir") + 1]) / "in-training").touch()
            time.sleep(600)

plain = train.train
def marked(*args, method="", callbacks=(), **kwargs):
    return plain(*args, method=method, callbacks=[*callbacks, Marker()] if method else callbacks, **kwargs)
train.train = marked
sys.exit(main(["skills", *sys.argv[1:]]))
"""


def test_finished_stages_are_kept_and_changed_ones_refused(data, whole, capsys):
    before = contents(whole)
    assert all("unchanged, skipped" in line for line in run(data, whole, **SMALL) if line.startswith("["))
    assert contents(whole) == before
    with pytest.raises(ValueError, match=r"forgotten-uniform.*training\.epochs was 2\.0 and is 1\.0 now.*--recompute"):
        run(data, whole, **{**SMALL, "forget_num_train_epochs": 1.0})
    with pytest.raises(ValueError, match=r"holds the stage base .*scoring\.hidden_layer was -2 and is -1 now"):
        run(data, whole, **SMALL, hidden_layer=-1)
    assert contents(whole) == before


def test_a_method_more_leaves_the_rest_and_recompute_replaces_what_changed(data, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    before = contents(folder)
    more = {**SMALL, "methods": "uniform,flip"}
    lines = run(data, folder, **more)  # starts from a fine-tuned model that was cleaned away, and made again
    assert [line.split(":")[0].split()[-1] for line in worked(lines)] == ["forgotten-flip-full-hot_yes-seed0"]
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    fresh = tmp_path / "fresh"
    run(data, fresh, **more)
    assert contents(fresh) == after
    lines = run(data, folder, **{**more, "forget_num_train_epochs": 1.0}, recompute=True)
    assert len(worked(lines)) == 2
    changed = {name for name, content in contents(folder).items() if after[name] != content}
    assert {Path(name).parts[1].split("-")[0] for name in changed} == {"forgotten"}
    assert not worked(run(data, folder, **more))  # what was computed before is still there
    assert contents(folder) == after
    run(data, folder, **SMALL)  # one method less: its folder stays, its rows are not in the tables
    assert contents(folder) == before and notes(folder, "forgotten-flip-full-hot_yes-seed0")


def worked(lines: list[str]) -> list[str]:
    """The stages that were not skipped."""
    return [line for line in lines if line.startswith("[") and "skipped" not in line]


def test_only_one_process_works_in_a_folder(data, whole):
    with exclusive(whole), pytest.raises(InputError, match="another process is at work in it"):
        run(data, whole, **SMALL)


def test_names_of_stages_are_told_apart():
    base = {"tasks": "a,b", "model_name_or_path": "m", "output_dir": "o", "seeds": 2, "methods": "uniform,npo"}
    names = [model.name for model in study_models(StudyConfig(**base))]
    assert len(names) == len(set(names)) == 1 + 2 * (2 + 4)
    settings = {"reference": "shared", "use_peft": True, "redraw": "per_epoch", "retain_tasks": "others"}
    shared = study_models(StudyConfig(**base, **settings))
    assert [model.name for model in shared][:4] == [
        "base",
        "finetuned-all-seed0",
        "forgotten-uniform-lora-per_epoch-retain-a-seed0",
        "forgotten-npo-lora-retain-a-seed0",
    ]
    seen = {"base"}
    for model in shared[1:]:
        assert model.parent.name in seen
        seen.add(model.name)


# The command


def argv(data, output: Path, **changes) -> list[str]:
    flags = {**SETTINGS, **SMALL, **data, "output_dir": str(output), **changes}
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


def test_a_dry_run_shows_stages_and_tokens_and_writes_nothing(data, tmp_path, capsys):
    assert main(["skills", *argv(data, tmp_path / "run", score_steps=10), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "[  3/4] forgotten-uniform-full-hot_yes-seed0: to do; trains on about 3,072 tokens" in out
    assert "hot_yes: 192 train, 64 test" in out
    assert not (tmp_path / "run").exists()


def test_settings_of_a_yaml_file_and_flags_over_them(data, tmp_path, capsys):
    import yaml

    file = tmp_path / "study.yaml"
    file.write_text(
        yaml.safe_dump({**SETTINGS, **SMALL, **data, "output_dir": str(tmp_path / "run"), "dry_run": True})
    )
    assert main(["skills", "--config", str(file), "--methods", "flip"]) == 0
    out = capsys.readouterr().out
    assert "forgotten-flip-full" in out and "uniform" not in out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": None}, "tasks is missing"),
        ({"methods": "unifrom"}, "methods='unifrom'"),
        ({"methods": ""}, "methods=''"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"label_tasks": "copa"}, "label_tasks: 'copa' is not among"),
        ({"tasks": "hot_yes,copa"}, "'copa' is not in tasks_dir"),
        ({"tasks_dir": "/nowhere"}, "tasks_dir='/nowhere' is not a folder"),
        ({"model_name_or_path": "/nowhere/model"}, "/nowhere/model"),
        ({"hidden_layer": -9}, "hidden_layer=-9: the model has 3 hidden states"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"learning_rate": -1}, "learning_rate=-1.0 must be positive"),
        ({"no_such_flag": 1}, "unknown argument --no_such_flag"),
        ({"training_kwargs": '{"max_steps": 3}'}, "training_kwargs: 'max_steps' is set by the study"),
        ({"training_kwargs": "{"}, "is not JSON"),
        ({"redraw": "per_epoch", "forget_num_train_epochs": 1.5}, "must be whole"),
    ],
)
def test_bad_input_is_one_line_and_status_2(data, tmp_path, capsys, changes, says):
    assert main(["skills", *argv(data, tmp_path / "run", **changes)]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and error.startswith("selsft skills: error: ") and "\n" not in error
    assert not (tmp_path / "run" / "scores").exists()


def test_a_folder_with_other_content_is_not_touched(data, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["skills", *argv(data, tmp_path)]) == 2
    assert "is not empty and holds no study.json" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
