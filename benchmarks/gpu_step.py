r"""Training steps on a GPU: `SelectiveSFTTrainer` against `SFTTrainer`, and against `SFTTrainer` with Liger's layers.

Llamas with random weights of about 135M and 1.2B parameters, half of every row a prompt without labels; a fifth of the
rest is negative for our trainer and a label like any other for the peers. `gpu_check.py` runs every arm in a process
of its own, so that its peak memory is its own, and the arms of a case after each other. Arms of ours:

    precomputed   weights in a column, as after `selsft score`
    online        a reference adapter, switched in every step (LoRA only)
    excess        the current model against a reference adapter, ranked in every step (LoRA only)

Rejected: whole trainings of a real model, in which loading and saving would hide the step.

    python benchmarks/gpu_check.py --only step
    python benchmarks/gpu_step.py --lines step.jsonl \
        --case '{"shape": "135M", "tuning": "lora", "layout": "padded", "arm": "precomputed", "cpu": false}'
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from gpu_check import UNAVAILABLE
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.bench import lines, records

# width, inner width, layers, heads, key-value heads, vocabulary, tied
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512, True),
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1.2B": (2048, 8192, 16, 32, 8, 128256, True),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARMS = ("sft", "liger", "precomputed", "online", "excess")
SIZE = {"batch": 8, "length": 1024, "steps": 10, "warm": 3}  # warm: steps before the measured ones


def model(shape: str, length: int) -> LlamaForCausalLM:
    width, inner, layers, heads, groups, vocabulary, tied = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=length, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def rows(shape: str, count: int, length: int, packed: bool) -> dict[str, list]:
    """Rows of one length when packed, else of ragged lengths (log-normal, at most `length`)."""
    rng = np.random.default_rng(0)
    sizes = np.full(count, length)
    if not packed:
        sizes = np.clip(rng.lognormal(np.log(length / 3), 0.6, count), 16, length).astype(int)
    found: dict[str, list] = {"input_ids": [], "labels": [], "token_weights": []}
    for size in sizes:
        ids = rng.integers(3, SHAPES[shape][5], size)
        labels, weights = ids.copy(), np.ones(size, np.float32)
        labels[: size // 2], weights[: size // 2] = -100, 0
        weights[(rng.random(size) < 0.2) & (weights > 0)] = -1
        for name, values in (("input_ids", ids), ("labels", labels), ("token_weights", weights)):
            found[name].append(values.tolist())
    return found


class Clock(TrainerCallback):
    """Milliseconds of every step, from the end of the device's work to the end of it."""

    def __init__(self, cpu: bool):
        self.cpu, self.steps = cpu, []

    def _now(self) -> float:
        if not self.cpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(1000 * (self._now() - self.start))


def run_case(case: dict) -> dict:
    """One arm of one case: median milliseconds of a step, tokens a second, peak memory."""
    cpu, steps, batch, length = case["cpu"], case["steps"], case["batch"], case["length"]
    arm, lora = case["arm"], case["tuning"] == "lora"
    data = rows(case["shape"], batch * (steps + case["warm"]), length, case["layout"] == "packed")
    tokens = sum(map(len, data["input_ids"])) / (steps + case["warm"])
    policy = model(case["shape"], length)
    folder = tempfile.mkdtemp()
    settings = {
        "output_dir": folder, "use_cpu": cpu, "bf16": not cpu, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "max_steps": steps + case["warm"], "disable_tqdm": True,
        "per_device_train_batch_size": batch, "max_length": length, "dataloader_pin_memory": not cpu,
    }  # fmt: skip
    peft = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS) if lora else None
    reference = {}
    if arm in ("online", "excess"):
        config = LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False)
        get_peft_model(model(case["shape"], length), config).save_pretrained(folder + "/reference")
        reference = {"reference_model": folder + "/reference", "precompute_scores": False}
    if arm == "excess":
        reference |= {"score": "excess", "selection_scope": "batch", "positive_fraction": 0.6, "forget_weight": 0.0}
    if arm in ("sft", "liger"):
        args = SFTConfig(**settings, use_liger_kernel=arm == "liger")
        kind, columns = SFTTrainer, ("input_ids", "labels")
    else:
        args = SelectiveSFTConfig(**settings, **reference)
        kind = SelectiveSFTTrainer
        columns = ("input_ids", "labels") if reference else tuple(data)
    made = kind(
        policy,
        args,
        train_dataset=Dataset.from_dict({name: data[name] for name in columns}),
        processing_class=_tokenizer(SHAPES[case["shape"]][5]),
        peft_config=peft,
    )
    clock = Clock(cpu)
    made.add_callback(clock)
    if not cpu:
        torch.cuda.reset_peak_memory_stats()
    made.train()
    milliseconds = statistics.median(clock.steps[case["warm"] :])
    return {
        "step_ms": round(milliseconds, 3),
        "tokens_per_s": round(1000 * tokens / milliseconds, 1),
        "peak_mib": None if cpu else round(torch.cuda.max_memory_allocated() / 2**20, 1),
        "loss_ms": _loss_milliseconds(case, data),
    }


def _loss_milliseconds(case: dict, data: dict[str, list]) -> float | None:
    """Forward and backward of the head alone on rows of this shape; `None` for arms that score as well."""
    from trl.trainer.utils import add_fused_lm_head

    from selsft.bench.measure import measure
    from selsft.data.columns import active_rows
    from selsft.training.head import SelectiveHead, add_selective_head

    if case["arm"] not in ("sft", "precomputed"):
        return None
    device = torch.device("cpu" if case["cpu"] else "cuda")
    width, length = SHAPES[case["shape"]][0], case["length"]
    head = model(case["shape"], length).to(device)
    head.model.layers = torch.nn.ModuleList()
    head.requires_grad_(case["tuning"] == "full")
    some = rows(case["shape"], case["batch"], length, packed=True)
    batch = {name: torch.tensor(values) for name, values in some.items()}
    labels = batch["labels"].to(device)
    hidden = torch.randn(*labels.shape, width, device=device, dtype=torch.bfloat16)
    options: dict = {"fused_lm_head": True}
    if case["arm"] == "sft":
        add_fused_lm_head(head, outputs=("log_probs", "entropy", "is_top1"))
    else:
        add_selective_head(head)
        weights = batch["token_weights"]
        options = {"selective_head": SelectiveHead(weights.to(device), active_rows(weights).to(device))}

    def step() -> None:
        head.zero_grad(set_to_none=True)
        leaf = hidden.clone().requires_grad_()
        out = head(inputs_embeds=leaf, labels=labels, **options)
        (out.loss if out.loss is not None else -out.log_probs.sum()).backward()

    return round(measure(step, device, seconds=1.0).ms_median, 3)


def _tokenizer(vocabulary: int):
    """One word per id: the trainers ask for a tokenizer, the rows are tokenised already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1", unk_token="w2")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, required=True)
    parser.add_argument("--lines", type=Path, required=True, help="file that the result is appended to")
    options = parser.parse_args(argv)
    case = SIZE | options.case
    if case["arm"] == "liger" and importlib.util.find_spec("liger_kernel") is None:
        print("liger-kernel is not installed")
        return UNAVAILABLE
    where = records.environment(torch.device("cpu" if case["cpu"] else "cuda"))._asdict()
    named = {key: case[key] for key in ("shape", "tuning", "layout", "arm")}
    lines.append(options.lines, {"kind": "step", **where, **_versions(), **named, **run_case(case)})
    return 0


def _versions() -> dict[str, str]:
    found = {}
    for name in ("transformers", "trl", "peft", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
