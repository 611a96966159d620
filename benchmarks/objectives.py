"""Which objective forgets marked errors, and does forgetting beat ignoring them? Short LoRA runs, compared in pairs.

    python benchmarks/objectives.py --model SMOLLM2 --rows gec_jfleg.jsonl --votes 3 --neutral wiki.txt --output DIR

Rows are JSON lines with `prompt`, `completion`, `spans` ([[start, end, kind], ...] in characters of the completion),
`corrected` (a list of texts) and, with `--votes`, how many annotators marked each span. A span is wrong when it has at
least that many votes (all are without the flag), unknown when it has fewer, and unknown when its kind says that a word
is missing before it. Every arm starts from the same weights and sees the same rows in the same order; another seed
draws other rows, another order and another adapter. One JSON line per arm and seed is appended to `results.jsonl`, so
that the same command resumes; `margins-ARM-SEED.npz` beside it has the values of every held-out pair.

Rejected: the run's own arms, which compare whole recipes; here only the objective and its weight differ.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer

ARMS: dict[str, dict] = {
    "base": {},
    "plain": {},
    "ignore": {"forget_weight": 0.0},
    "npo 0.25": {"forget_objective": "npo", "forget_weight": 0.25},
    "npo 1": {"forget_objective": "npo", "forget_weight": 1.0},
    "unlikelihood 1": {"forget_objective": "unlikelihood", "forget_weight": 1.0},
    "unlikelihood 0.25": {"forget_objective": "unlikelihood", "forget_weight": 0.25},
    "wga 1": {"forget_objective": "wga", "forget_weight": 1.0, "forget_beta": 0.5},
    "probability 1": {"forget_objective": "probability", "forget_weight": 1.0},
    "gradient ascent 0.25, floor -12": {
        "forget_objective": "gradient_ascent", "forget_weight": 0.25, "forget_floor": -12.0,
    },
    "npo 1, floor -8": {"forget_objective": "npo", "forget_weight": 1.0, "forget_floor": -8.0},
}  # fmt: skip


def encode(tokenizer, prompt: str, completion: str) -> tuple[list[int], int, list[tuple[int, int]]]:
    """Token ids of a turn, how many belong to the prompt, and the characters of the completion behind each token."""
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer(head, add_special_tokens=False)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
    end = tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return [*before, *after["input_ids"], *end], len(before), [*after["offset_mapping"], *[(0, 0)] * len(end)]


def weights_of(row: dict, offsets: list[tuple[int, int]], votes: int | None) -> list[float]:
    marks = []
    for index, (start, end, kind) in enumerate(row["spans"]):
        sure = votes is None or row["votes"][index] >= votes
        marks.append((start, end, -1.0 if sure and not kind.startswith("missing_before") else 0.0))
    weights = []
    for start, end in offsets:
        touched = [weight for a, b, weight in marks if start < b and a < end]
        weights.append(min(touched) if touched else 1.0)
    return weights


@torch.no_grad()
def logps(model, rows: list[tuple[list[int], int]], batch: int = 16) -> list[np.ndarray]:
    """Log-probabilities of the tokens after each prompt."""
    model.eval()
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        width = max(len(rows[i][0]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(chosen):
            ids[place, : len(rows[i][0])] = torch.tensor(rows[i][0])
            mask[place, : len(rows[i][0])] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits
        for place, i in enumerate(chosen):
            row, start = rows[i]
            part = logits[place, start - 1 : len(row) - 1].float().log_softmax(-1)
            found[i] = part.gather(-1, torch.tensor(row[start:])[:, None]).squeeze(-1).numpy()
    return found


class Split(NamedTuple):
    """Rows to train on, and pairs (faulty, corrected, faulty, ...) with the faulty texts' errors."""

    table: dict[str, list]
    pairs: list[tuple[list[int], int]]
    errors: list[np.ndarray]


def split(rows: list[dict], tokenizer, seed: int, args: argparse.Namespace) -> Split:
    drawn = random.Random(seed).sample(rows, len(rows))
    held = [row for row in drawn[args.train :] if row["corrected"] and row["corrected"][0] != row["completion"]]
    found = Split({"input_ids": [], "labels": [], "token_weights": []}, [], [])
    for row in drawn[: args.train]:
        ids, start, offsets = encode(tokenizer, row["prompt"], row["completion"])
        found.table["input_ids"].append(ids)
        found.table["labels"].append([-100] * start + ids[start:])
        found.table["token_weights"].append([0.0] * start + weights_of(row, offsets, args.votes))
    for row in held[: args.pairs]:
        ids, start, offsets = encode(tokenizer, row["prompt"], row["completion"])
        found.errors.append(np.array(weights_of(row, offsets, args.votes)) < 0)
        found.pairs.append((ids, start))
        found.pairs.append(encode(tokenizer, row["prompt"], row["corrected"][0])[:2])
    return found


def train(arm: str, table: dict[str, list], tokenizer, seed: int, args: argparse.Namespace):
    """The model of an arm, and its last mean probability of a negative token."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    if arm == "base":
        return model, None
    layers = model.config.num_hidden_layers
    own = {} if arm == "plain" else {"forget_schedule": "constant", **ARMS[arm]}
    config = SelectiveSFTConfig(
        str(args.output / "run"), use_cpu=True, bf16=True, gradient_checkpointing=False, report_to="none",
        num_train_epochs=args.epochs, learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=5,
        per_device_train_batch_size=8, save_strategy="no", seed=seed, disable_tqdm=True, logging_steps=10,
        max_length=None, dataloader_pin_memory=False, scoring_cache_dir=str(args.output / "cache"), **own,
    )  # fmt: skip
    adapter = LoraConfig(
        r=16, lora_alpha=32, layers_to_transform=list(range(2 * layers // 3, layers)),
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    data = Dataset.from_dict({k: v for k, v in table.items() if k != "token_weights" or arm != "plain"})
    torch.manual_seed(seed)
    trainer = SelectiveSFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    logged = [log["negative_prob"] for log in trainer.state.log_history if "negative_prob" in log]
    return trainer.model, logged[-1] if logged else None


def measure(model, held: Split, neutral: list[tuple[list[int], int]]) -> tuple[dict, dict[str, np.ndarray]]:
    """Means over all held-out pairs, and values of each pair."""
    found = logps(model, held.pairs)
    wrong, right = found[::2], found[1::2]
    margin = np.array([r.sum() - w.sum() for w, r in zip(wrong, right, strict=True)])
    errors = np.concatenate([w[m] for w, m in zip(wrong, held.errors, strict=True)])
    means = {
        "prefers_corrected": float((margin > 0).mean()),
        "margin": float(margin.mean()),
        "corrected_logp": float(np.concatenate(right).mean()),
        "error_logp": float(errors.mean()),
        "errors_below_1e-2": float((errors < np.log(0.01)).mean()),
        "neutral_logp": float(np.concatenate(logps(model, neutral)).mean()),
    }
    return means, {"margin": margin, "right": np.array([r.mean() for r in right])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--votes", type=int)
    parser.add_argument("--neutral", required=True, type=Path, help="text that should not change")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--train", type=int, default=250)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results = args.output / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(record["arm"], record["seed"]) for record in map(json.loads, lines)}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    text = tokenizer(args.neutral.read_text(encoding="utf-8")[:40_000], add_special_tokens=False)["input_ids"]
    neutral = [(text[i : i + 128], 1) for i in range(0, 4096, 128)]
    for seed in args.seeds:
        drawn = split(rows, tokenizer, seed, args)
        for arm in args.arms:
            if (arm, seed) in done:
                continue
            begun = time.perf_counter()
            model, probability = train(arm, drawn.table, tokenizer, seed, args)
            means, values = measure(model, drawn, neutral)
            record = {
                "arm": arm, "seed": seed, "rows": args.rows.name, **means, "negative_prob": probability,
                "seconds": round(time.perf_counter() - begun, 1), "train": args.train, "pairs": args.pairs,
                "epochs": args.epochs, "learning_rate": args.learning_rate,
            }  # fmt: skip
            np.savez(args.output / f"margins-{arm.replace(' ', '_')}-{seed}.npz", **values)
            with results.open("a") as handle:
                handle.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
