"""The benchmark: what it writes, what it says about what it could not measure, and that peers do the same task."""

import csv
import time
from pathlib import Path

import pytest
import torch

from selsft.bench import cases, kernels, peers, records
from selsft.bench.bars import bars, table
from selsft.bench.measure import _cpu_ms, measure
from selsft.bench.peers import FORWARD, TRAINING

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    arguments = "--cpu --rows 32 --shapes 16x200 --ignored 50 --seconds 0 --implementations"
    names = ["selsft", "selsft-statistics", "naive", "liger"]
    assert kernels.main([*arguments.split(), *names, "--output_dir", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


def test_columns(result: Path) -> None:
    with (result / "kernels-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == (
        "gpu,driver,torch,triton,sha,date,implementation,pass,head,n,h,v,ignored,"
        "ms_median,ms_p20,ms_p80,peak_mib,tflops,ratio_to_gemm"
    )
    assert {(r["pass"], r["head"]) for r in rows} == {
        ("forward", "frozen"),
        ("forward+backward", "frozen"),
        ("forward+backward", "trained"),
    }
    assert {r["implementation"] for r in rows} == {"gemm", "selsft", "selsft-statistics", "naive"}
    assert all(float(r["ms_p20"]) <= float(r["ms_median"]) <= float(r["ms_p80"]) for r in rows)
    assert all(float(r["ratio_to_gemm"]) == 1.0 for r in rows if r["implementation"] == "gemm")


def test_what_did_not_run_is_named(result: Path) -> None:
    text = (result / "kernels-cpu.md").read_text()
    assert "liger: Liger's kernels need a GPU" in text
    assert "nothing about a GPU" in text.replace("\n", " ")


def test_bars_without_a_measurement_are_not_passed(result: Path) -> None:
    found = bars(records.read(result / "kernels-cpu.csv"), {})
    assert {bar.verdict for bar in found} == {"not measured"}
    assert "pass" not in table(found)


def test_a_bar_is_passed_or_missed_by_its_figure() -> None:
    verdicts = {
        bar.what: bar.verdict
        for bar in bars([], {"gradient_ratio": 1.2, "logprob_ratio": 0.3})
        if bar.figure is not None
    }
    assert sorted(verdicts.values()) == ["MISS", "pass"]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["selsft-statistics", "naive", "trl"])
def test_peers_compute_the_same_gradients(name: str, trained: bool) -> None:
    """Otherwise their times would be those of another task."""
    case = cases.make_case(40, 16, 200, 50, CPU, torch.float32)
    ours = peers.selsft(case, TRAINING, trained)()
    theirs = peers.IMPLEMENTATIONS[name](case, TRAINING, trained)()
    assert isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == 1 + trained
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_several_threads_are_timed_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time of two threads is twice what one waits for."""
    clocks: list[str] = []
    monkeypatch.setattr(time, "process_time", lambda: clocks.append("processor") or 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clocks.append("wall") or 0.0)
    for threads, clock in ((1, "processor"), (2, "wall")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        clocks.clear()
        _cpu_ms(lambda: None)
        assert set(clocks) == {clock}


def test_memory_counts_what_a_step_allocates() -> None:
    def step() -> None:
        a = torch.ones(2**18)  # 1 MiB
        b = a + 1
        del a
        b + 1

    assert measure(step, CPU, seconds=0).peak_mib == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("pass_", [FORWARD, TRAINING])
def test_a_peer_that_is_missing_says_so(pass_: str) -> None:
    case = cases.make_case(8, 4, 10, 0, CPU, torch.float32)
    with pytest.raises(peers.Unavailable, match="need a"):
        peers.cce(case, pass_, False)
    with pytest.raises(peers.Unavailable, match="not installed"):
        peers._import("a_module_that_nobody_has", "a-package")


@pytest.mark.parametrize(
    "bad", [["--shapes", "64"], ["--rows", "0"], ["--ignored", "100"], ["--implementations", "x"]]
)
def test_bad_input_ends_with_status_2(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        kernels.main(bad)
    assert error.value.code == 2
    assert bad[0].strip("-") in capsys.readouterr().err
