"""Does the score find false answers, and does selection help? SmolLM2-135M on human-judged answers to TruthfulQA.

A reference adapter is trained on true answers to one part of the training questions; true and false answers to
another part are scored with it; three arms (plain SFT, ignoring the negative tokens, forgetting them) are trained on
those from the same start, and judged on held-out questions. Every stage leaves a JSON file in the work folder and is
skipped when that file exists, so that a run can be cut off and go on. Splits are by question, and the label of an
answer is used for nothing but the choice of the reference's data and the evaluation.

Rejected: one long script without stages, which on a CPU loses an hour to an interruption; and mixing questions of the
reference's part into the scored part, which would measure memory of the very answers.

    python benchmarks/truthful.py --data truthful_judged.jsonl --model MODEL_FOLDER --work runs/truthful
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.scoring.batching import BatchBudget, shard_chunks
from selsft.scoring.logprobs import ROW_COLUMNS, forward_logps, score_chunk
from selsft.training.head import add_selective_head
from selsft.training.model import frozen

RECIPE = Path(__file__).parent.parent / "selsft" / "recipes" / "truthfulqa-smollm2.yaml"
SYSTEM = "Answer briefly and truthfully."
# "human" takes the label in the place of the score: all tokens of a false answer are negative. It tells a score that
# finds nothing from a trainer that does nothing, and is no method: who has labels leaves the false answers out.
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"reference": False},
    "ignore": {"forget_weight": 0.0},
    "forget": {},
    "human": {"reference": False, "labels": True},
}


# ---------------------------------------------------------------- data


def read_answers(path: Path, split: str) -> dict[str, list[dict]]:
    """Judged answers of `split` by question, without answers that hold no token to blame."""
    questions: dict[str, list[dict]] = defaultdict(list)
    with path.open(encoding="utf8") as lines:
        for row in map(json.loads, lines):
            bare = row["answer"].strip().strip(".!").lower()
            if row["split"] == split and bare not in {"i have no comment", "yes", "no"}:
                questions[row["question"]].append(row)
    return questions


def draw(questions: dict[str, list[dict]], names: list[str], labels: dict[bool, int], seed: int) -> list[dict]:
    """Up to `labels[label]` answers of each label for each question, shuffled."""
    rng, rows = random.Random(seed), []
    for name in names:
        for label, count in labels.items():
            answers = [row for row in questions[name] if row["true"] is label]
            rows += rng.sample(answers, min(count, len(answers)))
    rng.shuffle(rows)
    return rows


def conversation(row: dict, labels: bool = False) -> dict:
    answer = {"role": "assistant", "content": row["answer"]}
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}],
        "completion": [answer | ({"weight": 1.0 if row["true"] else -1.0} if labels else {})],
    }


def make_data(options: argparse.Namespace) -> dict[str, list[dict]]:
    training = read_answers(options.data, "train")
    validation = read_answers(options.data, "validation")
    names, held_out = sorted(training), sorted(validation)
    random.Random(0).shuffle(names)
    random.Random(0).shuffle(held_out)
    a, b = options.questions_a, options.questions_b
    data = {
        "reference": draw(training, names[:a], {True: 2}, 1),
        "train": draw(training, names[a : a + b], {True: 2, False: 2}, 2),
        "eval": draw(validation, held_out[: options.questions_eval], {True: 2, False: 2}, 3),
    }
    for name, rows in data.items():
        with (options.work / f"{name}.jsonl").open("w", encoding="utf8") as lines:
            lines.writelines(json.dumps(conversation(row)) + "\n" for row in rows)
    return data


# ---------------------------------------------------------------- training and scoring


def make_trainer(
    options: argparse.Namespace, name: str, data, train: str, labels: bool = False, **changes
) -> SelectiveSFTTrainer:
    parser = TrlParser((ScriptArguments, SelectiveSFTConfig, ModelConfig, DatasetMixtureConfig))
    flags = ["--config", str(RECIPE), "--output_dir", str(options.work / name)]
    flags += ["--model_name_or_path", str(options.model), "--scoring_cache_dir", str(options.work / "cache")]
    flags += [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    _, args, model_args, _ = parser.parse_args_and_config(flags)
    args.model_init_kwargs = {"dtype": model_args.dtype}
    return SelectiveSFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=Dataset.from_list([conversation(row, labels) for row in data[train]]),
        eval_dataset=Dataset.from_list([conversation(row) for row in data["eval"]]),
        peft_config=get_peft_config(model_args),
    )


def answer_masks(dataset: Dataset, special: set[int]) -> list[np.ndarray]:
    """Tokens of each row's answer, without the end-of-turn marker and what follows it."""
    masks = []
    for row in dataset.select_columns(["input_ids", "labels"]):
        mask = np.asarray(row["labels"]) != -100
        ends = np.flatnonzero(mask & np.isin(row["input_ids"], list(special)))
        if ends.size:
            mask[ends[0] :] = False
        masks.append(mask)
    return masks


def mean_by_row(values: list[np.ndarray], masks: list[np.ndarray]) -> list[float]:
    return [float(row[mask].mean()) for row, mask in zip(values, masks, strict=True)]


def evaluate(trainer: SelectiveSFTTrainer) -> dict[str, list]:
    """Mean log-probability of every held-out answer under the trained model."""
    add_selective_head(trainer.model.get_base_model())
    model, dataset = trainer.model, trainer.eval_dataset
    rows: list[np.ndarray] = []
    with frozen(model):
        for chunk in shard_chunks(dataset, ROW_COLUMNS):
            (flat,) = score_chunk(
                chunk, lambda inputs: [forward_logps(model, inputs)], trainer.data_collator, trainer.accelerator,
                BatchBudget.of(trainer.args, model),
            )  # fmt: skip
            rows += np.split(flat, np.cumsum(chunk.lengths)[:-1])
    masks = answer_masks(dataset, set(trainer.processing_class.all_special_ids))
    return {"mean_logp": mean_by_row(rows, masks), "tokens": [int(mask.sum()) for mask in masks]}


def staged(options: argparse.Namespace, name: str, run) -> dict:
    """The result of the stage, from its file when it is there."""
    path = options.work / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    print(f"--- {name}", flush=True)
    start = time.perf_counter()
    result = run()
    result["seconds"] = round(time.perf_counter() - start, 1)
    path.write_text(json.dumps(result))
    return result


def train_reference(options, data, name: str, learning_rate: float, epochs: int) -> dict:
    trainer = make_trainer(options, name, data, "reference", learning_rate=learning_rate, num_train_epochs=epochs)
    before = evaluate(trainer) if not (options.work / "base.json").is_file() else None
    if before is not None:
        (options.work / "base.json").write_text(json.dumps(before))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(options.work / name))
    return {**evaluate(trainer), "train_seconds": round(seconds, 1), "log": trainer.state.log_history}


def score(options, data, reference: str) -> dict:
    trainer = make_trainer(options, "scoring", data, "train", reference_model=options.work / reference)
    dataset = trainer.train_dataset
    columns = dataset.with_format("numpy")
    base, ref, weights = (list(columns[name][:]) for name in ("base_logps", "ref_logps", "token_weights"))
    masks = answer_masks(dataset, set(trainer.processing_class.all_special_ids))
    scores = [r - b for r, b in zip(ref, base, strict=True)]
    flat = np.concatenate([row[mask] for row, mask in zip(scores, masks, strict=True)])
    chosen = np.concatenate([row[mask] for row, mask in zip(weights, masks, strict=True)])
    return {
        "mean_score": mean_by_row(scores, masks),
        "min_score": [float(row[mask].min()) for row, mask in zip(scores, masks, strict=True)],
        "mean_base": mean_by_row(base, masks),
        "mean_ref": mean_by_row(ref, masks),
        "negatives": [int((row < 0).sum()) for row in weights],
        "answer_tokens": int(flat.size),
        "quantiles": [round(float(q), 3) for q in np.quantile(flat, [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1])],
        "negative_share": float((chosen < 0).mean()),
    }


def train_arm(options, data, arm: str, seed: int, reference: str, **changes) -> dict:
    changes = {**ARMS[arm], **changes}
    if changes.pop("reference", True):
        changes["reference_model"] = options.work / reference
    trainer = make_trainer(options, f"{arm}-{seed}", data, "train", seed=seed, **changes)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return {**evaluate(trainer), "train_seconds": round(seconds, 1), "log": trainer.state.log_history}


# ---------------------------------------------------------------- statistics


def auc(values: np.ndarray, label: np.ndarray) -> float:
    """Probability that a value with `label` is above one without, ties counted half."""
    high, low = values[label], values[~label]
    return float((high[:, None] > low).mean() + 0.5 * (high[:, None] == low).mean())


def bootstrap(statistic, questions: list[str], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of `statistic(indices)` over resampled questions: answers to one question are not independent."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        groups[question].append(index)
    members, rng = [np.array(group) for group in groups.values()], np.random.default_rng(0)
    draws = [
        statistic(np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]))
        for _ in range(rounds)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def within_questions(values: np.ndarray, label: np.ndarray, questions: list[str]) -> float:
    """AUC within each question that has both labels, averaged: how easy a question is falls out."""
    wins = []
    for question in sorted(set(questions)):
        own = np.array([other == question for other in questions])
        if (own & label).any() and (own & ~label).any():
            wins.append(auc(values[own], label[own]))
    return float(np.mean(wins))


def margin(values: np.ndarray, label: np.ndarray) -> float:
    """Mean log-probability per token of true answers minus that of false ones, nats."""
    return float(values[label].mean() - values[~label].mean())


def held_out(result: dict, rows: list[dict]) -> dict[str, float]:
    """NLL of true and false answers (mean over answers of the mean over tokens) and how often the true one wins."""
    logp, label = np.array(result["mean_logp"]), np.array([row["true"] for row in rows])
    wins = within_questions(logp, label, [row["question"] for row in rows])
    true, false = -logp[label].mean(), -logp[~label].mean()
    return {"nll_true": true, "nll_false": false, "margin": margin(logp, label), "true_wins": wins}


def report(options: argparse.Namespace, data: dict[str, list[dict]]) -> None:
    rows, label = data["train"], np.array([row["true"] for row in data["train"]])
    questions = [row["question"] for row in rows]
    for path in sorted(options.work.glob("scores-*.json")):
        result = json.loads(path.read_text())
        print(f"\n{path.stem}: {len(rows)} answers ({label.mean():.3f} true), {result['answer_tokens']} answer tokens")
        print(f"  negative {result['negative_share']:.4f}, {result['seconds']} s, quantiles {result['quantiles']}")
        for name in ("mean_score", "min_score", "mean_base", "mean_ref"):
            values = np.array(result[name])
            low, high = bootstrap(lambda i, v=values: auc(v[i], label[i]), questions)
            within = within_questions(values, label, questions)
            print(f"  AUC {name:11s} {auc(values, label):.3f} [{low:.3f}, {high:.3f}], within questions {within:.3f}")
        negatives = np.array(result["negatives"])
        print(f"  negative tokens: true answers {negatives[label].sum()}, false answers {negatives[~label].sum()}")
    print(f"\n{'run':22s} {'NLL true':>9s} {'NLL false':>9s} {'margin':>8s} {'true wins':>9s} {'train s':>8s}")
    runs = [path for name in ("base", "reference*", "arm-*") for path in sorted(options.work.glob(f"{name}.json"))]
    for path in runs:
        result = json.loads(path.read_text())
        found = held_out(result, data["eval"])
        print(f"{path.stem:22s} {found['nll_true']:9.4f} {found['nll_false']:9.4f} {found['margin']:8.4f} "
              f"{found['true_wins']:9.4f} {result.get('train_seconds', 0):8.1f}")  # fmt: skip
    rows, label = data["eval"], np.array([row["true"] for row in data["eval"]])
    questions = [row["question"] for row in rows]
    for path in sorted(options.work.glob("arm-*.json")):
        plain = options.work / f"arm-sft-{path.stem.split('-')[-1]}.json"
        if plain == path or not plain.is_file():
            continue
        ours, theirs = (np.array(json.loads(file.read_text())["mean_logp"]) for file in (path, plain))
        difference = margin(ours, label) - margin(theirs, label)
        low, high = bootstrap(lambda i, a=ours, b=theirs: margin(a[i], label[i]) - margin(b[i], label[i]), questions)
        print(f"margin of {path.stem} over {plain.stem}: {difference:+.4f} [{low:+.4f}, {high:+.4f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of question, answer, true, split")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, required=True, help="folder for the results of the stages")
    parser.add_argument("--questions_a", type=int, default=150, help="questions of the reference")
    parser.add_argument("--questions_b", type=int, default=100, help="questions that are scored and trained on")
    parser.add_argument("--questions_eval", type=int, default=60, help="held-out questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--reference_lr", type=float, nargs="+", default=[5e-4], help="the arms use the first one")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = make_data(options)
    print({name: len(rows) for name, rows in data.items()}, flush=True)
    if not options.report:
        for rate in options.reference_lr:
            name = f"reference-{rate:g}"
            staged(options, name, lambda n=name, r=rate: train_reference(options, data, n, r, 2))
            staged(options, f"scores-{rate:g}", lambda n=name: score(options, data, n))
        main_reference = f"reference-{options.reference_lr[0]:g}"
        for seed in options.seeds:
            for arm in options.arms:
                run = lambda a=arm, s=seed: train_arm(options, data, a, s, main_reference)  # noqa: E731
                staged(options, f"arm-{arm}-{seed}", run)
    report(options, data)


if __name__ == "__main__":
    main()
