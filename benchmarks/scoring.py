"""Scoring tokens: `selsft`'s way against a plain transformers loop, and against the body's forward pass alone.

All arms score the same ragged rows (log-normal lengths, half of each row a prompt without labels) with the same random
Llama, in turn, so that whatever else the machine does falls on all of them:

- `selsft`: what `selsft score` runs on a shard: rows sorted by length into batches under a token budget, labelled
  positions through the fused head;
- `plain`: rows in the order of the data, padded, as many as the same budget allows; logits of all positions, then
  log_softmax and gather;
- `body`: the forward pass of `selsft`'s batches without the head: no scoring can be faster with this model.

Tokens per second count tokens of the data, not padding. On a CPU seconds are processor seconds of one thread, which
hardly depend on other programs; wall seconds are in the table too. Memory is the growth of the peak resident set of a
process that scores and does nothing else, on a GPU the peak of the allocator. `scale` runs the whole way to shards on
disk, for both models, at 1e4 and 1e6 tokens, with a small model. `hashes` is the share of a whole `selsft score`, with
model and data from disk, that hashes of weights, rows, scores and files take. Rejected: rows of equal length, on
which padding, which is half of the matter, does not exist.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py --output benchmarks/results/scoring-cpu.csv
    python benchmarks/scoring.py --only hashes --model smollm2 --data rows.jsonl
    python benchmarks/scoring.py --device cuda --dtype bfloat16 --width 2048 --layers 16 --vocab 128256 --budget 16384
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from selsft import DataCollatorForSelectiveSFT
from selsft.data.chunks import TokenChunk, token_chunks
from selsft.data.scored_folder import ScoredFolder
from selsft.scoring.batching import BatchBudget
from selsft.scoring.logprobs import ROW_COLUMNS, forward_logps, score_chunk
from selsft.training.head import add_selective_head

ARMS = ("selsft", "plain", "body")
LONGEST = 1024


def make_model(options: argparse.Namespace, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.width // 64, 1),
        max_position_embeddings=LONGEST,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype)).eval()
    add_selective_head(model)
    return model


def rows(tokens: int, vocab: int, seed: int = 0) -> Dataset:
    """At least `tokens` tokens in rows of log-normal length (median 150, 16 to 1024), half of each without labels."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(5, 0.8, tokens // 50 + 1)).astype(int).clip(16, LONGEST)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
    ids = [rng.integers(3, vocab, length).tolist() for length in lengths]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def one_chunk(data: Dataset) -> TokenChunk:
    (chunk,) = token_chunks(data, ROW_COLUMNS)
    return chunk


def accelerator_of(options: argparse.Namespace) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(options.device))


# ---------------------------------------------------------------- the arms


def one_column(chunk: TokenChunk, forward, *settings) -> np.ndarray:
    return score_chunk(chunk, ["values"], lambda inputs: {"values": forward(inputs)}, *settings)["values"]


def score_selsft(model, chunk: TokenChunk, options: argparse.Namespace) -> np.ndarray:
    collator, budget = DataCollatorForSelectiveSFT(pad_token_id=0), BatchBudget(options.budget)
    with torch.no_grad():
        return one_column(chunk, lambda x: forward_logps(model, x), collator, accelerator_of(options), budget)


def score_plain(model, chunk: TokenChunk, options: argparse.Namespace) -> np.ndarray:
    ids, labels = (np.asarray(chunk.columns[name], np.int64) for name in ROW_COLUMNS)
    ends = np.cumsum(chunk.lengths)
    starts = ends - chunk.lengths
    flat = np.zeros(len(ids), np.float32)
    batches, current = [], []
    for row, length in enumerate(chunk.lengths):
        longest = max([length, *(chunk.lengths[index] for index in current)])
        if current and longest * (len(current) + 1) > options.budget:
            batches.append(current)
            current = []
        current.append(row)
    batches.append(current)
    for batch in batches:
        width = max(chunk.lengths[row] for row in batch)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for index, row in enumerate(batch):
            tokens[index, : chunk.lengths[row]] = torch.from_numpy(ids[starts[row] : ends[row]])
            mask[index, : chunk.lengths[row]] = 1
        tokens, mask = tokens.to(options.device), mask.to(options.device)
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
            logps = torch.log_softmax(logits.float(), -1).gather(2, tokens[:, 1:, None])[..., 0].cpu().numpy()
        for index, row in enumerate(batch):
            flat[starts[row] + 1 : ends[row]] = logps[index, : chunk.lengths[row] - 1]
    return np.where(labels == -100, 0, flat)


def score_body(model, chunk: TokenChunk, options: argparse.Namespace) -> np.ndarray:
    def forward(inputs):
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return hidden.last_hidden_state[..., 0].float()

    collator, budget = DataCollatorForSelectiveSFT(pad_token_id=0), BatchBudget(options.budget)
    with torch.no_grad():
        return one_column(chunk, forward, collator, accelerator_of(options), budget)


SCORE = {"selsft": score_selsft, "plain": score_plain, "body": score_body}


# ---------------------------------------------------------------- measurements


def timed(run, device: str) -> tuple[float, float]:
    """Wall seconds, and processor seconds of this process."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def throughput(options: argparse.Namespace) -> list[dict]:
    model, chunk = make_model(options), one_chunk(rows(options.tokens, options.vocab))
    small = one_chunk(rows(2 * options.budget, options.vocab, seed=1))
    for arm in ARMS:
        SCORE[arm](model, small, options)  # kernels, allocator
    difference = np.abs(score_selsft(model, small, options) - score_plain(model, small, options)).max()
    print(f"largest difference of a score between selsft and plain: {difference:.1e} nats", flush=True)
    found = [row("throughput", "selsft", 0, "max_difference", float(difference))]
    for repeat in range(options.repeats):
        for arm in ARMS if repeat % 2 == 0 else ARMS[::-1]:
            wall, processor = timed(lambda arm=arm: SCORE[arm](model, chunk, options), options.device)
            seconds = processor if options.device == "cpu" else wall
            found.append(row("throughput", arm, repeat, "tokens_per_s", chunk.size / seconds))
            found.append(row("throughput", arm, repeat, "wall_tokens_per_s", chunk.size / wall))
            print(f"{arm:7s} {chunk.size / seconds:10.0f} tokens/s ({wall:.1f} s wall)", flush=True)
    return found


def peak_bytes(arm: str, options: argparse.Namespace) -> int:
    """Growth of the peak while one arm scores a few batches. Runs in a process of its own."""
    model, chunk = make_model(options), one_chunk(rows(4 * options.budget, options.vocab))
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        SCORE[arm](model, chunk, options)
        return torch.cuda.max_memory_allocated() - before
    SCORE["body"](model, one_chunk(rows(100, options.vocab)), options)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kib()
    SCORE[arm](model, chunk, options)
    return (_peak_kib() - before) * 1024


def _peak_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def memory(options: argparse.Namespace) -> list[dict]:
    found = []
    for repeat in range(options.repeats):
        for arm in ARMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--peak", arm]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(row("memory", arm, repeat, "peak_bytes", json.loads(done.stdout.splitlines()[-1])))
            print(f"{arm:7s} {found[-1]['value'] / 2**20:8.0f} MiB", flush=True)
    return found


def scale(options: argparse.Namespace) -> list[dict]:
    """Seconds per token of the whole way from memory-mapped rows to shards on disk, base and reference."""
    small = argparse.Namespace(**{**vars(options), "vocab": 8192, "width": 128, "layers": 2, "budget": 2048})
    models = [make_model(small, seed) for seed in (0, 1)]
    collator, budget, where = DataCollatorForSelectiveSFT(pad_token_id=0), BatchBudget(2048), accelerator_of(options)
    found = []

    def run(data: Dataset) -> None:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            store = ScoredFolder(folder, {})
            store.open({})
            for count, chunk in enumerate(token_chunks(data, ROW_COLUMNS), start=1):
                base, ref = (
                    one_column(chunk, lambda x, m=model: forward_logps(m, x), collator, where, budget)
                    for model in models
                )
                store.write(count - 1, chunk, {"base_logps": base, "ref_logps": ref})
            store.finish(count)

    sizes = {size: rows(size, 8192) for size in (10_000, 1_000_000)}
    tokens = {size: sum(map(len, data["input_ids"])) for size, data in sizes.items()}
    run(sizes[10_000])
    for repeat in range(options.repeats):
        for size, data in sizes.items():
            times = 20 if size == 10_000 else 1
            wall, processor = timed(lambda data=data, times=times: [run(data) for _ in range(times)], options.device)
            seconds = processor if options.device == "cpu" else wall
            value = seconds / times / tokens[size] * 1e6
            found.append(row("scale", f"{size:.0e} tokens", repeat, "us_per_token", value) | {"shape": shape(small)})
            print(f"{size:9,d} tokens: {value:.2f} us a token", flush=True)
    return found


HASHES = (
    "selsft.scoring.frozen.model_fingerprint", "selsft.cli.manifest.model_fingerprint",
    "selsft.cli.manifest.data_fingerprint", "selsft.data.scored_folder.file_sha256",
    "selsft.data.scored_folder.chunk_sha256", "selsft.data.scored_folder._scores_sha256",
    "selsft.data.scored_folder.unsealed", "selsft.data.scored_folder.write_sealed", "selsft.score.tokenizer_sha256",
    "selsft.score.vocabulary_sha256", "selsft.evaluation.judging.tokenizer_sha256",
)  # fmt: skip


def hashes(options: argparse.Namespace) -> list[dict]:
    """Processor seconds of hashing within `selsft score`, the model standing for its own reference, in one run."""
    from selsft.cli import main as selsft

    spent, depth = dict.fromkeys(HASHES, 0.0), [0]

    def timing(name, original):
        def timed_hash(*args, **kwargs):
            depth[0] += 1
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1
                spent[name] += time.process_time() - start if not depth[0] else 0

        return timed_hash

    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for name in HASHES:
            module, _, function = name.rpartition(".")
            original = getattr(importlib.import_module(module), function)
            stack.enter_context(mock.patch(name, timing(name, original)))
        flags = [
            "--model_name_or_path", options.model, "--reference_model", options.model, "--dataset_name", options.data,
            "--scored_dir", f"{folder}/scored", "--use_cpu", str(options.device == "cpu"), "--bf16", "False",
            "--dtype", options.dtype, "--max_length", "512", "--show_tokens", "0",
        ]  # fmt: skip
        _, seconds = timed(lambda: selsft(["score", *flags]), options.device)
        tokens = json.loads(Path(folder, "scored", "selsft_scores.json").read_text())["tokens"]
    for name, each in spent.items():
        print(f"{name:45s} {each:8.3f} s")
    total = sum(spent.values())
    found = {"tokens": tokens, "seconds": seconds, "hash_seconds": total, "share": total / seconds}
    return [row("hashes", Path(options.model).name, 0, *pair) for pair in found.items()]


# ---------------------------------------------------------------- the table


def row(what: str, arm: str, repeat: int, quantity: str, value: float) -> dict:
    return {"what": what, "arm": arm, "repeat": repeat, "quantity": quantity, "value": value}


def report(found: list[dict]) -> None:
    def values(what, arm, quantity):
        return [r["value"] for r in found if (r["what"], r["arm"], r["quantity"]) == (what, arm, quantity)]

    print(f"\n{'':34s} {'median [lowest, highest]':>32s}")
    for what, arm, quantity in dict.fromkeys((r["what"], r["arm"], r["quantity"]) for r in found):
        listed = values(what, arm, quantity)
        print(
            f"{what:10s} {arm:12s} {quantity:18s} {statistics.median(listed):12.4g} "
            f"[{min(listed):.4g}, {max(listed):.4g}]"
        )
    for what, quantity, first, second in (
        ("throughput", "tokens_per_s", "selsft", "plain"),
        ("throughput", "tokens_per_s", "selsft", "body"),
        ("memory", "peak_bytes", "selsft", "plain"),
        ("scale", "us_per_token", "1e+06 tokens", "1e+04 tokens"),
    ):
        pairs = list(zip(values(what, first, quantity), values(what, second, quantity), strict=True))
        ratios = sorted(a / b for a, b in pairs)
        if ratios:
            print(
                f"{quantity} {first} / {second}: {statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}] "
                f"over {len(ratios)} repeats"
            )


def shape(options: argparse.Namespace) -> str:
    return f"layers={options.layers} width={options.width} vocab={options.vocab} budget={options.budget}"


def environment(options: argparse.Namespace) -> dict:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    if options.device == "cpu":
        name = next((line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
        device = f"CPU {name.strip()}, {torch.get_num_threads()} thread(s)"
    else:
        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "dtype": options.dtype,
        "shape": shape(options),
        "sha": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
        **{name: importlib.metadata.version(name) for name in ("selsft", "torch", "transformers", "trl")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="CSV of all values")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a batch, padding included")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens that each arm scores in a repeat")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--only", choices=["throughput", "memory", "scale", "hashes"], help="one part of the measurements"
    )
    parser.add_argument("--model", help="folder of a model, for `hashes`")
    parser.add_argument("--data", help="file of rows, for `hashes`")
    parser.add_argument("--peak", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    else:
        Accelerator()  # chooses the device
    if options.peak:
        print(json.dumps(peak_bytes(options.peak, options)))
        return
    place, found = environment(options), []
    print(json.dumps(place))
    for name, part in (("memory", memory), ("throughput", throughput), ("scale", scale), ("hashes", hashes)):
        if options.only == name or (options.only is None and name != "hashes"):
            found += part(options)
    report(found)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(dict.fromkeys([*place, *found[0]])))
            writer.writeheader()
            writer.writerows([place | line for line in found])


if __name__ == "__main__":
    main()
