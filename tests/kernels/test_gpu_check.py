"""`gpu_check.py` on jobs that raise, hang and are killed: the others lose nothing; `--resume` repeats these only."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_report, wheels
from benchmarks.gpu_check import Job, run
from selsft.bench import lines

pytestmark = pytest.mark.slow

GPU = "a GPU"
MEASURE = """
import sys
from pathlib import Path
from selsft.bench import lines
lines.append(Path({path!r}), {{"kind": "ceiling", "gpu": "a GPU", "name": {name!r}, "value": 1.5}})
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "check.jsonl"


def job(path: Path, name: str, then: str = "", seconds: float = 60, part: str = "main") -> Job:
    """A job that measures one figure and then does something."""
    return Job(part, name, [sys.executable, "-c", MEASURE.format(path=str(path), name=name) + then], seconds)


def figures(path: Path) -> list[str]:
    return [line["name"] for line in lines.read(path, "ceiling")]


def statuses(path: Path) -> dict[str, str]:
    return {line["name"]: line["status"] for line in lines.read(path, "job")}


def test_whatever_happens_to_a_job_the_others_keep_their_figures(path: Path) -> None:
    pid = path.with_name("pid")
    hangs = f"""
import subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path({str(pid)!r}).write_text(str(child.pid))
time.sleep(600)"""
    killed = f"""
import os, signal
open({str(path)!r}, "a").write('{{"kind": "ceiling", "na')  # a line that it was writing
os.kill(os.getpid(), signal.SIGKILL)"""
    todo = [
        job(path, "first"),
        job(path, "raises", "raise RuntimeError('of no use')"),
        job(path, "hangs", hangs, seconds=3),
        job(path, "killed", killed),
        job(path, "missing", "sys.exit(4)"),
        job(path, "last"),
    ]
    failed = run(todo, path, GPU)
    assert failed == ["main: raises", "main: hangs", "main: killed"]
    assert figures(path) == ["first", "raises", "hangs", "killed", "missing", "last"]
    assert statuses(path) == {
        "first": "done", "raises": "failed with 1", "hangs": "too long", "killed": "killed by SIGKILL",
        "missing": "not available", "last": "done",
    }  # fmt: skip
    ended = {line["name"]: line for line in lines.read(path, "job")}
    assert "RuntimeError: of no use" in ended["raises"]["output"]
    state = Path(f"/proc/{pid.read_text()}/stat")  # a process that the hanging one had started
    assert not state.exists() or state.read_text().split()[2] == "Z"

    # Again, with what was wrong mended: only what did not end well.
    again = [job(path, each.name) for each in todo]
    assert run(again, path, GPU, resume=True) == []
    assert figures(path)[6:] == ["raises", "hangs", "killed", "missing"]
    assert set(statuses(path).values()) == {"done"}
    # On another GPU nothing was done.
    assert run([job(path, "first")], path, "another GPU", resume=True) == [] and figures(path)[10:] == ["first"]
    section, missed = gpu_report.of_one_device(GPU, lines.read(path))
    assert "Jobs: 6 of 6 done" in section and "not measured" in section and not missed


def test_a_budget_leaves_the_rest_for_the_next_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    slow = job(path, "slow", "import time; time.sleep(600)", seconds=300)
    assert run([slow, job(path, "after")], path, GPU, budget=6) == []  # cut off is not failed
    assert time.monotonic() - started < 20
    assert statuses(path) == {"slow": "cut off"} and "after" not in figures(path)
    assert run([job(path, "slow"), job(path, "after")], path, GPU, resume=True) == []
    assert statuses(path) == {"slow": "done", "after": "done"}
    # A part that has used its time up does not cost the next one its own.
    monkeypatch.setattr(gpu_check, "PART_SECONDS", 6)
    todo = [job(path, "long", "import time; time.sleep(600)"), job(path, "same part"), job(path, "next", part="long")]
    run(todo, path, GPU)
    assert statuses(path) == {"slow": "done", "after": "done", "long": "cut off", "next": "done"}


def test_every_part_has_jobs_and_ours_come_first() -> None:
    options = gpu_check.parser().parse_args(["--hidden_states", "states.safetensors"])
    jobs = gpu_check.jobs(options)
    assert list(dict.fromkeys(each.part for each in jobs)) == list(gpu_check.PARTS)
    assert [each.name for each in jobs if each.part == "main"][:2] == ["selsft-statistics", "selsft"]
    assert {"liger-large-chunk", "real cce"} <= {each.name for each in jobs}
    assert all(each.seconds <= gpu_check.PART_SECONDS for each in jobs)
    assert len({each[:2] for each in jobs}) == len(jobs)
    only = gpu_check.jobs(gpu_check.parser().parse_args(["--only", "step", "tests"]))
    assert {each.part for each in only} == {"step", "tests"}


def test_it_runs_from_a_source_tree_without_installation(tmp_path: Path) -> None:
    """One part, in another folder, with nothing of the project on the path."""
    path = tmp_path / "check.jsonl"
    command = [sys.executable, str(Path(gpu_check.__file__)), "--cpu", "--lines", str(path), "--only", "profile"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + path.with_suffix(".log").read_text()
    assert set(statuses(path).values()) == {"done"} and len(statuses(path)) == 3
    text = path.with_suffix(".md").read_text()
    assert "frozen, chosen rows" in text and "frozen aten::mm" in text and "Jobs: 3 of 3 done" in text
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True)
    assert again.stdout.count(b"done before") == 3


def test_without_a_gpu_it_says_so(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu_check, "device", lambda cpu: None)
    assert gpu_check.main(["--lines", str(path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not path.exists()


def test_wheels_stand_in_for_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    monkeypatch.setattr(wheels, "WHEELS", {"nobody_has_this": "nobody-has-this==1.0", "json": "json==1.0"})
    for name in wheels.WHEELS:
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "VALUE = 3")
    site = wheels.unpacked(tmp_path)
    assert (site / "nobody_has_this" / "__init__.py").exists() and not (site / "json").exists()


def test_the_last_line_of_a_measurement_counts(path: Path) -> None:
    """Of the union of several runs; ratios of training steps are those of the same case."""
    step = {"kind": "step", "gpu": GPU, "shape": "1.2B", "layout": "packed", "loss_ms": None}
    for tuning, arm, ms in (("lora", "sft", 9), ("lora", "sft", 10), ("full", "sft", 4), ("lora", "precomputed", 8)):
        lines.append(path, {**step, "tuning": tuning, "arm": arm, "step_ms": ms, "peak_mib": 2 * ms})
    steps = gpu_report.last(lines.read(path, "step"), "shape", "tuning", "layout", "arm")
    assert len(steps) == 3 and gpu_report.step_ratios(steps) == {"step_ms": 0.8, "peak_mib": 0.8}
    assert json.dumps(steps[0]["step_ms"]) == "10" and "| lora | packed | precomputed | 8.0 | 0.80 |" in (
        gpu_report.step_table(steps)
    )
