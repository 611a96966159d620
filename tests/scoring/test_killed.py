"""`selsft score` killed at random and at the worst moments: nothing finished is lost, and the end is the same."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import selsft.scoring.frozen
from selsft.cli import score
from selsft.cli.arguments import CommandParser
from selsft.data.scored_folder import ScoredFolder, read_manifest
from tests.cli.test_train import CPU, models, to_flags
from tests.scoring.test_scored_folder import run, shards
from tests.support import tiny

pytestmark = pytest.mark.slow

__all__ = ["models", "run"]  # fixtures


# ---------------------------------------------------------------- killed


class Job:
    """One `selsft score`, prepared once; every `start` forks a process that scores, counting its forward passes."""

    def __init__(self, models, log: Path):
        self.log = log
        flags = {**CPU, "model_name_or_path": models / "model", "dataset_name": "data.jsonl", "shard_tokens": 40}
        flags |= {"scoring_batch_size": 64}
        flags |= {"reference_model": models / "reference", "output_dir": "unused", "show_tokens": 0}
        self.arguments = CommandParser("score", "", "", score.ScoreArguments).parse(to_flags(flags))
        self.scoring = score.prepare(self.arguments, Path("unused"))
        original = selsft.scoring.frozen.forward_logps

        def logged(model, inputs):
            with self.log.open("ab", buffering=0) as handle:
                handle.write(b".")
            return original(model, inputs)

        self.forward = logged

    def work(self, folder: str) -> None:
        selsft.scoring.frozen.forward_logps = self.forward
        self.scoring.store = ScoredFolder(folder, self.scoring.store.identity)
        self.scoring.open({})
        self.scoring.score()
        self.scoring.finish()

    def start(self, folder: str, before=lambda: None) -> int:
        process = os.fork()
        if not process:
            try:
                before()
                self.work(folder)
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
        return process

    def run(self, folder: str, kill_after: float | None = None, before=lambda: None) -> str:
        """`"killed"` or `"done"`."""
        process, start = self.start(folder, before), time.perf_counter()
        while True:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
                return "killed" if os.WIFSIGNALED(status) else "done"
            elapsed = time.perf_counter() - start
            if elapsed > (60 if kill_after is None else kill_after):
                os.kill(process, signal.SIGKILL)
            time.sleep(0.0005)

    def forwards(self) -> int:
        count = self.log.stat().st_size if self.log.exists() else 0
        self.log.unlink(missing_ok=True)
        return count


@pytest.fixture
def job(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.prompt_data(150).to_json("data.jsonl")
    return Job(models, tmp_path / "forwards")


def test_killed_at_random_moments_it_ends_in_the_same_bytes(job):
    start = time.perf_counter()
    assert job.run("peace") == "done"
    seconds, passes, whole = time.perf_counter() - start, job.forwards(), shards("peace")
    assert len(whole) > 50 and passes == 2 * len(whole)  # a batch per shard, for each of two models
    rng, kills, rounds, later = random.Random(0), 0, 0, 0
    while kills < 16:
        rounds += 1
        folder, lost, had = f"trouble-{rounds}", 0, 0
        while job.run(folder, kill_after=rng.uniform(seconds / 8, seconds / 2)) == "killed":
            kills, lost = kills + 1, lost + 1
            there = len(shards(folder)) if Path(folder).is_dir() else 0
            assert there >= had  # what was finished stays
            later, had = later + (there > had), there
        assert shards(folder) == whole
        assert read_manifest(folder) == read_manifest("peace")
        assert not list(Path(folder).glob(".shard-*"))
        assert passes <= job.forwards() <= passes + 2 * lost  # a kill costs the current shard and no other
        shutil.rmtree(folder)
    assert later >= 8  # the kills came in the middle of the work, not before it


@pytest.mark.parametrize("moment", ["half written", "before the rename", "after the rename", "manifest"])
@pytest.mark.parametrize("shard", [0, 3])
def test_killed_at_the_worst_moments(job, moment, shard):
    assert job.run("peace") == "done"
    passes = job.forwards()

    def die_at_the_moment():
        rename, write = os.replace, pq.write_table

        def replace(source, target):
            wanted = f"shard-{shard:05d}" if moment != "manifest" else ("selsft_scores" if shard == 0 else "never")
            if moment in ("before the rename", "manifest") and wanted in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if moment == "after the rename" and wanted in str(target):
                os.kill(os.getpid(), signal.SIGKILL)

        def write_table(table, handle, **options):
            write(table, handle, **options)
            if moment == "half written" and json.loads(table.schema.metadata[b"selsft"])["index"] == shard:
                handle.truncate(200)
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace, pq.write_table = replace, write_table

    if moment == "manifest" and shard:
        pytest.skip("the manifest belongs to no shard")
    assert job.run("trouble", before=die_at_the_moment) == "killed"
    there = len(shards("trouble"))
    assert there == (0 if moment == "manifest" else shard + (moment == "after the rename"))
    assert job.run("trouble") == "done"
    assert shards("trouble") == shards("peace") and not list(Path("trouble").glob(".*"))
    expected = passes if moment in ("after the rename", "manifest") else passes + 2
    assert job.forwards() == expected


def test_an_interrupted_run_says_how_to_go_on(run, capsys, monkeypatch):
    forward, calls = selsft.scoring.frozen.forward_logps, []

    def interrupted(model, inputs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(selsft.scoring.frozen, "forward_logps", interrupted)
        capsys.readouterr()
        assert run() == 130
    assert "scored: finished shards are kept in it, the same command resumes from there" in capsys.readouterr().err
    assert len(shards("scored")) == 3
    assert run() == 0 and run(scored_dir="peace") == 0
    assert shards("scored") == shards("peace")
