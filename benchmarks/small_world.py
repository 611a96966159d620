"""Objectives, weights, normalisers and floors in the demo's world, compared in pairs: minutes a seed on one core.

    python benchmarks/small_world.py --work runs/small-world --output benchmarks/results/small-world.csv

Each seed makes a world, a base and a reference of its own, as the demo does. The arms start from that base and see
the same rows in the same order. Negatives are those of selsft's default rule, the same in every arm, or (`oracle`) the
tokens that are wrong by construction; the weight grows linearly, as by default. Every training is a stage of the work
folder, so the same command resumes. The file has a line for each seed and arm; the table printed after it has the
mean over seeds of each arm's difference to `ignore`, with Student's interval over seeds, since each seed asks
questions of its own.

Rejected: the demo's own arms, whose selection rule and objective are pinned to the figures in docs/demo.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from selsft.demo.evaluate import answers, questions
from selsft.demo.experiment import DemoConfig, model_stages
from selsft.demo.model import encode_all, train_tokenizer
from selsft.demo.world import make_world
from selsft.workflow.arms import compare_arms
from selsft.workflow.quiet import quiet
from selsft.workflow.run import execute

MEASURES = ("exact_match", "exact_match_systematic", "wrong_assertions", "wrong_probability", "known_kept")
OBJECTIVES = ("unlikelihood", "npo", "probability", "wga")
WEIGHTS = (0.1, 0.25, 1.0)
FLOOR = -5.0  # p = .007


def arms_of(reference: str) -> dict[str, dict]:
    """Name -> what the arm sets; the first of them are measured first."""
    scored, by_hand = {"reference_model": reference}, {"columns": {"token_weights": "oracle"}}
    made: dict[str, dict] = {"plain": {}, "ignore": {**scored, "forget_weight": 0.0}}

    def forget(objective: str, weight: float, **more) -> dict:
        return {"forget_objective": objective, "forget_weight": weight, **more}

    for each in ("npo", "unlikelihood"):
        made |= {f"{each}_{weight:g}": scored | forget(each, weight) for weight in WEIGHTS}
    made["oracle.ignore"] = by_hand | {"forget_weight": 0.0}
    for weight in (0.25, 1.0):
        made |= {f"oracle.{each}_{weight:g}": by_hand | forget(each, weight) for each in ("npo", "unlikelihood")}
    for weight in WEIGHTS:
        separate = {"forget_normalization": "separate"}
        made |= {
            f"separate.{each}_{weight:g}": scored | forget(each, weight, **separate)
            for each in ("npo", "unlikelihood")
        }
    for each in ("probability", "wga"):
        beta = {"forget_beta": 0.5} if each == "wga" else {}
        made |= {f"{each}_{weight:g}": scored | forget(each, weight, **beta) for weight in WEIGHTS}
    made |= {f"floor.{each}_1": scored | forget(each, 1.0, forget_floor=FLOOR) for each in ("npo", "unlikelihood")}
    made["floor.gradient_ascent_0.25"] = scored | forget("gradient_ascent", 0.25, forget_floor=FLOOR)
    for each in ("probability", "wga"):
        beta = {"forget_beta": 0.5} if each == "wga" else {}
        made |= {
            f"separate.{each}_{weight:g}": scored | forget(each, weight, forget_normalization="separate", **beta)
            for weight in WEIGHTS
        }
    return made


def run_seed(seed: int, work: Path, names: list[str] | None) -> dict[str, dict[str, float]]:
    """Arm or model -> measure -> mean over the questions of this seed's world."""
    config, folder = DemoConfig(), work / f"seed-{seed}"
    world = make_world(seed, config.world)
    tokenizer = train_tokenizer(world.pretraining, config.vocab_size)
    base, reference = model_stages(world, tokenizer, seed, config, folder)
    with quiet():
        execute([base, reference], folder, {"seed": seed})
        models = {stage.name: str(stage.folder / "model") for stage in (base, reference)}
        rows = encode_all(world.training, tokenizer)
        weights = [[1.0 - 2.0 * wrong for wrong in mask] for mask in rows["noise_mask"]]
        rows = rows.add_column("oracle", weights)
        arms = arms_of(models["reference"])
        for arm in arms.values():
            arm.setdefault("columns", {"token_weights": None})
        found = compare_arms(
            models["base"], rows, questions(world, tokenizer),
            {name: arm for name, arm in arms.items() if names is None or name in ("plain", "ignore", *names)},
            folder / "arms", seeds=[seed + 2], settings=config.training.settings(len(rows)), untrained=models,
            measure=answers,
        )  # fmt: skip
    return {name: {measure: found.mean(name, measure) for measure in MEASURES} for name in found.values}


def difference(lines: list[dict], name: str, baseline: str, measure: str) -> tuple[float, float, float, int]:
    """Mean over the seeds that have both, the ends of its 95 % interval, and how many seeds these are."""
    value = {(line["arm"], line["seed"]): line[measure] for line in lines}
    seeds = sorted({line["seed"] for line in lines if {(name, line["seed"]), (baseline, line["seed"])} <= set(value)})
    change = np.array([value[name, seed] - value[baseline, seed] for seed in seeds])
    if change.size < 2:
        return float(change.mean()) if change.size else float("nan"), float("nan"), float("nan"), change.size
    half = stats.t.ppf(0.975, change.size - 1) * change.std(ddof=1) / np.sqrt(change.size)
    return float(change.mean()), float(change.mean() - half), float(change.mean() + half), change.size


def table(lines: list[dict]) -> str:
    """Markdown: means of each arm, and paired differences to `ignore` (of its own negatives)."""
    names = list(dict.fromkeys(line["arm"] for line in lines))
    out = ["| arm | seeds | " + " | ".join(MEASURES) + " |", "|---|---|" + "---|" * len(MEASURES)]
    for name in names:
        own = [line for line in lines if line["arm"] == name]
        means = [f"{np.mean([line[measure] for line in own]):.3f}" for measure in MEASURES]
        out.append(f"| {name} | {len(own)} | " + " | ".join(means) + " |")
    out += ["", "| difference | seeds | " + " | ".join(MEASURES) + " |", "|---|---|" + "---|" * len(MEASURES)]
    for name in names:
        baseline = "oracle.ignore" if name.startswith("oracle.") and name != "oracle.ignore" else "ignore"
        if name in ("base", "reference", baseline):
            continue
        cells, count = [], 0
        for measure in MEASURES:
            value, low, high, count = difference(lines, name, baseline, measure)
            clear = "**" if low > 0 or high < 0 else ""
            cells.append(f"{clear}{value:+.3f}{clear} [{low:+.3f}, {high:+.3f}]")
        out.append(f"| {name} - {baseline} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(arms_of("")), help="all by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[dict] = []
    for seed in args.seeds:
        found = run_seed(seed, args.work, args.arms)
        lines += [{"seed": seed, "arm": name, **values} for name, values in found.items()]
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(
            {key: round(v, 5) if isinstance(v, float) else v for key, v in line.items()} for line in lines
        )
    print(table(lines))


if __name__ == "__main__":
    main()
