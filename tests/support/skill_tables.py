"""A study folder with known effects, made without a model.

Two clusters of tasks: forgetting the labels of a task takes a share of what is above chance from the tasks of its own
cluster (`SUSCEPTIBLE[j]`), and a tenth of that from the others. The tasks that are forgotten most have the least
confident base model and the narrowest hidden states; the linear signal in the hidden states is the same before and
after forgetting; examples that are learned late are forgotten early.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from selsft.skills.table import SCHEMA, write_scores

CLUSTERS = {"apple": 0, "apricot": 0, "avocado": 0, "birch": 1, "beech": 1, "banyan": 1}
SUSCEPTIBLE = {"apple": 0.95, "apricot": 0.85, "avocado": 0.75, "birch": 0.6, "beech": 0.5, "banyan": 0.4}
HOSTILE = "<script>alert(\"x\")</script> & 'quoted' </td>"
STEPS = (0, 5, 10, 15, 20)
WIDTH = 8


def accuracy_scores(rng: np.random.Generator, accuracy: float, n: int, difficulty: np.ndarray) -> np.ndarray:
    """(n,) margins of the gold option: positive for the easiest `accuracy` of the examples, up to noise."""
    return 3 * (accuracy - difficulty) + 0.1 * rng.standard_normal(n)


def columns(model: tuple, task: str, split: str, step: int, margin: np.ndarray, gold: np.ndarray, k: int = 2, **more):
    """The score table's columns of one evaluation with the given margins (n,) and gold options (n,)."""
    n = len(margin)
    option = np.tile(np.arange(k), n)
    is_gold = option == np.repeat(gold, k)
    run, seed, stage, method, label_task = model
    assigned = more.get("assigned")
    return {
        "run": [run] * (n * k),
        "seed": [seed] * (n * k),
        "stage": [stage] * (n * k),
        "method": [method] * (n * k),
        "label_task": [label_task] * (n * k),
        "eval_task": [task] * (n * k),
        "split": [split] * (n * k),
        "step": [step] * (n * k),
        "example_id": [f"{task}-{split}-{i:04d}" for i in range(n) for _ in range(k)],
        "option": option.tolist(),
        "logprob": (-20 + np.where(is_gold, np.repeat(margin, k), 0.0)).tolist(),
        "n_tokens": [3] * (n * k),
        "n_chars": [10] * (n * k),
        "n_bytes": [11] * (n * k),
        "is_gold": is_gold.tolist(),
        "is_assigned": [None] * (n * k) if assigned is None else (option == np.repeat(assigned, k)).tolist(),
    }


def table(*parts: dict) -> pa.Table:
    """Several `columns` as one table."""
    return pa.table({name: [x for part in parts for x in part[name]] for name in SCHEMA.names}, schema=SCHEMA)


def write_study(folder: Path, seeds: int = 2, n_test: int = 150, n_train: int = 40, hidden: bool = True) -> Path:
    """Scores, hidden states, examples and manifest of `CLUSTERS` x seeds, method `uniform`."""
    rng = np.random.default_rng(7)
    size = {"train": n_train, "test": n_test}
    cells = [(task, split) for task in CLUSTERS for split in size]
    gold = {cell: rng.integers(0, 2, size[cell[1]]) for cell in cells}
    difficulty = {cell: rng.permutation(size[cell[1]]) / size[cell[1]] for cell in cells}
    direction = {task: rng.standard_normal(WIDTH) for task in CLUSTERS}
    base = {task: 0.65 - 0.1 * SUSCEPTIBLE[task] for task in CLUSTERS}

    def stage(model: tuple, accuracy: dict[str, float], curve: tuple[float, float] | None = None) -> None:
        parts = []
        for task, split in cells:
            spread = difficulty[task, split]
            assigned = None
            if model[2] == "forgotten" and task == model[4] and split == "train":
                assigned = rng.integers(0, 2, size[split])
            margin = accuracy_scores(rng, accuracy[task], size[split], spread)
            parts.append(columns(model, task, split, -1, margin, gold[task, split], assigned=assigned))
            if curve and task == model[4]:
                for i, step in enumerate(STEPS):
                    level = curve[0] + (curve[1] - curve[0]) * i / (len(STEPS) - 1)
                    at = 4 * (level - spread) + 0.02 * rng.standard_normal(size[split])
                    parts.append(columns(model, task, split, step, at, gold[task, split], assigned=assigned))
        name = "-".join(str(part) for part in model if part != "")
        write_scores(folder / "scores" / f"{name}.parquet", table(*parts))
        for task, split in cells if hidden else []:
            if model[2] == "base" or task == model[4]:
                _hidden(folder, name, model, task, split, gold[task, split], direction[task], rng)

    for seed in range(seeds):
        stage((f"uniform-full-seed{seed}", seed, "base", "", ""), base)
        for task in CLUSTERS:
            tuned = {other: 0.9 if other == task else base[other] for other in CLUSTERS}
            stage((f"uniform-full-seed{seed}", seed, "finetuned", "", task), tuned, (-0.2, 1.2))
            left = {}
            for other in CLUSTERS:
                share = SUSCEPTIBLE[other] * (1.0 if CLUSTERS[other] == CLUSTERS[task] else 0.1)
                left[other] = 0.9 - share * 0.4
            stage((f"uniform-full-seed{seed}", seed, "forgotten", "uniform", task), left, (1.2, -0.2))

    rows = []
    for (task, split), golds in gold.items():
        for i, right in enumerate(golds):
            text = HOSTILE if i % 3 == 0 else f"{task} question {i}"
            rows.append(
                {
                    "eval_task": task,
                    "split": split,
                    "example_id": f"{task}-{split}-{i:04d}",
                    "prompt": f"SECRET {text}" if task == "banyan" else text,
                    "options": [f"first {i} {HOSTILE}", f"second {i}"],
                    "gold": int(right),
                }
            )
    types = [("eval_task", pa.string()), ("split", pa.string()), ("example_id", pa.string()), ("prompt", pa.string())]
    schema = pa.schema([*types, ("options", pa.list_(pa.string())), ("gold", pa.int32())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "examples.parquet")
    tasks = {
        task: {"area": "toxicity" if task == "banyan" else "commonsense", "sensitive": False} for task in CLUSTERS
    }
    manifest = {"config": {"seeds": seeds, "reference": "per_task"}, "model": {"name": "tiny <b>model</b>"}}
    manifest |= {"tasks": tasks, "stages": [file.stem for file in sorted((folder / "scores").iterdir())]}
    manifest |= {"versions": {"selsft": "0.1.0"}}
    (folder / "study.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def _hidden(folder, name, model, task, split, gold, direction, rng) -> None:
    n = len(gold)
    strength = 0.4 if model[2] == "base" else 1.2
    sign = np.where(np.tile([0, 1], n) == np.repeat(gold, 2), 1.0, -1.0)
    options = rng.standard_normal((2 * n, WIDTH)) + strength * sign[:, None] * direction
    question = (2 - SUSCEPTIBLE[task]) * rng.standard_normal((n, WIDTH))
    place = folder / "hidden" / name
    place.mkdir(parents=True, exist_ok=True)
    stem = f"{task}-{split}"
    states = {"question": question.astype(np.float32), "options": options.astype(np.float32)}
    save_file(states, place / f"{stem}.safetensors")
    notes = dict(zip(("run", "seed", "stage", "method", "label_task"), model, strict=True))
    notes |= {"example_ids": [f"{task}-{split}-{i:04d}" for i in range(n)], "option_counts": [2] * n}
    notes |= {"gold": [int(g) for g in gold], "layer": -5}
    (place / f"{stem}.json").write_text(json.dumps(notes), encoding="utf-8")
