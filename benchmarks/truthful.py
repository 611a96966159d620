"""Does the score find false answers, and does selection help? SmolLM2-135M on human-judged answers to TruthfulQA.

A reference adapter is trained on true answers to one part of the training questions; true and false answers to
another part are scored with it; arms (plain SFT, ignoring the negative tokens, forgetting them, and human labels in
the place of the score) are trained on those from the same start, and judged on held-out questions. Everything is a
stage of `selsft.workflow` in the work folder, so a run that is cut off resumes. Splits are by question, and the label
of an answer is used for nothing but the choice of the reference's data, the arm `human` and the evaluation.

Rejected: mixing questions of the reference's part into the scored part, which would measure memory of the answers.

    python benchmarks/truthful.py --data truthful_judged.jsonl --model MODEL_FOLDER --work runs/truthful
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset
from trl import ModelConfig, SFTConfig, get_peft_config

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.evaluation.intervals import bootstrap
from selsft.evaluation.likelihood import answer_nll
from selsft.evaluation.metrics import auc, auc_interval
from selsft.evaluation.rows import prepare
from selsft.records import read_json, write_json
from selsft.workflow.arms import ArmComparison, compare_arms
from selsft.workflow.quiet import quiet, train_quietly
from selsft.workflow.run import execute
from selsft.workflow.stage import Stage, file_fingerprint, model_source

RECIPE = Path(__file__).parent.parent / "selsft" / "recipes" / "truthfulqa-smollm2.yaml"
SYSTEM = "Answer briefly and truthfully."
SFT, MODEL = ({field.name for field in dataclasses.fields(each)} for each in (SFTConfig, ModelConfig))
# "human" takes the label in the place of the score: all tokens of a false answer are negative. It tells a score that
# finds nothing from a trainer that does nothing, and is no method: who has labels leaves the false answers out.
ARMS = ("sft", "ignore", "forget", "human")


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


def conversation(row: dict) -> dict:
    """A row with two completions, of which `judged` carries the label as the weight of its message."""
    answer = {"role": "assistant", "content": row["answer"]}
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}],
        "completion": [answer],
        "judged": [answer | {"weight": 1.0 if row["true"] else -1.0}],
        "question": row["question"],
    }


def make_data(options: argparse.Namespace) -> dict[str, list[dict]]:
    training = read_answers(options.data, "train")
    validation = read_answers(options.data, "validation")
    names, held_out = sorted(training), sorted(validation)
    random.Random(0).shuffle(names)
    random.Random(0).shuffle(held_out)
    a, b = options.questions_a, options.questions_b
    return {
        "reference": draw(training, names[:a], {True: 2}, 1),
        "train": draw(training, names[a : a + b], {True: 2, False: 2}, 2),
        "eval": draw(validation, held_out[: options.questions_eval], {True: 2, False: 2}, 3),
    }


def rows_of(data: list[dict], judged: bool = False) -> Dataset:
    rows = Dataset.from_list([conversation(row) for row in data])
    return rows if judged else rows.remove_columns("judged")


# ---------------------------------------------------------------- training and scoring


def recipe() -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Settings of the recipe for all trainings, those of selection and forgetting, and the adapter."""
    flags = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    del flags["seed"]
    model = ModelConfig(**{name: flags.pop(name) for name in MODEL & flags.keys()})
    selection = {name: flags.pop(name) for name in flags.keys() - SFT}
    return {**flags, "model_init_kwargs": {"dtype": model.dtype}}, selection, get_peft_config(model)


def answer_masks(rows: Dataset, special: set[int]) -> list[np.ndarray]:
    """Tokens of each row's answer, without the end-of-turn marker and what follows it."""
    masks = []
    for row in rows.select_columns(["input_ids", "labels"]):
        mask = np.asarray(row["labels"]) != -100
        ends = np.flatnonzero(mask & np.isin(row["input_ids"], list(special)))
        if ends.size:
            mask[ends[0] :] = False
        masks.append(mask)
    return masks


def answer_logp(model, tokenizer, rows: Dataset, args: SelectiveSFTConfig) -> dict[str, np.ndarray]:
    """Mean log-probability of the tokens of each held-out answer, nats (a measure of `compare_arms`)."""
    held = prepare(model, tokenizer, rows, args)
    masks = answer_masks(held.prepared, set(tokenizer.all_special_ids))
    labels = [np.where(mask, row, -100).tolist() for mask, row in zip(masks, held.prepared["labels"], strict=True)]
    held.prepared = held.prepared.remove_columns("labels").add_column("labels", labels)
    return {"mean_logp": np.array([-total / count for total, count in answer_nll(held)])}


def reference_stage(options: argparse.Namespace, data: dict[str, list[dict]], rate: float) -> Stage:
    shared, _, adapter = recipe()
    settings = {**shared, "learning_rate": rate, "num_train_epochs": 2}

    def work(folder: Path) -> None:
        args = SelectiveSFTConfig(output_dir=str(folder / "model"), seed=0, **settings)
        trainer = SelectiveSFTTrainer(
            str(options.model), args, train_dataset=rows_of(data["reference"]), peft_config=adapter
        )
        with quiet():
            train_quietly(trainer, f"reference-{rate:g}")
        trainer.save_model(str(folder / "model"))

    inputs = {"model": model_source(str(options.model)), "data": file_fingerprint(options.data)}
    sizes = {"questions": options.questions_a}
    return Stage(f"reference-{rate:g}", {**settings, **sizes}, inputs, work, options.work)


def score_stage(options: argparse.Namespace, data: dict[str, list[dict]], reference: Stage) -> Stage:
    shared, selection, adapter = recipe()

    def work(folder: Path) -> None:
        settings = {**shared, **selection, "scoring_cache_dir": str(options.work / "scores")}
        args = SelectiveSFTConfig(output_dir=str(folder), reference_model=str(reference.folder / "model"), **settings)
        with quiet():
            trainer = SelectiveSFTTrainer(
                str(options.model), args, train_dataset=rows_of(data["train"]), peft_config=adapter
            )
        dataset = trainer.train_dataset
        columns = dataset.with_format("numpy")
        base, ref, weights = (list(columns[name][:]) for name in ("base_logps", "ref_logps", "token_weights"))
        masks = answer_masks(dataset, set(trainer.processing_class.all_special_ids))
        scores = [r - b for r, b in zip(ref, base, strict=True)]
        flat, chosen = (
            np.concatenate([row[mask] for row, mask in zip(values, masks, strict=True)])
            for values in (scores, weights)
        )
        quantiles = np.quantile(flat, [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1])
        found = {
            "mean_score": mean_by_row(scores, masks),
            "min_score": [float(row[mask].min()) for row, mask in zip(scores, masks, strict=True)],
            "mean_base": mean_by_row(base, masks),
            "mean_ref": mean_by_row(ref, masks),
            "negatives": [int((row < 0).sum()) for row in weights],
            "answer_tokens": int(flat.size),
            "quantiles": [round(float(q), 3) for q in quantiles],
            "negative_share": float((chosen < 0).mean()),
        }
        write_json(folder / "scores.json", found)

    inputs: dict[str, Stage | str] = {"reference": reference, "data": file_fingerprint(options.data)}
    name = reference.name.replace("reference", "scores")
    return Stage(name, {"questions": options.questions_b}, inputs, work, options.work)


def mean_by_row(values: list[np.ndarray], masks: list[np.ndarray]) -> list[float]:
    return [float(row[mask].mean()) for row, mask in zip(values, masks, strict=True)]


def compare(options: argparse.Namespace, data: dict[str, list[dict]], references: list[Stage]) -> ArmComparison:
    shared, selection, adapter = recipe()
    scored = {"reference_model": references[0].folder / "model", **selection}
    weighted = {name: value for name, value in selection.items() if name.startswith("forget_")}
    arms = {
        "sft": {},
        "ignore": {**scored, "forget_weight": 0.0},
        "forget": scored,
        "human": {"columns": {"completion": "judged"}, **weighted},
    }
    return compare_arms(
        options.model,
        rows_of(data["train"], judged=True),
        rows_of(data["eval"]),
        {name: arms[name] for name in options.arms},
        options.work / "arms",
        seeds=options.seeds,
        settings={**shared, "scoring_cache_dir": str(options.work / "scores")},
        peft_config=adapter,
        untrained={
            "base": options.model,
            **{stage.name.replace("-", "_"): stage.folder / "model" for stage in references},
        },
        measure=answer_logp,
        group_column="question",
    )


# ---------------------------------------------------------------- statistics


def within_questions(values: np.ndarray, label: np.ndarray, questions: list[str]) -> float:
    """AUC within each question that has both labels, averaged: how easy a question is falls out."""
    areas = [auc(values[own], label[own]) for own in (np.array(questions) == name for name in sorted(set(questions)))]
    return float(np.nanmean(areas))


def margin(values: np.ndarray, label: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean log-probability per token of true answers minus that of false ones, nats."""
    weights = np.ones(len(values)) if weights is None else weights
    return float(
        np.average(values[label], weights=weights[label]) - np.average(values[~label], weights=weights[~label])
    )


def report_scores(rows: list[dict], stage: Stage) -> None:
    label, questions = np.array([row["true"] for row in rows]), [row["question"] for row in rows]
    result = read_json(stage.folder / "scores.json")
    print(f"\n{stage.name}: {len(rows)} answers ({label.mean():.3f} true), {result['answer_tokens']} answer tokens")
    print(f"  negative {result['negative_share']:.4f}, quantiles {result['quantiles']}")
    for name in ("mean_score", "min_score", "mean_base", "mean_ref"):
        values = np.array(result[name])
        found, within = auc_interval(values, label, questions), within_questions(values, label, questions)
        print(f"  AUC {name:11s} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], within questions {within:.3f}")
    negatives = np.array(result["negatives"])
    print(f"  negative tokens: true answers {negatives[label].sum()}, false answers {negatives[~label].sum()}")


def report_arms(rows: list[dict], found: ArmComparison) -> None:
    """NLL of true and false answers (mean over answers of the mean over tokens), how often the true one wins, and the
    margin of every arm over plain SFT with its interval over questions."""
    label, questions = np.array([row["true"] for row in rows]), [row["question"] for row in rows]
    print(f"\n{'model':22s} {'NLL true':>9s} {'NLL false':>9s} {'margin':>8s} {'true wins':>9s}")
    for name, values in found.values.items():
        for index, logp in enumerate(values["mean_logp"]):
            shown = f"{name}-{found.seeds[index]}" if name in ARMS else name
            wins = within_questions(logp, label, questions)
            true, false = -logp[label].mean(), -logp[~label].mean()
            print(f"{shown:22s} {true:9.4f} {false:9.4f} {margin(logp, label):8.4f} {wins:9.4f}")
    for name in found.values.keys() & set(ARMS[1:]) if "sft" in found.values else ():
        for seed, ours, plain in zip(
            found.seeds, found.values[name]["mean_logp"], found.values["sft"]["mean_logp"], strict=True
        ):
            over = bootstrap(lambda w, a=ours, b=plain: margin(a, label, w) - margin(b, label, w), questions)
            print(f"margin of {name}-{seed} over sft-{seed}: {over.value:+.4f} [{over.low:+.4f}, {over.high:+.4f}]")


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
    options = parser.parse_args()
    data = make_data(options)
    print({name: len(rows) for name, rows in data.items()}, flush=True)
    references = [reference_stage(options, data, rate) for rate in options.reference_lr]
    scores = [score_stage(options, data, reference) for reference in references]
    execute([stage for pair in zip(references, scores, strict=True) for stage in pair], options.work, {})
    found = compare(options, data, references)
    for stage in scores:
        report_scores(data["train"], stage)
    report_arms(data["eval"], found)


if __name__ == "__main__":
    main()
