"""Does forgetting help? Arms on text with known errors, after docs/study/plan.md.

    python benchmarks/study/arms.py --model SMOLLM2 --rows gec_jfleg.jsonl --votes 3 --neutral text.txt \
        --work runs/study --output benchmarks/results/study/jfleg.csv

Rows are JSON lines with `id`, `prompt`, `completion`, `corrected` (list of texts) and either `spans` ([[start, end,
kind], ...] in characters of the completion; with `--votes` also how many correctors changed each span) or `weight`
(-1: the whole answer is wrong, 1: it is right). Rows of one `group` are never in two of held-out, judged and training
rows, and one of them is held out at most; a corpus that marks rows as `held` has drawn these itself (`corpora.py`).
The same command resumes, also with more `--draws` or `--arms`. The table has one line for each draw, arm and held-out
row and no text; what another call has measured stays in it. `tables.py` makes all figures from it.

`--negatives SCORE` trains *ignore* and *forget* with as many negatives as the probe finds, chosen by another score.

Rejected: drawing held-out rows anew each time, after which differences could not be paired over draws; accuracy of
generated text, since all rows of a corpus have the same prompt.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer

from selsft import (
    SelectiveSFTConfig,
    SelectiveSFTTrainer,
    compare_arms,
    judged_rows,
    load_scores,
    score_dataset,
    select_tokens,
    use_folder,
)
from selsft.errors import InputError
from selsft.records import replaced

HELD, JUDGED, TRAIN = 150, 150, 250
NPO = {"forget_objective": "npo", "forget_schedule": "constant", "forget_normalization": "joint", "forget_beta": 1.0}
FORGET, FORGET1 = {**NPO, "forget_weight": 0.25}, {**NPO, "forget_weight": 1.0}
IGNORE = {"forget_weight": 0.0}
BY_PROBE = {"columns": {"token_weights": "by_probe"}}
ARMS: dict[str, dict] = {
    "plain": {"columns": {"token_weights": None}},
    "ignore": {**IGNORE, **BY_PROBE},
    "forget": {**FORGET, **BY_PROBE},
    "random": {**FORGET, "columns": {"token_weights": "by_chance"}},
    "forget1": {**FORGET1, **BY_PROBE},
    "unlikelihood": {**FORGET1, "forget_objective": "unlikelihood", **BY_PROBE},
    "ignore_oracle": {**IGNORE, "columns": {"token_weights": "by_people"}},
    "forget_oracle": {**FORGET, "columns": {"token_weights": "by_people"}},
}
# Further objectives, on the negatives of the probe
for _name, _objective, _weight in (
    ("forget01", "npo", 0.1), ("unlikelihood025", "unlikelihood", 0.25), ("probability", "probability", 0.25),
    ("wga", "wga", 0.25), ("ascent", "gradient_ascent", 0.25),
):  # fmt: skip
    ARMS[_name] = {**NPO, "forget_objective": _objective, "forget_weight": _weight, **BY_PROBE}
ARMS["dft"] = {"loss_type": "dft", "columns": {"token_weights": None}}
SOURCES = ("surprisal", "influence", "contrast", "probe60")
PRIMARY = ("plain", "ignore", "forget", "random")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEASURES = ("margin", "prefers", "corrected", "marked", "neutral")


def read_rows(path: str, votes: int | None) -> list[dict]:
    """Rows in the forms of docs/spans.md: spans of weight -1 (wrong) and 0 (unknown) beside prompt and completion, or
    a weight for the answer as a whole."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        marks: dict = {"weight": float(row["weight"])} if "weight" in row else {"spans": []}
        for index, (start, end, kind) in enumerate(row.get("spans", ())):
            wrong = (votes is None or row["votes"][index] >= votes) and not kind.startswith("missing_before")
            marks["spans"].append([start, end, -1.0 if wrong else 0.0])
        rows.append(
            {
                "id": row["id"],
                "group": row.get("group", row["id"]),
                "held": row.get("held"),
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
                **marks,
                "corrected": row["corrected"][0] if row["corrected"] else row["completion"],
            }
        )
    return rows


def as_dataset(rows: list[dict], *marks: str) -> Dataset:
    return Dataset.from_list([{key: row[key] for key in ("prompt", "completion", *marks)} for row in rows])


def as_judged(rows: list[dict]) -> Dataset:
    return as_dataset(rows, "weight" if "weight" in rows[0] else "spans")


def split(rows: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Judged and training rows of a draw, of different groups, from rows of which none is held out."""
    drawn = [rows[index] for index in random.Random(seed + 1).sample(range(len(rows)), len(rows))]
    judged, taken = drawn[:JUDGED], {row["group"] for row in drawn[:JUDGED]}
    train = [row for row in drawn[JUDGED:] if row["group"] not in taken][:TRAIN]
    if len(train) < TRAIN:
        raise SystemExit(f"{len(rows)} rows are too few for {JUDGED} judged and {TRAIN} training rows of other groups")
    return judged, train


def hold_out(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """`HELD` rows with a correction, one of a group, drawn once for all draws; and the rows of all other groups."""
    if any(row["held"] for row in rows):
        return [row for row in rows if row["held"]], [row for row in rows if not row["held"]]
    held: dict[str, dict] = {}
    for index in random.Random(0).sample(range(len(rows)), len(rows)):
        row = rows[index]
        if len(held) < HELD and row["corrected"] != row["completion"][0]["content"]:
            held.setdefault(row["group"], row)
    return list(held.values()), [row for row in rows if row["group"] not in held]


def held_out(rows: list[dict], tokenizer, args: SelectiveSFTConfig, neutral: str) -> Dataset:
    """Token ids of both texts, the first token of the answer, and which tokens are wrong; then the neutral blocks."""
    sample = judged_rows(as_judged(rows), tokenizer, args)
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


def settings_of(folder: Path, **changes) -> SelectiveSFTConfig:
    return SelectiveSFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"dtype": "bfloat16"}, **changes
    )


def training_rows(
    rows: list[dict], judged: list[dict], model: str, tokenizer, folder: Path, seed: int, precision: float
) -> Dataset:
    """The rows of a draw as tokens, with the weights that probe, people and chance give them."""
    args = settings_of(folder, score="probe", target_precision=precision, packing=False)
    score_dataset(model, as_dataset(rows), output_dir=folder, args=args, judged=as_judged(judged))
    scored = load_scores(folder)
    chosen = settings_of(folder)
    try:
        use_folder(chosen, folder)
        by_probe = [list(weights) for weights in select_tokens(scored, tokenizer, chosen)["token_weights"]]
    except InputError as error:  # no threshold reaches the precision: nothing is negative
        print(f"seed {seed}: {error}")
        by_probe = [[int(label != -100) for label in labels] for labels in scored["labels"]]
    sample = judged_rows(as_judged(rows), tokenizer, settings_of(folder))
    ends = np.cumsum(sample.lengths)[:-1]
    if [ids.tolist() for ids in np.split(sample.input_ids, ends)] != list(map(list, scored["input_ids"])):
        raise SystemExit("judged and scored rows have other tokens")
    by_people, by_chance = [], []
    flat = np.concatenate([np.array(weights) for weights in by_probe])
    judgeable = sample.wrong >= 0
    chance = (sample.labels != -100).astype(int)
    places = np.random.default_rng(seed).choice(np.flatnonzero(judgeable), int((flat < 0).sum()), replace=False)
    chance[places] = -1
    unknown = unknown_tokens(rows, tokenizer, settings_of(folder))
    for labels, wrong, doubt, drawn in zip(
        *(np.split(each, ends) for each in (sample.labels, sample.wrong, unknown, chance)), strict=True
    ):
        by_people.append(np.where(labels == -100, 0, np.where(wrong == 1, -1, np.where(doubt, 0, 1))).tolist())
        by_chance.append(drawn.tolist())
    say(f"seed {seed}, probe", by_probe, sample)
    columns = {"by_probe": by_probe, "by_people": by_people, "by_chance": by_chance}
    table = {"input_ids": list(scored["input_ids"]), "labels": list(scored["labels"]), **columns}
    return Dataset.from_dict(table)


def say(name: str, weights: list[list[int]], sample) -> None:
    """How well negatives agree with the marks of people."""
    negative = np.concatenate([np.array(each) for each in weights]) < 0
    hits = int((sample.wrong[negative] == 1).sum())
    print(
        f"{name}: {negative.sum()} negatives of {(sample.labels != -100).sum()} tokens, precision "
        f"{hits / max(int(((sample.wrong >= 0) & negative).sum()), 1):.3f}, "
        f"recall {hits / max(int((sample.wrong == 1).sum()), 1):.3f}",
        flush=True,
    )


def weights_by(
    source: str, table: Dataset, rows: list[dict], judged: list[dict], model: str, tokenizer, folder: Path, settings
) -> Dataset:
    """`table` with `token_weights` by another score, with the share of negatives that the probe has."""
    clean = [{**row, "completion": [{"role": "assistant", "content": row["corrected"]}]} for row in judged]
    scoring: dict = {"score": source, "packing": False}
    marked: dict = {}
    if source == "probe60":
        scoring["score"], marked["judged"] = "probe", as_judged(judged[:60])
    if source in ("influence", "contrast"):
        scoring["reference_model"] = adapted(clean, model, folder / "reference", settings)
    if source == "contrast":
        scoring["noisy_reference_model"] = adapted(judged, model, folder / "noisy", settings)
    score_dataset(model, as_dataset(rows), output_dir=folder / "scored", args=settings_of(folder, **scoring), **marked)
    scored = load_scores(folder / "scored")
    if list(map(list, scored["input_ids"])) != list(map(list, table["input_ids"])):
        raise SystemExit(f"{source} has other tokens")
    probed = np.concatenate([np.array(each) for each in table["by_probe"]])
    share = 1 - (probed < 0).sum() / (probed != 0).sum()
    chosen = settings_of(folder, score=scoring["score"], positive_fraction=float(share), go_on=True)
    weights = [list(each) for each in select_tokens(scored, tokenizer, chosen)["token_weights"]]
    say(source, weights, judged_rows(as_judged(rows), tokenizer, settings_of(folder)))
    return Dataset.from_dict({"input_ids": table["input_ids"], "labels": table["labels"], "token_weights": weights})


def adapted(rows: list[dict], model: str, folder: Path, settings) -> str:
    """A reference: an adapter trained on these rows as the arms are on theirs."""
    if not (folder / "adapter_config.json").exists():
        args = SelectiveSFTConfig(str(folder), report_to="none", save_strategy="no", **settings)
        trainer = SelectiveSFTTrainer(model, args, train_dataset=as_dataset(rows), peft_config=adapter_for(model))
        trainer.train()
        trainer.save_model(str(folder))
    return str(folder)


def adapter_for(model: str) -> LoraConfig:
    """All linear layers of the upper third of the blocks."""
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    upper = list(range(2 * layers // 3, layers))
    return LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, layers_to_transform=upper)


def unknown_tokens(rows: list[dict], tokenizer, args: SelectiveSFTConfig) -> np.ndarray:
    """Tokens of spans of weight 0: those that are wrong once these spans are, and were not before."""
    if "weight" in rows[0]:
        return np.zeros(judged_rows(as_judged(rows), tokenizer, args).wrong.size, bool)
    marked = [{**row, "spans": [[start, end, -1.0] for start, end, _ in row["spans"]]} for row in rows]
    sure = [{**row, "spans": [span for span in row["spans"] if span[2] < 0]} for row in rows]
    return (judged_rows(as_judged(marked), tokenizer, args).wrong == 1) & (
        judged_rows(as_judged(sure), tokenizer, args).wrong != 1
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
    parser.add_argument("--precision", type=float, default=0.6, help="that the probe's threshold is chosen for")
    parser.add_argument("--arms", nargs="+", default=list(PRIMARY), choices=list(ARMS))
    parser.add_argument("--negatives", nargs="*", default=[], choices=SOURCES)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    held, pool = hold_out(read_rows(given.rows, given.votes))
    args = SelectiveSFTConfig(given.work, use_cpu=True, bf16=False, report_to="none")
    evaluation = held_out(held, tokenizer, args, Path(given.neutral).read_text(encoding="utf-8"))
    settings = {
        "use_cpu": True, "bf16": True, "gradient_checkpointing": False, "max_length": None, "num_train_epochs": 2,
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 5, "per_device_train_batch_size": 8,
        "weight_decay": 0.0, "model_init_kwargs": {"dtype": "bfloat16"},
    }  # fmt: skip
    lines = []
    for seed in range(given.draws):
        folder = Path(given.work) / f"draw-{seed}"
        judged, train = split(pool, seed)
        table = training_rows(train, judged, given.model, tokenizer, folder / "scored", seed, given.precision)
        parts = [("arms", table, {name: ARMS[name] for name in given.arms}, "")]
        for source in given.negatives:
            other = weights_by(source, table, train, judged, given.model, tokenizer, folder / source, settings)
            arms = {f"{name}_{source}": changes for name, changes in (("ignore", IGNORE), ("forget", FORGET))}
            parts.append((source, other, arms, "arms"))
        for name, rows, arms, inside in parts:
            found = compare_arms(
                given.model, rows, evaluation, arms, folder / name / inside, seeds=[seed], settings=settings,
                peft_config=adapter_for(given.model), measure=measure,
                untrained={"base": given.model} if seed == 0 and name == "arms" else None,
            )  # fmt: skip
            for arm, values in found.values.items():
                for index, row in enumerate(evaluation["id"]):
                    numbers = [float(values[each][0, index]) for each in MEASURES]
                    lines.append([seed, arm, row, *("" if np.isnan(x) else f"{x:.6g}" for x in numbers)])
        write(Path(given.output), lines)


def write(output: Path, lines: list[list]) -> None:
    """Lines of draws and arms that this call has not measured stay in the table."""
    measured, kept = {(str(line[0]), line[1]) for line in lines}, []
    if output.exists():
        with output.open(newline="", encoding="utf-8") as file:
            kept = [line for line in list(csv.reader(file))[1:] if (line[0], line[1]) not in measured]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["draw", "arm", "row", *MEASURES], *sorted(kept + lines, key=lambda line: int(line[0]))])
    with replaced(output) as file:
        file.write(text.getvalue().encode())


if __name__ == "__main__":
    main()
