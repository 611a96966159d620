"""The engine of stages: what is skipped, resumed and kept, and which folders are refused."""

import json

import pytest

from selsft.errors import InputError
from selsft.workflow.run import execute
from selsft.workflow.stage import Stage


def test_a_stage_is_interrupted_until_its_record_says_finished(tmp_path):
    def work(folder):
        (folder / "a").write_text("1")
        if not (folder / "again").exists():
            (folder / "again").write_text("")
            raise RuntimeError("cut")

    stage = Stage("s", {}, {}, work, tmp_path)
    assert stage.state() == "new"
    with pytest.raises(RuntimeError):
        stage.run()
    assert stage.state() == "interrupted"
    stage.run()
    assert stage.state() == "finished" and stage.record["interrupted"] == 1
    (stage.folder / "a").unlink()
    assert stage.state() == "changed"


def stages(root, log, text="a", more="b"):
    """Two stages, of which the second reads the first; `log` lists those that worked."""

    def first(folder):
        log.append("first")
        (folder / "file").write_text(text)
        return "one file"

    def second(folder):
        log.append("second")
        (folder / "file").write_text((one.folder / "file").read_text() + more)

    one = Stage("first", {"text": text}, {}, first, root)
    return [one, Stage("second", {"more": more}, {"first": one}, second, root, {"shown/second.txt": "file"})]


def test_changed_settings_make_new_folders_and_going_back_finds_the_old(tmp_path):
    root, log, lines = tmp_path / "run", [], []
    execute(stages(root, log), root, {"name": "x"}, echo=lines.append)
    assert log == ["first", "second"] and (root / "shown/second.txt").read_text() == "ab"
    assert lines[1].endswith("s: one file") and lines[0].startswith("[1/2] first: first-")
    execute(stages(root, log, more="c"), root, {}, echo=lines.append)
    assert log == ["first", "second", "second"] and (root / "shown/second.txt").read_text() == "ac"
    execute(stages(root, log), root, {"name": "x"}, echo=lines.append)
    assert len(log) == 3 and (root / "shown/second.txt").read_text() == "ab"
    assert lines[-1].startswith("[2/2] second: unchanged, skipped")
    execute(stages(root, log, text="z"), root, {}, echo=lines.append)  # what reads it changes with it
    assert log[3:] == ["first", "second"] and (root / "first/file").read_text() == "z"
    assert stages(root, log, text="new")[0].earlier()["settings"] == {"text": "z"}


def test_links_never_mix_old_stages_with_new_ones(tmp_path):
    execute(stages(tmp_path, []), tmp_path, {})
    one, two = stages(tmp_path, [], text="z")

    def fail(folder):
        raise InputError("cut off")

    two.work = fail
    with pytest.raises(InputError, match="stage second: cut off"):
        execute([one, two], tmp_path, {})
    assert (tmp_path / "first/file").read_text() == "z" and not (tmp_path / "shown/second.txt").exists()


def test_a_stage_done_anew_keeps_the_old_folder(tmp_path):
    log = []
    execute(stages(tmp_path, log), tmp_path, {})
    execute(stages(tmp_path, log), tmp_path, {}, from_stage="second")
    assert log == ["first", "second", "second"] and len(list(tmp_path.glob("stages/second-*.1"))) == 1
    with pytest.raises(InputError, match="--from third: the stages of this run are first, second"):
        execute(stages(tmp_path, log), tmp_path, {}, from_stage="third")


def test_what_does_not_read_a_stage_is_left_alone_when_it_is_done_anew(tmp_path):
    log = []

    def made():
        return [Stage("aside", {}, {}, lambda folder: log.append("aside"), tmp_path), *stages(tmp_path, log)]

    execute(made(), tmp_path, {})
    execute(made(), tmp_path, {}, from_stage="first")
    assert log == ["aside", "first", "second", "first", "second"]


def test_dropped_files_come_back_for_whoever_reads_them_again(tmp_path):
    log, lines = [], []
    execute(stages(tmp_path, log), tmp_path, {})
    one, _ = stages(tmp_path, log)
    one.drop((".bin",))
    assert one.state() == "finished" and one.record["dropped"] == []
    one.drop(("file",))
    assert one.state() == "finished" and not (one.folder / "file").exists() and one.record["dropped"] == ["file"]
    (one.folder / "file").write_text("a")  # killed between record and removal
    assert one.state() == "finished"
    one.drop(("file",))
    assert not (one.folder / "file").exists() and one.record["dropped"] == ["file"]
    execute(stages(tmp_path, log), tmp_path, {})
    assert log == ["first", "second"]  # what read it is finished
    execute(stages(tmp_path, log, more="c"), tmp_path, {}, echo=lines.append)
    assert log == ["first", "second", "first", "second"] and "that are read again were dropped" in lines[0]
    assert (tmp_path / "shown/second.txt").read_text() == "ac" and not stages(tmp_path, log)[0].record.get("dropped")


def test_the_manifest_says_how_far_a_run_got(tmp_path):
    root = tmp_path / "run"

    def fail(folder):
        raise InputError("no such thing")

    broken = [*stages(root, []), Stage("third", {}, {}, fail, root)]
    with pytest.raises(InputError, match=r"stage third: no such thing\. What was finished is kept"):
        execute(broken, root, {"name": "x"}, manifest="study.json")
    manifest = json.loads((root / "study.json").read_text())
    assert {name: stage["state"] for name, stage in manifest["stages"].items()} == {
        "first": "finished",
        "second": "finished",
        "third": "interrupted",
    }
    assert (
        manifest["name"] == "x" and manifest["finished"] is None and manifest["stages"]["second"]["reads"] == ["first"]
    )
    execute(broken[:2], root, {}, manifest="study.json", report=lambda folder: folder / "page")
    assert json.loads((root / "study.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"notes.txt": "mine"}, "is not empty and holds no run.json: nothing was overwritten"),
        ({"run.json": '{"stages": ["base"]}'}, "of an earlier version of selsft, which this one cannot resume"),
    ],
)
def test_a_folder_with_other_content_is_not_touched(tmp_path, content, says):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        execute(stages(tmp_path, []), tmp_path, {})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == content
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="holds no run"):
        execute([], tmp_path / "file", {})
