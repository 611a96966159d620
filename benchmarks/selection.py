"""Seconds and memory of selecting anew on scored data: `python benchmarks/selection.py --tokens 1e8`.

Makes a scored data set on disk (rows of 20 to 180 tokens, scores from a normal distribution), then measures in a
process of its own each: `add_token_weights` with another `positive_fraction`, with a threshold, with one ranking per
row, and the peer: all scores in one array, `numpy.partition`, one comparison, result kept in memory. Memory is the
peak of the anonymous pages above the start (mapped files can be dropped at any time and are not counted).
One thread. Linux only (`/proc`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from selsft.data.chunks import supervised_mask, token_chunks
from selsft.selection.weights import add_token_weights

ROWS = 10_000  # written at a time
SPECIAL = np.arange(4, dtype=np.int64)
SETTINGS = {"negative_threshold": None, "positive_fraction": None, "selection_scope": "global", "neutral_band": 0.0}
SETTINGS |= {
    "forget_weight": 0.25,
    "score": "influence",
    "gate_reference_prob": None,
    "max_negative_share": None,
    "seed": 0,
}
CASES: dict[str, dict] = {
    "positive_fraction=0.6": {"positive_fraction": 0.6},
    "negative_threshold=1.0": {"negative_threshold": 1.0},
    "positive_fraction=0.6 per sequence": {"positive_fraction": 0.6, "selection_scope": "sequence"},
    "numpy.partition": {},
}


def make(folder: Path, tokens: int) -> None:
    """Four Arrow files with one list column each, as scoring leaves them: 24 bytes a token."""
    rng = np.random.default_rng(0)
    names = {"input_ids": pa.int64(), "labels": pa.int64(), "base_logps": pa.float32(), "ref_logps": pa.float32()}
    schemas = {name: pa.schema([(name, pa.list_(kind))]) for name, kind in names.items()}
    writers = {name: pa.ipc.new_stream(str(folder / f"{name}.arrow"), schema) for name, schema in schemas.items()}
    written = 0
    while written < tokens:
        lengths = rng.integers(20, 181, ROWS)
        n = int(lengths.sum())
        ids = rng.integers(0, 32_000, n)
        base = -rng.exponential(2.0, n).astype(np.float32)
        columns = {
            "input_ids": ids,
            "labels": np.where(rng.random(n) < 0.3, -100, ids),
            "base_logps": base,
            "ref_logps": base + rng.normal(0.2, 1.0, n).astype(np.float32),
        }
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        for name, values in columns.items():
            column = pa.ListArray.from_arrays(offsets, pa.array(values, type=names[name]))
            writers[name].write_batch(pa.record_batch([column], schema=schemas[name]))
        written += n
    for writer in writers.values():
        writer.close()


def load(folder: Path) -> Dataset:
    names = ("input_ids", "labels", "base_logps", "ref_logps")
    return concatenate_datasets([Dataset.from_file(str(folder / f"{name}.arrow")) for name in names], axis=1)


def anonymous_bytes() -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Samples the anonymous memory of the process every 5 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.peak = anonymous_bytes()
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def stop(self) -> int:
        self.peak = max(self.peak, anonymous_bytes())
        self.done.set()
        return self.peak - self.start_bytes


def peer(dataset: Dataset, fraction: float) -> np.ndarray:
    """All scores in one array: what fits in memory and is simplest."""
    chunks = token_chunks(dataset, ["labels", "base_logps", "ref_logps"])
    scores = np.concatenate(
        [(b.columns["ref_logps"] - b.columns["base_logps"])[supervised_mask(b, padding_free=False)] for b in chunks]
    )
    keep = int(fraction * scores.size + 1e-9)
    boundary = np.partition(scores, scores.size - keep)[scores.size - keep]
    return np.where(scores < boundary, np.int8(-1), np.int8(1))


def measure(folder: Path, case: str, results) -> None:
    dataset = load(folder)
    args = SimpleNamespace(**SETTINGS | CASES[case])
    next(token_chunks(dataset, ["labels"]))  # imports and first touches are not what is measured
    peak = Peak()
    peak.start()
    start, processor = time.perf_counter(), time.process_time()
    if case == "numpy.partition":
        labels = peer(dataset, 0.6)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        growth = peak.stop()
        positives = int((labels > 0).sum())
    else:
        done = add_token_weights(dataset, args, SPECIAL, False)  # type: ignore[arg-type]
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        growth = peak.stop()
        chunks = token_chunks(done, ["token_weights"])
        positives = sum(int((chunk.columns["token_weights"] > 0).sum()) for chunk in chunks)
    found = {"case": case, "seconds": round(seconds, 2), "processor_seconds": round(processor, 2)}
    results.put({**found, "growth_bytes": growth, "positives": positives})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e8)
    parser.add_argument("--folder", help="where the data lies; kept if it is given. Default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="selsft-selection-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "ref_logps.arrow").exists():
            make(folder, int(options.tokens))
        dataset = load(folder)
        tokens = sum(chunk.size for chunk in token_chunks(dataset, ["labels"]))
        print(json.dumps({"rows": len(dataset), "tokens": tokens, "cpus": os.cpu_count()}))
        context = multiprocessing.get_context("spawn")
        for case in options.cases:
            for _ in range(options.repeats):
                results = context.SimpleQueue()
                process = context.Process(target=measure, args=(folder, case, results))
                process.start()
                process.join()
                if process.exitcode:
                    return 1
                found = results.get()
                found["bytes_per_token"] = round(found["growth_bytes"] / tokens, 3)
                print(json.dumps(found), flush=True)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
