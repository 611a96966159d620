"""The benchmark: what it writes, what it says about what it could not measure, and that peers do the same task."""

import time
from pathlib import Path

import pytest
import torch

from selsft.bench import cases, kernels, lines, peers, records
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
    rows = lines.read(result / "kernels-cpu.jsonl")
    assert ",".join(rows[0]) == (
        "kind,gpu,driver,torch,triton,sha,date,implementation,data,pass,head,n,h,v,ignored,"
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
    found = bars(records.kernel_records(lines.read(result / "kernels-cpu.jsonl")), {}, {})
    assert {bar.verdict for bar in found} == {"not measured"}
    assert "pass" not in table(found)


def test_a_bar_is_passed_or_missed_by_its_figure() -> None:
    verdicts = {
        bar.what: bar.verdict
        for bar in bars([], {"gradient_ratio": 1.2, "logprob_ratio": 0.3}, {})
        if bar.figure is not None
    }
    assert sorted(verdicts.values()) == ["MISS", "pass"]


def test_a_peer_that_fails_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "trl", broken)
    path = tmp_path / "lines.jsonl"

    def run(names: list[str], resume: bool) -> tuple[list[str], bool]:
        return kernels.run(path, (8,), ((4, 12),), (0,), names, CPU, 0.0, resume=resume)

    notes, failed = run(["trl", "selsft"], False)
    assert failed and notes[0].startswith("trl: RuntimeError at N=8 H=4 V=12")
    assert [line["implementation"] for line in lines.read(path)] == ["gemm", "selsft"] * 3
    # What is there is not measured again.
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "selsft", broken)
    assert run(["selsft"], True) == ([], False) and run(["selsft"], False)[1]


def test_real_hidden_states_come_back(tmp_path: Path) -> None:
    hidden, weight = torch.randn(9, 8), torch.randn(30, 8)
    target = torch.arange(9)
    path = tmp_path / "states.safetensors"
    cases.save_states(path, "a model", hidden, weight, target)
    case = cases.load_case(path, 6, 50, CPU, torch.float32)
    assert case.size == (6, 8, 30) and case.data == "a model" and case.rows.numel() == 3
    assert torch.allclose(case.hidden, hidden[:6], atol=0.02) and torch.allclose(case.weight, weight, atol=0.02)
    assert torch.equal(case.target[case.rows], target[:6][case.rows])
    with pytest.raises(ValueError, match="has 9 rows, not 10"):
        cases.load_case(path, 10, 0, CPU, torch.float32)


def test_the_bar_about_cce_is_one_about_real_hidden_states() -> None:
    where = {"gpu": "x", "driver": "", "torch": "", "triton": "", "sha": "", "date": "", "pass_": TRAINING}
    size = {"head": "frozen", "n": 8192, "h": 4096, "v": 128256, "ignored": 0}
    time = {"ms_p20": 1.0, "ms_p80": 1.0, "peak_mib": 1.0, "tflops": 1.0, "ratio_to_gemm": 1.0}

    def made(name: str, data: str, ms: float) -> records.Record:
        return records.Record(**where, **size, **time, implementation=name, data=data, ms_median=ms)

    found = [made("selsft-statistics", cases.SYNTHETIC, 9.0), made("cce", cases.SYNTHETIC, 1.0)]
    (bar,) = [bar for bar in bars(found, {}, {}) if "CCE" in bar.what]
    assert bar.verdict == "not measured"
    found += [made("selsft-statistics", "a model", 2.0), made("cce", "a model", 3.2)]
    (bar,) = [bar for bar in bars(found, {}, {}) if "CCE" in bar.what]
    assert bar.figure == pytest.approx(1.6) and bar.verdict == "pass"


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
