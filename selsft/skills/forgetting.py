"""The effect of forgetting: each forgotten model against the fine-tuned and the base model of its seed.

The formulas are those of Zhang, Choshen and Andreas 2024 (arXiv 2409.02228), with the choices that the paper leaves
open as arguments. Rejected: ratios of accuracies that were averaged over seeds and examples beforehand, which have no
paired interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd

from ..evaluation import intervals
from ..evaluation.intervals import Interval
from .table import ALL_TASKS, CELL, END, MODEL, Model

Reference = Literal["per_task", "parent", "shared"]
"""Which fine-tuned model a forgotten model is compared with, when the labels of task i were forgotten and task j is
evaluated: the one trained on j (`per_task`), the one that the forgotten model comes from (`parent`: trained on i, or
on all tasks), or the one trained on all tasks (`shared`). The paper writes acc_ft(j) and does not say which."""
UNFORGOTTEN, PARTLY, TO_CHANCE = "unforgotten", "partly forgotten", "down to chance"


class Ends:
    """The questions at the end of each stage, as vectors aligned by example.

    Args:
        found: rows of `metrics.questions`; steps inside a stage are left out.

    Attributes:
        ids: {(eval_task, split): (n,) sorted example ids}.
        models: all models with scores, sorted.
    """

    def __init__(self, found: pd.DataFrame):
        end = found[found["step"] == END].reset_index(drop=True)
        names = end["example_id"].astype(str).to_numpy(dtype=object)
        self.ids: dict[tuple[str, str], np.ndarray] = {}
        self._columns = end
        self._place = np.empty(len(end), dtype=np.int64)  # of each row's example in `ids`
        for key, rows in end.groupby(["eval_task", "split"], observed=True).indices.items():
            self._place[rows], ids = pd.factorize(names[rows], sort=True)
            self.ids[str(key[0]), str(key[1])] = ids
        self._rows: dict[tuple[Model, str, str], np.ndarray] = {}
        for key, rows in end.groupby(CELL, observed=True).indices.items():
            model = Model(str(key[0]), int(key[1]), *(str(name) for name in key[2:5]))
            self._rows[model, str(key[5]), str(key[6])] = rows
        self.models = sorted({model for model, _, _ in self._rows})
        self._vectors: dict[tuple[Model, str, str, str], np.ndarray] = {}

    def tasks(self) -> list[str]:
        """The evaluated tasks, sorted."""
        return sorted({task for task, _ in self.ids})

    def vector(self, model: Model | None, eval_task: str, split: str, column: str) -> np.ndarray | None:
        """(n,) float64 of one column over `ids[eval_task, split]`, NaN where the model lacks an example; None where it
        was not evaluated."""
        if model is None or (model, eval_task, split) not in self._rows:
            return None
        key = (model, eval_task, split, column)
        if key not in self._vectors:
            rows = self._rows[model, eval_task, split]
            vector = np.full(len(self.ids[eval_task, split]), np.nan)
            vector[self._place[rows]] = self._columns[column].to_numpy()[rows]
            self._vectors[key] = vector
        return self._vectors[key]

    def forgotten(self) -> dict[tuple[str, str, str], list[Model]]:
        """{(variant, method, label_task): its models, one per seed}."""
        groups = defaultdict(list)
        for model in self.models:
            if model.stage == "forgotten":
                groups[model.variant, model.method, model.label_task].append(model)
        return dict(groups)

    def base(self, model: Model) -> Model | None:
        """The base model of a model's seed; if none has its seed, the only one there is."""
        return self._one([m for m in self.models if m.stage == "base"], model, "base", any_seed=True)

    def finetuned(self, model: Model, eval_task: str, reference: Reference) -> Model | None:
        """The fine-tuned model of a forgotten model's seed that `reference` means."""
        if reference not in get_args(Reference):
            raise ValueError(f"reference must be one of {', '.join(get_args(Reference))}; got {reference!r}")
        wanted = {"per_task": [eval_task], "parent": [model.label_task, ALL_TASKS], "shared": [ALL_TASKS]}[reference]
        for task in wanted:
            of_task = [m for m in self.models if m.stage == "finetuned" and m.label_task == task]
            if found := self._one(of_task, model, f"fine-tuned ({task})", any_seed=False):
                return found
        return None

    @staticmethod
    def _one(candidates: list[Model], model: Model, what: str, any_seed: bool) -> Model | None:
        same = [m for m in candidates if m.seed == model.seed] or (candidates if any_seed else [])
        same = [m for m in same if m.run == model.run] or same
        if len(same) > 1:
            runs = ", ".join(sorted(m.run for m in same))
            raise ValueError(f"{model.run}: several {what} models fit ({runs}); give one of them the same run name")
        return same[0] if same else None

    def stack(
        self, seeds: Sequence[Sequence[Model | None]], eval_task: str, split: str, column: str
    ) -> list[np.ndarray] | None:
        """The vectors of several stages, paired: one (S, n) array per stage, NaN in all stages where one lacks it.

        Args:
            seeds: for each seed the model of each stage. Seeds that lack a stage are left out.
        """
        rows = [[self.vector(model, eval_task, split, column) for model in models] for models in seeds]
        complete = [row for row in rows if all(vector is not None for vector in row)]
        if not complete:
            return None
        values = np.array(complete, dtype=np.float64)  # (S, stages, n)
        values[np.broadcast_to(np.isnan(values).any(axis=1, keepdims=True), values.shape)] = np.nan
        values = values[~np.isnan(values).all(axis=(1, 2))]
        return [values[:, stage] for stage in range(values.shape[1])] if len(values) else None


def forgetting(
    ends: Ends,
    chances: Mapping[tuple[str, str], float],
    reference: Reference = "per_task",
    margin: float = 0.05,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Forget gap, forget ratio and outcome of every (forgotten task, evaluated task), over seeds, with intervals.

    With accuracies on the examples that all stages share, c chance:

        gap   = acc_forgotten - c                                        0: forgotten
        drop  = acc_finetuned - acc_forgotten
        ratio = drop / (acc_finetuned - c)                               1: forgotten, 0: not at all
        flipped_ratio = drop / (acc_finetuned - (1 - acc_finetuned))     for method `flip` and two options

    The ratio is null unless the lower end of acc_finetuned's interval exceeds c by `margin`. Outcomes:

        unforgotten       no drop that the interval tells from 0, and still above chance
        partly forgotten  a drop, and still above chance
        down to chance    a drop, and the interval of the gap reaches 0 or lies below

    Args:
        chances: of `metrics.chances`.
        reference: see `Reference`.
        margin: how far above chance the fine-tuned accuracy must be for a ratio.

    Returns:
        One row per (variant, method, label_task, eval_task, split): `n_seeds`, `n_examples`, `chance`; each of `base`,
        `finetuned`, `forgotten` (accuracies), `drop`, `gap`, `ratio`, `flipped_ratio` with `<name>_low` and
        `<name>_high`; `ratio_reason`, `flipped_reason`, why null; `outcome` (None where undecided) and
        `outcome_reason`; `base_confidence`, `finetuned_confidence`, `forgotten_confidence`, means of P(gold).
    """
    rows: list[dict] = []
    groups = ends.forgotten()
    for eval_task, split in ends.ids:
        weights: dict[int, intervals.Draws] = {}
        for (variant, method, label_task), models in groups.items():
            if all(ends.vector(m, eval_task, split, "correct") is None for m in models):
                continue
            key = {"variant": variant, "method": method, "label_task": label_task}
            row: dict = {**key, "eval_task": eval_task, "split": split, "reference": reference}
            c = row["chance"] = chances[eval_task, split]
            pairs = [(ends.finetuned(m, eval_task, reference), m) for m in models]
            stages = ends.stack(pairs, eval_task, split, "correct")
            if stages is None:
                rows.append({**row, **_without_reference(ends, models, eval_task, split, reference, c, draws, seed)})
                continue
            n_seeds, n = stages[0].shape
            if n_seeds not in weights:
                weights[n_seeds] = intervals.draw(n_seeds, n, draws, seed)
            row |= {"n_seeds": n_seeds, "n_examples": int((~np.isnan(stages[0])).any(axis=0).sum())}
            row |= _compare(stages, c, margin, method == "flip", weights[n_seeds])
            with_base = [(ends.base(m), *pair) for m, pair in zip(models, pairs, strict=True)]
            base = ends.stack(with_base, eval_task, split, "correct")
            if base is not None and len(base[0]) in weights:
                row |= _named("base", _accuracy(base[0], weights[len(base[0])])[0])
            for name, models_of in (("finetuned", pairs), ("base", with_base)):
                if confidence := ends.stack(models_of, eval_task, split, "confidence"):
                    row[f"{name}_confidence"] = intervals.mean(confidence[0])
                    row["forgotten_confidence"] = intervals.mean(confidence[-1])
            rows.append(row)
    table = pd.DataFrame(rows).reindex(columns=COLUMNS)
    return table.sort_values(COLUMNS[:5], ignore_index=True)


COLUMNS = [
    *("variant", "method", "label_task", "eval_task", "split", "reference", "n_seeds", "n_examples", "chance"),
    *(
        f"{name}{end}"
        for name in ("base", "finetuned", "forgotten", "drop", "gap", "ratio", "flipped_ratio")
        for end in ("", "_low", "_high")
    ),
    *("ratio_reason", "flipped_reason", "outcome", "outcome_reason"),
    *("base_confidence", "finetuned_confidence", "forgotten_confidence"),
]


def _without_reference(
    ends: Ends, models: list[Model], eval_task: str, split: str, reference: str, c: float, draws: int, seed: int
) -> dict:
    """The columns that need no fine-tuned model: accuracy and gap."""
    [values] = ends.stack([(model,) for model in models], eval_task, split, "correct") or []
    left, _ = _accuracy(values, intervals.draw(values.shape[0], values.shape[1], draws, seed))
    reason = f"no fine-tuned model ({reference}) of the same seed was evaluated here"
    size = {"n_seeds": len(values), "n_examples": int((~np.isnan(values)).any(axis=0).sum())}
    gap = Interval(left.value - c, left.low - c, left.high - c)
    reasons = {"ratio_reason": reason, "flipped_reason": reason, "outcome": None, "outcome_reason": reason}
    return {**size, **_named("forgotten", left), **_named("gap", gap), **reasons}


def _accuracy(values: np.ndarray, weights: intervals.Draws) -> tuple[Interval, np.ndarray]:
    draws = intervals.mean_draws(values, weights)
    return intervals.interval(intervals.mean(values), draws, 0.0, 1.0), draws


def _named(name: str, found: Interval) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _compare(stages: list[np.ndarray], c: float, margin: float, flipped: bool, weights: intervals.Draws) -> dict:
    """The columns of `forgetting` from accuracies (S, n) of the fine-tuned and the forgotten models."""
    (ft, ft_draws), (left, _) = (_accuracy(stage, weights) for stage in stages)
    drop_draws = intervals.mean_draws(stages[0] - stages[1], weights)
    drop = intervals.interval(ft.value - left.value, drop_draws, -1.0, 1.0)
    gap = Interval(left.value - c, left.low - c, left.high - c)
    row: dict = {**_named("finetuned", ft), **_named("forgotten", left), **_named("drop", drop), **_named("gap", gap)}
    row |= {"outcome": None, "outcome_reason": ""}
    if ft.low <= c + margin:
        reason = f"fine-tuned accuracy {ft.value:.2f} (from {ft.low:.2f}) is not {margin:g} above chance {c:.2f}"
        return row | {"ratio_reason": reason, "flipped_reason": reason, "outcome_reason": reason}

    def over(denominator: float, denominator_draws: np.ndarray) -> Interval:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(denominator_draws > 0, drop_draws / denominator_draws, np.nan)
        return intervals.interval((ft.value - left.value) / denominator, ratio)

    row |= _named("ratio", over(ft.value - c, ft_draws - c)) | {"ratio_reason": ""}
    if flipped and c == 0.5:
        row |= _named("flipped_ratio", over(2 * ft.value - 1, 2 * ft_draws - 1)) | {"flipped_reason": ""}
    else:
        row["flipped_reason"] = "defined for two options and chance 0.5" if flipped else "labels were not flipped"
    if gap.low > 0:
        row["outcome"] = PARTLY if drop.low > 0 else UNFORGOTTEN
    elif drop.low > 0:
        row["outcome"] = TO_CHANCE
    else:
        row["outcome_reason"] = (
            "too few examples, or seeds that differ: neither the drop nor what is left above chance is told from 0"
        )
    return row


def transitions(ends: Ends, reference: Reference = "parent") -> pd.DataFrame:
    """How answers to single examples changed from base to fine-tuned to forgotten.

    Returns:
        One row per (variant, method, label_task, eval_task, split, base, finetuned, forgotten), the last three bool
        (right or not), with `n`, the number of (seed, example), and `share` of all in that comparison; the eight
        combinations are always there. Comparisons without a base or fine-tuned model are left out.
    """
    rows = []
    for (variant, method, label_task), models in ends.forgotten().items():
        for eval_task, split in ends.ids:
            models_of = [(ends.base(m), ends.finetuned(m, eval_task, reference), m) for m in models]
            stages = ends.stack(models_of, eval_task, split, "correct")
            if stages is None:
                continue
            values = np.stack([stage.ravel() for stage in stages])
            values = values[:, ~np.isnan(values).any(axis=0)].astype(int)
            counts = np.bincount(values[0] * 4 + values[1] * 2 + values[2], minlength=8)
            for code, n in enumerate(counts):
                right = {"base": bool(code & 4), "finetuned": bool(code & 2), "forgotten": bool(code & 1)}
                key = {"variant": variant, "method": method, "label_task": label_task}
                share = n / counts.sum()
                rows.append({**key, "eval_task": eval_task, "split": split, **right, "n": int(n), "share": share})
    names = ["variant", "method", "label_task", "eval_task", "split", "base", "finetuned", "forgotten", "n", "share"]
    return pd.DataFrame(rows, columns=names)


def agreement(found: pd.DataFrame, ends: Ends) -> pd.DataFrame:
    """How far a model learned the labels that it was given, and how far it still gives the gold ones.

    Returns:
        One row per forgotten model and split with assigned labels (at the end of the stage, on its own task): `MODEL`,
        `eval_task`, `split`, `n`; `match_rate`, the share of assigned labels that are gold; `assigned_before` and
        `assigned_after`, agreement with the assigned labels of the model it comes from and of itself; `gold_before`,
        `gold_after`, the same with the gold labels; `wrong_before`, `wrong_after`, agreement with the assigned labels
        where these are not gold. NaN where the model before is missing or no assigned label is wrong.
    """
    given = found[(found["step"] == END) & (found["stage"] == "forgotten") & (found["assigned"] >= 0)]
    rows = []
    for key, group in given.groupby([*MODEL, "eval_task", "split"], observed=True):
        model = Model(str(key[0]), int(key[1]), *(str(name) for name in key[2:5]))
        eval_task, split = str(key[5]), str(key[6])
        at = np.searchsorted(ends.ids[eval_task, split], group["example_id"].astype(str).to_numpy())
        parent = ends.vector(ends.finetuned(model, eval_task, "parent"), eval_task, split, "predicted")
        assigned, gold = group["assigned"].to_numpy(), group["gold"].to_numpy()
        row = {**model._asdict(), "eval_task": eval_task, "split": split, "n": len(group)}
        row["match_rate"] = (assigned == gold).mean()
        before = np.full(len(group), np.nan) if parent is None else parent[at]
        for name, predicted in (("before", before), ("after", group["predicted"].to_numpy(dtype=np.float64))):
            known = ~np.isnan(predicted)
            wrong = known & (assigned != gold)
            row[f"assigned_{name}"] = _share((predicted == assigned)[known])
            row[f"gold_{name}"] = _share((predicted == gold)[known])
            row[f"wrong_{name}"] = _share((predicted == assigned)[wrong])
        rows.append(row)
    names = [
        "match_rate",
        "assigned_before",
        "assigned_after",
        "gold_before",
        "gold_after",
        "wrong_before",
        "wrong_after",
    ]
    return pd.DataFrame(rows, columns=[*MODEL, "eval_task", "split", "n", *names])


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else float("nan")
