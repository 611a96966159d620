"""`selsft score --engine ray` on a local cluster: the folder that one process writes, also when workers are killed."""

import functools
import hashlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from datasets import Dataset

from selsft.cli import main
from selsft.cli.arguments import CommandParser
from selsft.cli.score import prepare
from selsft.data.chunks import token_chunks
from selsft.errors import InputError
from selsft.score import ScoringRun
from selsft.score_ray import Worker, _blocks, _room, _told, ray_columns
from selsft.scoring.logprobs import ROW_COLUMNS
from selsft.scoring.settings import ScoreArguments
from tests.support import commands

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: `make test-ray` installs and runs this")
SCORE = ["score", *commands.flags({**commands._MODEL, "reference_model": "reference", "shard_tokens": 20})]
PROBE = ["score", *commands.flags({**commands._MODEL, "score": "probe", "judged": "judged.jsonl", "shard_tokens": 60})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    commands.workspace(folder)
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             object_store_memory=2**27)  # fmt: skip
    yield ray
    ray.shutdown()


def shards(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("shard-*.parquet")}


def workers() -> list[psutil.Process]:
    """Processes of actors that score. Ray names a process after what it runs."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::") and "MapWorker(" in title and "Worker)" in title:
            found.append(process)
    return found


@needs_ray
@pytest.mark.slow
def test_the_folder_is_that_of_one_process(cluster):
    assert main([*SCORE, "--scored_dir", "one"]) == 0
    assert main([*SCORE, "--scored_dir", "many", "--engine", "ray", "--ray_workers", "2"]) == 0
    assert len(shards("one")) > 8 and shards("many") == shards("one")


@needs_ray
@pytest.mark.slow
def test_the_probe_of_the_command_is_that_of_the_workers(cluster):
    assert main([*PROBE, "--scored_dir", "probe-one"]) == 0
    assert main([*PROBE, "--scored_dir", "probe-many", "--engine", "ray", "--ray_workers", "2"]) == 0
    assert shards("probe-many") == shards("probe-one")


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_is_replaced(cluster):
    """Two of three workers are killed in the midst of the work, whichever chance picks."""
    assert main([*SCORE, "--scored_dir", "calm"]) == 0
    # as another process of the same cluster, whose forward passes wait so that there is a midst
    command = [sys.executable, "-c", SLOW, *SCORE, "--scored_dir", "hit", "--engine", "ray", "--ray_workers", "3"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.get_runtime_context().gcs_address}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed, rng = [], random.Random()
    try:
        while run.poll() is None and len(killed) < 2:
            there = len(shards("hit"))
            if there > len(killed) and (found := workers()):
                victim = rng.choice(found)
                victim.send_signal(signal.SIGKILL)
                killed.append(victim.pid)
            time.sleep(0.05)
        output, _ = run.communicate(timeout=200)
    finally:
        run.kill()
    assert run.returncode == 0, output
    assert len(killed) == 2, output
    assert shards("hit") == shards("calm")


SLOW = """
import sys, time
from selsft.cli import main
from selsft import score_ray
class Worker(score_ray.Worker):
    def __call__(self, table):
        time.sleep(0.3)
        return super().__call__(table)
score_ray.Worker = Worker
sys.exit(main(sys.argv[1:]))
"""


def run_of(folder: str, rows: Dataset | None = None) -> ScoringRun:
    arguments = CommandParser("score", "", "", ScoreArguments).parse([*SCORE[1:], "--scored_dir", folder])
    assert arguments is not None
    return prepare(arguments, Path(folder), rows)


def test_a_worker_scores_what_one_process_scores():
    """Without a cluster: blocks as Ray would hand them over, all but the second."""
    run = run_of("here")
    rows = run.trainer.train_dataset
    row = rows.select(range(1)).select_columns(["input_ids", "labels"])
    worker = Worker(functools.partial(run_of, "there", row), run.store.identity, None)
    chunks = list(token_chunks(rows, ROW_COLUMNS, 20, documents=True))
    tables = list(_blocks(rows, frozenset(range(len(chunks))) - {1}, 20, None))
    assert len(tables) == len(chunks) - 1 > 8
    with run.here() as columns:
        for chunk, table in zip([chunks[0], *chunks[2:]], tables, strict=True):
            found = worker(table)
            assert found["first_row"].to_pylist() == [chunk.first_row]
            for name, values in columns(chunk, lambda tokens: None).items():
                assert found[name][0].as_py() == values.tolist()


def test_a_worker_with_other_weights_is_told():
    run = run_of("here")
    row = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, 6]]})
    expected = run.store.identity | {"reference_sha256": "0" * 64}
    with pytest.raises(ValueError, match="does not have what the command has: another reference"):
        Worker(functools.partial(run_of, "there", row), expected, None)


def test_what_a_worker_says_is_told_to_the_user():
    class RayTaskError(Exception):
        pass

    outer = RayTaskError("a page of traceback")
    outer.cause = ValueError("not this")
    assert _told(outer) is outer
    outer.cause = InputError("row 3: remove it")
    assert isinstance(_told(outer), InputError) and str(_told(outer)) == "row 3: remove it"


def test_streamed_rows_are_refused():
    run = SimpleNamespace(trainer=SimpleNamespace(train_dataset=iter(())))
    with pytest.raises(InputError, match="dataset_streaming=False"):
        with ray_columns(run, [0], make=None, workers=None):
            pass


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_remedy_is_named(capsys):
    assert main([*SCORE, "--scored_dir", "none", "--engine", "ray"]) == 2
    assert "pip install 'selsft[ray]'" in capsys.readouterr().err


def test_a_launcher_is_refused(capsys):
    assert main([*SCORE, "--scored_dir", "none", "--engine", "ray", "--num_processes", "2"]) == 2
    assert "leave --num_processes out" in capsys.readouterr().err


class FakeRay:
    def __init__(self, resources, nodes):
        self.resources, self.alive = resources, nodes

    def cluster_resources(self):
        return self.resources

    def nodes(self):
        return [{"Alive": True}] * self.alive + [{"Alive": False}]


@pytest.mark.parametrize(
    ("resources", "workers", "use_cpu", "expected"),
    [
        ({"GPU": 8.0, "CPU": 64.0}, None, False, (8, {"num_gpus": 1})),
        ({"GPU": 8.0, "CPU": 64.0}, 3, False, (3, {"num_gpus": 1})),
        ({"GPU": 8.0, "CPU": 64.0}, None, True, (2, {"num_cpus": 32})),
        ({"CPU": 4.0}, 3, False, (3, {"num_cpus": 1})),
    ],
)
def test_what_is_reserved_for_a_worker(resources, workers, use_cpu, expected):
    assert _room(FakeRay(resources, 2), workers, use_cpu) == expected


def test_more_workers_than_room_is_refused():
    with pytest.raises(ValueError, match="ray_workers=5: the cluster has room for 4, one for each CPU"):
        _room(FakeRay({"CPU": 4.0}, 2), 5, None)
