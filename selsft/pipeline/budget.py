"""What a run would cost: tokens of every stage, and seconds from a measured second of this model on this machine.

Tokens are counted where the stage `check` has finished, else on a sample of the rows. Speed is that of plain forward
passes, of forward and backward passes, and of greedy decoding, on rows of the mean length, and the overhead of a stage
is what this process needed from its start to the loaded model. An estimate: it knows neither checkpoints nor other
programs on the machine. Rejected: tables of speeds by model and device, which are wrong for everybody's machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from ..config import SelectiveSFTConfig
from ..data.judged import tokenize_rows
from ..data.loading import DataSource, load_rows
from ..data.spans import without_marks
from ..errors import input_errors
from ..evaluation.harness import Requests
from ..evaluation.load import load_model
from ..records import read_json
from .arms import PLAIN
from .check import CHECK
from .plan import Plan

SAMPLE = 200  # rows that are read where nothing is counted yet
MEASURED = 1.0  # seconds
_TWO_MODELS = ("influence", "contrast")


@dataclass(frozen=True)
class Speed:
    """Tokens a second of scoring, training and decoding, and seconds until a stage begins to work."""

    scoring: float
    training: float
    decoding: float
    overhead: float


@dataclass(frozen=True)
class Cost:
    """Of one stage: tokens that pass a model, and estimated seconds."""

    tokens: int
    seconds: float


def count_tokens(plan: Plan) -> dict[str, tuple[int, int]]:
    """Rows and tokens of each part: as counted by the stage `check`, or estimated from the first rows of the data."""
    found = read_json(plan.checked.folder / CHECK).get("parts")
    if found:
        return {name: (part["rows"], part["tokens"]) for name, part in found.items()}
    recipe, settings = plan.recipe, plan.recipe.split
    text = recipe.get("dataset_text_field", "text")
    with input_errors():
        data = load_rows(
            DataSource(
                recipe.get("dataset_name"), recipe.get("dataset_config"), recipe.get("dataset_train_split", "train"),
                columns=recipe.columns,
            ), text,
        )  # fmt: skip
        sample = without_marks(data.select(range(min(SAMPLE, len(data)))), text)
        names = ("max_length", "completion_only_loss", "dataset_text_field")
        flags = {key: value for key in names if (value := recipe.get(key)) is not None}
        args = SelectiveSFTConfig("unused", use_cpu=True, bf16=False, **flags)
        tokenizer = AutoTokenizer.from_pretrained(plan.model, trust_remote_code=bool(recipe.get("trust_remote_code")))
        prepared = cast(Dataset, tokenize_rows(sample, tokenizer, args, None))
    lengths = np.array([len(row) for row in prepared["input_ids"]])
    mean = float(np.minimum(lengths, args.max_length or lengths.max()).mean())

    def rows(size: float) -> int:
        return int(size if size >= 1 else round(size * len(data)))

    taken = {"eval": rows(settings.eval_size), "reference": rows(settings.reference_size)}
    taken["judged"] = rows(settings.judged_fraction)
    taken["train"] = max(len(data) - sum(taken.values()), 0)
    return {name: (count, int(count * mean)) for name, count in taken.items()}


def measure(plan: Plan, length: int) -> Speed:
    """A second of each kind of work, with the model of the run."""
    recipe = plan.recipe
    flags = recipe.flags("train")
    device = "cpu" if flags.get("use_cpu") or not torch.cuda.is_available() else "cuda"
    options = {
        key: value
        for key, value in (("dtype", flags.get("dtype")), ("revision", flags.get("model_revision")))
        if value
    }
    with input_errors():
        model: Any = load_model(plan.model, {"trust_remote_code": bool(flags.get("trust_remote_code")), **options})[0]
        model.to(device)
    overhead = _since_start()
    batch = int(flags.get("per_device_train_batch_size", 8))
    ids = torch.randint(10, model.config.get_text_config().vocab_size - 1, (batch, max(length, 8)), device=device)

    def score() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    scoring = _rate(score, ids.numel(), device)

    def decode() -> None:
        with torch.no_grad():
            model.generate(ids[:, :8], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)

    decoding = _rate(decode, batch * 8, device)
    if flags.get("use_peft"):
        targets = flags.get("lora_target_modules") or "all-linear"
        model = get_peft_model(model, LoraConfig(r=int(flags.get("lora_r", 16)), target_modules=targets))
    model.train()

    def train() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return Speed(scoring, _rate(train, ids.numel(), device), decoding, overhead)


def harness_requests(plan: Plan) -> Requests | None:
    """What tasks of lm-evaluation-harness ask of each model, counted on the requests themselves; `None` without tasks.

    Raises:
        whatever the harness raises when the data of a task cannot be had.
    """
    flags = plan.recipe.flags("evaluate")
    if not flags.get("lm_eval_tasks"):
        return None
    from ..evaluation.harness import count_requests

    tokenizer = AutoTokenizer.from_pretrained(plan.model, trust_remote_code=bool(flags.get("trust_remote_code")))
    names = [name.strip() for name in str(flags["lm_eval_tasks"]).split(",") if name.strip()]
    return count_requests(tokenizer, names, flags.get("lm_eval_limit"), flags.get("lm_eval_include"))


def costs(
    plan: Plan, tokens: dict[str, tuple[int, int]], speed: Speed, harness: Requests | None = None
) -> dict[str, Cost]:
    """Cost of each stage that runs a model.

    Args:
        harness: what tasks of lm-evaluation-harness ask of each model.
    """
    recipe = plan.recipe

    def of(name: str) -> tuple[int, int]:
        return tokens.get(name, (0, 0))

    def trained(kind: str, part: str) -> int:
        flags, (rows, count) = recipe.flags(kind), of(part)
        steps, batch = int(flags.get("max_steps") or -1), int(flags.get("per_device_train_batch_size", 8))
        if steps > 0:
            return int(steps * batch * int(flags.get("gradient_accumulation_steps", 1)) * count / max(rows, 1))
        return int(count * float(flags.get("num_train_epochs", 3)))

    found = {}
    for stage in plan.stages:
        kind = stage.name.split("-")[0]
        if kind in ("reference", "train"):
            part = "reference" if kind == "reference" else "train"
            count = trained(kind, part)
            online = recipe.score == "excess" and kind == "train" and PLAIN not in stage.name
            seconds = count / speed.training + (2 * count / speed.scoring if online else 0)
            found[stage.name] = Cost(count, seconds + speed.overhead)
        elif kind == "score":
            models = 2 if recipe.score in _TWO_MODELS else 1
            count = models * sum(of(part)[1] for part in ("train", "judged", "judged-test"))
            found[stage.name] = Cost(count, count / speed.scoring + speed.overhead)
        elif kind == "evaluate":
            flags, (rows, count) = recipe.flags("evaluate"), of("eval")
            limit = int(flags.get("eval_rows") or rows)
            held = int(count * min(limit, rows) / max(rows, 1))
            read = held * 2 + (int(flags.get("neutral_tokens", 50_000)) if flags.get("neutral_text") else 0)
            written = min(limit, rows) * int(flags.get("max_new_tokens", 128))
            if harness is not None:
                read, written = read + harness.read, written + harness.written
            found[stage.name] = Cost(read + written, read / speed.scoring + written / speed.decoding + speed.overhead)
    return found


def _rate(work: Any, tokens: int, device: str) -> float:
    """Tokens a second, after a first time that does not count."""
    work()
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < MEASURED:
        work()
        count += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return count * tokens / (time.perf_counter() - start)


def _since_start() -> float:
    """Seconds since this process began, as far as the system says."""
    own = Path("/proc/self")
    return max(time.time() - own.stat().st_ctime, 0.0) if own.exists() else 10.0
