"""Does forgetting help? Arms on learner text with marked errors, after docs/study/plan.md.

    python benchmarks/study/learner.py --model SMOLLM2 --rows gec_jfleg.jsonl --votes 3 --neutral text.txt \
        --work runs/study --output benchmarks/results/study/jfleg.csv

Rows are JSON lines with `id`, `prompt`, `completion`, `corrected` (list of texts), `spans` ([[start, end, kind], ...]
in characters of the completion) and, with `--votes`, how many correctors changed each span. The same command resumes,
also with more `--draws` or `--arms`. The table has one line for each draw, arm and held-out row and no text:
`tables.py` makes all figures from it.

Rejected: drawing held-out rows anew each time, after which differences could not be paired over draws; accuracy of
generated text, since all rows have the same prompt.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer

from selsft import SelectiveSFTConfig, compare_arms, judged_rows, load_scores, score_dataset, select_tokens, use_folder
from selsft.errors import InputError

HELD, JUDGED, TRAIN = 150, 150, 250
NPO = {"forget_objective": "npo", "forget_schedule": "constant", "forget_normalization": "joint", "forget_beta": 1.0}
FORGET, FORGET1 = {**NPO, "forget_weight": 0.25}, {**NPO, "forget_weight": 1.0}
IGNORE = {"forget_weight": 0.0}
ARMS: dict[str, dict] = {
    "plain": {"columns": {"token_weights": None}},
    "ignore": {**IGNORE, "columns": {"token_weights": "by_probe"}},
    "forget": {**FORGET, "columns": {"token_weights": "by_probe"}},
    "random": {**FORGET, "columns": {"token_weights": "by_chance"}},
    "forget1": {**FORGET1, "columns": {"token_weights": "by_probe"}},
    "unlikelihood": {**FORGET1, "forget_objective": "unlikelihood", "columns": {"token_weights": "by_probe"}},
    "ignore_oracle": {**IGNORE, "columns": {"token_weights": "by_people"}},
    "forget_oracle": {**FORGET, "columns": {"token_weights": "by_people"}},
}
PRIMARY = ("plain", "ignore", "forget", "random")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEASURES = ("margin", "prefers", "corrected", "marked", "neutral")


def read_rows(path: str, votes: int | None) -> list[dict]:
    """Rows in the forms of docs/spans.md: spans of weight -1 (wrong) and 0 (unknown) beside prompt and completion."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        spans = []
        for index, (start, end, kind) in enumerate(row["spans"]):
            wrong = (votes is None or row["votes"][index] >= votes) and not kind.startswith("missing_before")
            spans.append([start, end, -1.0 if wrong else 0.0])
        rows.append(
            {
                "id": row["id"],
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
                "spans": spans,
                "corrected": row["corrected"][0] if row["corrected"] else row["completion"],
            }
        )
    return rows


def as_dataset(rows: list[dict]) -> Dataset:
    return Dataset.from_list([{key: row[key] for key in ("prompt", "completion", "spans")} for row in rows])


def held_out(rows: list[dict], tokenizer, args: SelectiveSFTConfig, neutral: str) -> Dataset:
    """Token ids of both texts, the first token of the answer, and which tokens are wrong; then the neutral blocks."""
    sample = judged_rows(as_dataset(rows), tokenizer, args)
    marked = np.split(sample.wrong == 1, np.cumsum(sample.lengths)[:-1])
    assert sample.index.tolist() == list(range(len(rows)))
    table: dict[str, list] = {"id": [], "written": [], "corrected": [], "start": [], "marked": []}
    for row, wrong in zip(rows, marked, strict=True):
        head = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        texts = [row["completion"], [{"role": "assistant", "content": row["corrected"]}]]
        both = [
            tokenizer.apply_chat_template(row["prompt"] + text, tokenize=True, return_dict=False) for text in texts
        ]
        if both[0] != sample.input_ids[sample.row == len(table["id"])].tolist():
            raise SystemExit(f"{row['id']}: training has other tokens")
        for name, value in zip(table, (row["id"], *both, len(head), wrong.tolist()), strict=True):
            table[name].append(value)
    ids = tokenizer(neutral, add_special_tokens=False)["input_ids"][: 32 * 128]
    for block in range(32):
        values: tuple = (f"neutral-{block}", [], ids[128 * block : 128 * (block + 1)], 1, [])
        for name, value in zip(table, values, strict=True):
            table[name].append(value)
    return Dataset.from_dict(table)


@torch.no_grad()
def logps(model, rows: list[list[int]], batch: int = 16) -> list[np.ndarray]:
    """log p of every token but the first, of rows one after another; float32, nats."""
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    order = sorted((index for index, row in enumerate(rows) if row), key=lambda index: -len(rows[index]))
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        ids = torch.zeros(len(chosen), len(rows[chosen[0]]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(chosen):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
            mask[place, : len(rows[index])] = 1
        hidden = model(input_ids=ids, attention_mask=mask).logits
        for place, index in enumerate(chosen):
            row = torch.tensor(rows[index])
            part = hidden[place, : len(row) - 1].float().log_softmax(-1)
            found[index] = part.gather(-1, row[1:, None]).squeeze(-1).numpy()
    return found


def measure(model, tokenizer, rows: Dataset, args: SelectiveSFTConfig) -> dict[str, np.ndarray]:
    """`MEASURES` of each held-out row, NaN where one does not apply."""
    found = {name: np.full(len(rows), np.nan) for name in MEASURES}
    written, right = logps(model, list(rows["written"])), logps(model, list(rows["corrected"]))
    for index, row in enumerate(rows):
        answer = slice(row["start"] - 1, None)
        if not row["written"]:
            found["neutral"][index] = -right[index].mean()
            continue
        margin = float(right[index][answer].sum() - written[index][answer].sum())
        found["margin"][index], found["prefers"][index] = margin, margin > 0
        found["corrected"][index] = -right[index][answer].mean()
        wrong = np.array(row["marked"])[1:]
        if wrong.any():
            found["marked"][index] = written[index][wrong].mean()
    return found


def training_rows(rows: list[dict], judged: list[dict], model: str, tokenizer, folder: Path, seed: int) -> Dataset:
    """The rows of a draw as tokens, with the weights that probe, people and chance give them."""

    def settings(**changes) -> SelectiveSFTConfig:
        return SelectiveSFTConfig(
            str(folder), use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"dtype": "bfloat16"}, **changes
        )

    args = settings(score="probe", target_precision=0.6, packing=False)
    score_dataset(
        model, as_dataset(rows).remove_columns("spans"), output_dir=folder, args=args, judged=as_dataset(judged)
    )
    scored = load_scores(folder)
    chosen = settings()
    try:
        use_folder(chosen, folder)
        by_probe = [list(weights) for weights in select_tokens(scored, tokenizer, chosen)["token_weights"]]
    except InputError as error:  # no threshold reaches the precision: nothing is negative
        print(f"seed {seed}: {error}")
        by_probe = [[int(label != -100) for label in labels] for labels in scored["labels"]]
    sample = judged_rows(as_dataset(rows), tokenizer, settings())
    ends = np.cumsum(sample.lengths)[:-1]
    if [ids.tolist() for ids in np.split(sample.input_ids, ends)] != list(map(list, scored["input_ids"])):
        raise SystemExit("judged and scored rows have other tokens")
    by_people, by_chance = [], []
    flat = np.concatenate([np.array(weights) for weights in by_probe])
    judgeable = sample.wrong >= 0
    chance = (sample.labels != -100).astype(int)
    places = np.random.default_rng(seed).choice(np.flatnonzero(judgeable), int((flat < 0).sum()), replace=False)
    chance[places] = -1
    unknown = unknown_tokens(rows, tokenizer, settings())
    for labels, wrong, doubt, drawn in zip(
        *(np.split(each, ends) for each in (sample.labels, sample.wrong, unknown, chance)), strict=True
    ):
        by_people.append(np.where(labels == -100, 0, np.where(wrong == 1, -1, np.where(doubt, 0, 1))).tolist())
        by_chance.append(drawn.tolist())
    hits = int((sample.wrong[flat < 0] == 1).sum())
    print(
        f"seed {seed}: {(flat < 0).sum()} negatives of {(sample.labels != -100).sum()} tokens, precision "
        f"{hits / max(int((judgeable & (flat < 0)).sum()), 1):.3f}, recall {hits / (sample.wrong == 1).sum():.3f}"
    )
    columns = {"by_probe": by_probe, "by_people": by_people, "by_chance": by_chance}
    table = {"input_ids": list(scored["input_ids"]), "labels": list(scored["labels"]), **columns}
    return Dataset.from_dict(table)


def unknown_tokens(rows: list[dict], tokenizer, args: SelectiveSFTConfig) -> np.ndarray:
    """Tokens of spans of weight 0: those that are wrong once these spans are, and were not before."""
    marked = [{**row, "spans": [[start, end, -1.0] for start, end, _ in row["spans"]]} for row in rows]
    sure = [{**row, "spans": [span for span in row["spans"] if span[2] < 0]} for row in rows]
    return (judged_rows(as_dataset(marked), tokenizer, args).wrong == 1) & (
        judged_rows(as_dataset(sure), tokenizer, args).wrong != 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--votes", type=int, help="of how many correctors a wrong token needs; default: all spans")
    parser.add_argument("--neutral", required=True, help="text file for collateral damage")
    parser.add_argument("--work", required=True, help="folder of the runs")
    parser.add_argument("--output", required=True, help="CSV file")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(PRIMARY), choices=list(ARMS))
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = read_rows(given.rows, given.votes)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    held = [i for i in order if rows[i]["corrected"] != rows[i]["completion"][0]["content"]][:HELD]
    pool = sorted(set(order) - set(held))
    args = SelectiveSFTConfig(given.work, use_cpu=True, bf16=False, report_to="none")
    evaluation = held_out([rows[i] for i in held], tokenizer, args, Path(given.neutral).read_text(encoding="utf-8"))
    layers = AutoConfig.from_pretrained(given.model).num_hidden_layers
    adapter = LoraConfig(
        r=16, lora_alpha=32, target_modules=LINEAR, layers_to_transform=list(range(2 * layers // 3, layers))
    )
    settings = {
        "use_cpu": True, "bf16": True, "gradient_checkpointing": False, "max_length": None, "num_train_epochs": 2,
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 5, "per_device_train_batch_size": 8,
        "weight_decay": 0.0, "model_init_kwargs": {"dtype": "bfloat16"},
    }  # fmt: skip
    lines = []
    for seed in range(given.draws):
        folder = Path(given.work) / f"draw-{seed}"
        drawn = random.Random(seed + 1).sample(pool, JUDGED + TRAIN)
        judged, train = ([rows[i] for i in part] for part in (drawn[:JUDGED], drawn[JUDGED:]))
        table = training_rows(train, judged, given.model, tokenizer, folder / "scored", seed)
        found = compare_arms(
            given.model, table, evaluation, {name: ARMS[name] for name in given.arms}, folder / "arms", seeds=[seed],
            settings=settings, peft_config=adapter, measure=measure,
            untrained={"base": given.model} if seed == 0 else None,
        )  # fmt: skip
        for name, values in found.values.items():
            for index, row in enumerate(evaluation["id"]):
                numbers = [float(values[each][0, index]) for each in MEASURES]
                lines.append([seed, name, row, *("" if np.isnan(x) else f"{x:.6g}" for x in numbers)])
        with open(given.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([["draw", "arm", "row", *MEASURES], *lines])


if __name__ == "__main__":
    main()
