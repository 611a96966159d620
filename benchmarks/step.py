"""A training step of `SelectiveSFTTrainer` with precomputed weights against one of `SFTTrainer`, on a CPU.

The same rows, the same random Llama (4 layers, width 256, vocabulary 49,152), float32, one thread, the arms in turn,
so that whatever else the machine does falls on both. Half of each row is a prompt without labels; a fifth of the rest
is negative for our trainer and a label like any other for TRL's. Times are processor seconds of the process as well
as wall seconds: with one thread the former hardly depend on other programs. Memory of the loss layer is the peak of
the allocations that `torch.profiler` sees in its forward and backward pass, memory of training the growth of the
peak resident set of a process that trains and does nothing else. Rejected: timing whole trainings, most of whose
first seconds are not steps.

    python benchmarks/step.py --output benchmarks/results/step-cpu.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.bench.measure import measure
from selsft.data.columns import active_rows
from selsft.training.head import SelectiveHead, add_selective_head

VOCABULARY, WIDTH, BATCH, LENGTH = 49152, 256, 4, 256
PROMPT, NEGATIVE = 0.5, 0.2
ARMS = ("trl", "selsft")


def model(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id: the trainers ask for a tokenizer, the rows are tokenised already."""
    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1", unk_token="w2")


def rows(count: int) -> dict[str, list]:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCABULARY, (count, LENGTH))
    labels, weights = ids.copy(), np.ones((count, LENGTH), np.float32)
    prompt = int(PROMPT * LENGTH)
    labels[:, :prompt], weights[:, :prompt] = -100, 0
    weights[(rng.random((count, LENGTH)) < NEGATIVE) & (weights > 0)] = -1
    return {"input_ids": ids.tolist(), "labels": labels.tolist(), "token_weights": weights.tolist()}


# ---------------------------------------------------------------- training steps


class StepClock(TrainerCallback):
    """Wall and processor seconds of every step."""

    def __init__(self):
        self.seconds: list[tuple[float, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append((time.perf_counter() - self._start[0], time.process_time() - self._start[1]))


def trainer(arm: str, steps: int, clock: StepClock) -> SFTTrainer:
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "max_length": LENGTH,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    data = rows(BATCH * steps)
    if arm == "trl":
        data.pop("token_weights")
        made = SFTTrainer(
            model(), SFTConfig(**settings), train_dataset=Dataset.from_dict(data), processing_class=tokenizer()
        )
    else:
        args = SelectiveSFTConfig(**settings, forget_schedule="constant")
        made = SelectiveSFTTrainer(model(), args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer())
    made.add_callback(clock)
    return made


def step_seconds(repeats: int, steps: int) -> list[dict]:
    found = []
    for repeat in range(repeats):
        for arm in ARMS if repeat % 2 == 0 else ARMS[::-1]:
            clock = StepClock()
            trainer(arm, steps + 1, clock).train()
            for wall, processor in clock.seconds[1:]:  # the first one allocates the optimizer's state
                found += [row("step", arm, repeat, "wall_s", wall), row("step", arm, repeat, "processor_s", processor)]
            print(f"step {arm:6s} {[round(p, 2) for _, p in clock.seconds[1:]]} processor s", flush=True)
    return found


def resident_bytes(arm: str) -> int:
    """Growth of the peak resident set over three steps. Runs in a process of its own, on Linux."""
    made = trainer(arm, 3, StepClock())
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the preparation
    before = _peak_kib()
    made.train()
    return (_peak_kib() - before) * 1024


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


# ---------------------------------------------------------------- the loss layer alone


def loss_layer(arm: str):
    """A function that runs forward and backward of the head, as the trainers do, from given hidden states. A Llama
    without layers, called with embeddings, is its final norm and its head."""
    head = model(layers=0)
    batch = {name: torch.tensor(values) for name, values in rows(BATCH).items()}
    labels, hidden = batch["labels"], torch.randn(BATCH, LENGTH, WIDTH)
    options = {}
    if arm == "trl":
        add_fused_lm_head(head, outputs=("log_probs", "entropy", "is_top1"))
        options["fused_lm_head"] = True
    else:
        add_selective_head(head)
        weights = batch["token_weights"]
        options["selective_head"] = SelectiveHead(weights, active_rows(weights))

    def step() -> None:
        head.zero_grad(set_to_none=True)
        leaf = hidden.clone().requires_grad_()
        head(inputs_embeds=leaf, labels=labels, **options).loss.backward()

    return step


def loss_layers(repeats: int) -> list[dict]:
    found = []
    for repeat in range(repeats):
        for arm in ARMS if repeat % 2 == 0 else ARMS[::-1]:
            result = measure(loss_layer(arm), torch.device("cpu"), seconds=1.0)
            found.append(row("loss layer", arm, repeat, "processor_s", result.ms_median / 1000))
            found.append(row("loss layer", arm, repeat, "peak_bytes", result.peak_mib * 2**20))
            print(f"loss layer {arm:6s} {result.ms_median:.0f} ms, peak {result.peak_mib:.1f} MiB", flush=True)
    return found


# ---------------------------------------------------------------- the table


def row(what: str, arm: str, repeat: int, quantity: str, value: float) -> dict:
    return {"what": what, "arm": arm, "repeat": repeat, "quantity": quantity, "value": value}


def report(found: list[dict]) -> None:
    print(f"\n{'':10s} {'':12s} {'trl':>28s} {'selsft':>28s} {'ratio':>7s}")
    for what, quantity in sorted({(r["what"], r["quantity"]) for r in found}):
        cells, medians = [], {}
        for arm in ARMS:
            values = [r["value"] for r in found if (r["what"], r["quantity"], r["arm"]) == (what, quantity, arm)]
            scale = 1 / 2**20 if quantity.endswith("bytes") else 1
            medians[arm] = statistics.median(values)
            low, high = min(values) * scale, max(values) * scale
            cells.append(f"{medians[arm] * scale:.3f} [{low:.3f}, {high:.3f}]")
        ratio = medians["selsft"] / medians["trl"]
        unit = quantity.replace("_bytes", "_MiB")
        print(f"{what:10s} {unit:12s} {cells[0]:>28s} {cells[1]:>28s} {ratio:7.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="CSV of all values")
    parser.add_argument("--repeats", type=int, default=4, help="trainings of each arm")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a training")
    parser.add_argument("--resident", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.resident:
        print(json.dumps(resident_bytes(options.resident)))
        return
    found = loss_layers(options.repeats)
    for repeat in range(options.repeats):
        for arm in ARMS if repeat % 2 == 0 else ARMS[::-1]:
            command = [sys.executable, __file__, "--resident", arm]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            found.append(row("training", arm, repeat, "resident_bytes", json.loads(done.stdout.splitlines()[-1])))
    found += step_seconds(options.repeats, options.steps)
    report(found)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
