"""Arms: several trainings from one start, over the same rows in the same order, compared in pairs.

What a method is worth shows against plain training on the same rows, and only in pairs: seeds differ by more than arms
do, and held-out rows by more than either. So every arm of a seed starts from the same weights, draws the same batches
and takes the same number of steps, and differences are taken row by row and seed by seed before anything is averaged.
Rejected: comparing the runs of separate commands, whose seeds, steps or rows differ before anybody notices.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import ArrayLike
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..errors import InputError, input_errors
from ..evaluation.intervals import Interval, paired
from ..evaluation.likelihood import answer_nll
from ..evaluation.load import load_model
from ..evaluation.rows import prepare
from ..records import read_json, remove, replaced, write_json
from ..trainer import SelectiveSFTTrainer
from ..training.checkpoints import last_checkpoint
from ..training.model import Model, frozen
from .alike import NAME, SET_HERE, SHARED
from .quiet import QUIET, quiet, train_quietly
from .run import execute
from .stage import Stage, model_source

Measure = Callable[[Model, PreTrainedTokenizerBase, Dataset, SelectiveSFTConfig], Mapping[str, ArrayLike]]
_ROWS, _NOTES = "rows.parquet", "arm.json"
_PATHS = {"reference_model", "scoring_cache_dir"}  # known by their content, or of no weight


@dataclass(frozen=True)
class ArmComparison:
    """What came out of `compare_arms`.

    Attributes:
        baseline: the arm that others are compared with.
        seeds: as given.
        values: name of an arm or model -> measure -> `(seeds, rows)` float64, a value per seed and held-out row, NaN
            where a measure does not apply to a row. `(1, rows)` for models that were not trained here.
        groups: `(rows,)` held-out rows with equal values are resampled together; `None` for each row alone.
        folders: name -> the folder of each seed, with its values, notes and, where kept, its model.
        sizes: measure -> `(rows,)` weight of each row in a mean, for instance its tokens; equal where a measure has
            none.
    """

    baseline: str
    seeds: tuple[int, ...]
    values: dict[str, dict[str, np.ndarray]]
    groups: np.ndarray | None
    folders: dict[str, list[Path]]
    sizes: dict[str, np.ndarray] = field(default_factory=dict)

    def mean(self, name: str, measure: str) -> float:
        """Mean over seeds of the (weighted) means over rows."""
        values = self.values[name][measure]
        size = np.where(np.isnan(values), np.nan, self.sizes.get(measure, 1.0))
        return float((np.nansum(values * size, axis=1) / np.nansum(size, axis=1)).mean())

    def difference(self, name: str, measure: str, baseline: str | None = None) -> Interval:
        """Mean of `name` minus that of `baseline` with its 95 % interval over rows and seeds, on the rows that both
        have (`evaluation.intervals`)."""
        first = self.values[baseline or self.baseline][measure]
        return paired(first, self.values[name][measure], self.sizes.get(measure), self.groups)

    def __str__(self) -> str:
        lines = []
        for measure in self.values[self.baseline]:
            lines.append(f"{measure}, and the difference to {self.baseline} with its 95 % interval")
            for name in self.values:
                text = f"  {name:20} {self.mean(name, measure):9.4f}"
                if name != self.baseline:
                    text += "  {:+.4f} [{:+.4f}, {:+.4f}]".format(*self.difference(name, measure))
                lines.append(text)
        return "\n".join(lines)


def nll(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Dataset, args: SelectiveSFTConfig
) -> dict[str, np.ndarray]:
    """The default measure: `nll`, the mean negative log-likelihood of each row's answer tokens, nats."""
    held = prepare(model, tokenizer, rows, args)
    found = np.full(len(rows), np.nan)
    for index, (total, count) in zip(held.indices, answer_nll(held), strict=True):
        found[index] = total / count if count else np.nan
    return {"nll": found}


def compare_arms(
    model: str | Path,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    arms: Mapping[str, Mapping[str, Any]],
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    baseline: str | None = None,
    peft_config: PeftConfig | None = None,
    untrained: Mapping[str, str | Path] | None = None,
    measure: Measure = nll,
    group_column: str | None = None,
    keep_models: bool = False,
    echo: Callable[[str], None] = print,
) -> ArmComparison:
    """Train every arm with every seed, measure all of them on held-out rows, and compare them in pairs.

    The work is kept in stages under `output_dir`: the same call resumes where it was cut off, and an arm or seed more
    leaves the others as they are. Scores of the training rows are computed once and shared by all arms and seeds. One
    process, one device.

        forget = {"reference_model": "ref"}
        arms = {"plain": {}, "ignore": {**forget, "forget_weight": 0.0}, "forget": forget}
        found = compare_arms("base", train, held_out, arms, "runs/arms", seeds=[0, 1, 2], settings={"max_steps": 100})
        print(found)
        found.difference("forget", "nll")  # Interval(value=..., low=..., high=...)

    Args:
        model: folder or Hub id of the model that every arm starts from.
        train_dataset: rows that `SelectiveSFTTrainer` takes.
        eval_dataset: held-out rows for `measure`.
        arms: name -> fields of `SelectiveSFTConfig` in which the arm differs; `"columns"` maps columns of the rows to
            the columns of `train_dataset` that the arm reads in their place, or to `None` to leave one out:
            `{"columns": {"token_weights": "by_hand"}}`. What would change batches or steps is refused.
        output_dir: folder of the comparison.
        seeds: of the order of rows, dropout and new adapters; every arm is trained once with each.
        settings: fields of `SelectiveSFTConfig` that all arms share.
        baseline: the arm that others are compared with; the first by default.
        peft_config: adapter to train; all weights are trained without one.
        untrained: name -> folder or Hub id of models that are measured beside the arms, for instance the start and the
            reference.
        measure: of a loaded model, its tokenizer, `eval_dataset` and settings: name -> a value for each row, NaN where
            there is none. By default the likelihood of the answers.
        group_column: column of `eval_dataset`; rows with equal values (a question's answers) are resampled together.
        keep_models: whether the trained models stay in their folders.
        echo: shows a line.

    Raises:
        `InputError` for an arm that cannot be compared, a setting that does not exist, or a folder that is in use.
    """
    root, shared, untrained = Path(output_dir), dict(settings or {}), dict(untrained or {})
    baseline = baseline or next(iter(arms), "")
    _check(arms, shared, baseline, seeds, train_dataset, eval_dataset, group_column, [*arms, *untrained])
    content = {"train": _content_sha256(train_dataset), "eval": _content_sha256(eval_dataset)}
    alternatives = {source for each in arms.values() for source in dict(each.get("columns", {})).values()}
    lora = None if peft_config is None else _plain(peft_config.to_dict())
    measured = {"measure": f"{measure.__module__}.{measure.__qualname__}"}

    def arguments(folder: Path, **changes: Any) -> SelectiveSFTConfig:
        given = {"scoring_cache_dir": str(root / "scores"), **QUIET, **shared, **changes}
        with input_errors():
            try:
                return SelectiveSFTConfig(output_dir=str(folder), **given)
            except TypeError as error:  # a name that is no field
                raise InputError(f"arms: {error}") from error

    def write_values(source: str, folder: Path) -> None:
        args = arguments(folder / "evaluation")
        trained, tokenizer = load_model(source, cast(dict, args.model_init_kwargs or {}))
        args.model_init_kwargs = None  # they are spent
        trained.to(args.device)  # type: ignore[arg-type]  # their own annotation
        with frozen(trained):
            values = {
                name: np.asarray(each, float) for name, each in measure(trained, tokenizer, eval_dataset, args).items()
            }
        if wrong := [name for name, each in values.items() if each.shape != (len(eval_dataset),)]:
            raise InputError(f"measure: {wrong[0]!r} must have a value for each of the {len(eval_dataset)} rows")
        remove(folder / "evaluation")
        with replaced(folder / _ROWS) as file:
            pq.write_table(pa.table(values), file)

    def arm_stage(name: str, seed: int) -> Stage:
        changes = dict(arms[name])
        columns = dict(changes.pop("columns", {}))
        inputs: dict[str, Stage | str] = {"model": model_source(str(model)), **content}
        if reference := changes.get("reference_model", shared.get("reference_model")):
            changes["reference_model"] = str(reference)
            inputs["reference"] = "base" if reference == "base" else model_source(str(reference))
        known = {key: value for key, value in {**shared, **changes}.items() if key not in _PATHS}
        arguments(root, **changes, seed=seed, data_seed=seed)  # before anything is trained

        def work(folder: Path) -> str:
            weights = folder / "model"
            with quiet():
                args = arguments(weights, **changes, seed=seed, data_seed=seed)
                rows = _with_columns(train_dataset, columns, alternatives)
                adapter = copy.deepcopy(peft_config)  # PEFT writes into it
                trainer = SelectiveSFTTrainer(str(model), args, train_dataset=rows, peft_config=adapter)
                train_quietly(trainer, f"{name}, seed {seed}", last_checkpoint(weights))
                trainer.save_model(str(weights))
                write_values(str(weights), folder)
            write_json(folder / _NOTES, {"steps": trainer.state.global_step, "log": trainer.state.log_history})
            if not keep_models:
                remove(weights)
            return f"{trainer.state.global_step} steps"

        every = {
            "settings": known,
            "columns": columns,
            "seed": seed,
            "adapter": lora,
            "keep": keep_models,
            **measured,
        }
        return Stage(f"{name}-seed{seed}", every, inputs, work, root)

    def model_stage(name: str, source: str) -> Stage:
        inputs: dict[str, Stage | str] = {"model": model_source(source), "eval": content["eval"]}

        def work(folder: Path) -> None:
            with quiet():
                write_values(source, folder)

        return Stage(name, measured, inputs, work, root)

    stages = {name: [model_stage(name, str(source))] for name, source in untrained.items()}
    stages |= {name: [arm_stage(name, seed) for seed in seeds] for name in arms}
    # Seed by seed, so that a comparison that is cut off has whole pairs
    trained = [stages[name][index] for index in range(len(seeds)) for name in arms]
    execute(
        [*(stages[name][0] for name in untrained), *trained],
        root,
        {"arms": list(arms), "seeds": list(seeds)},
        echo=echo,
    )
    folders = {name: [stage.folder for stage in each] for name, each in stages.items()}
    _check_steps({name: [read_json(folder / _NOTES)["steps"] for folder in folders[name]] for name in arms})
    values = {name: _stacked(each) for name, each in folders.items()}
    groups = (
        None if group_column is None else np.unique(list(map(str, eval_dataset[group_column])), return_inverse=True)[1]
    )
    return ArmComparison(baseline, tuple(seeds), values, groups, folders)


def _check(
    arms: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    baseline: str,
    seeds: Sequence[int],
    train: Dataset,
    held_out: Dataset,
    group_column: str | None,
    names: Sequence[str],
) -> None:
    if not arms or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"arms={list(arms)}, seeds={list(seeds)}: give at least one of each, and each seed once")
    if bad := [name for name in names if not NAME.fullmatch(name) or names.count(name) > 1]:
        raise InputError(f"arms: {bad[0]!r} must be a name of letters, digits, '_' and '.', and given once")
    if baseline not in arms:
        raise InputError(f"baseline={baseline!r} is none of the arms: {', '.join(arms)}")
    if taken := sorted(SET_HERE & set(shared)):
        raise InputError(f"settings: {taken[0]!r} is set for each arm; use output_dir and seeds")
    for name, changes in arms.items():
        if own := sorted((SHARED | SET_HERE) & set(changes)):
            raise InputError(f"arms: {own[0]!r} of {name!r} would change rows, order or steps: move it to settings")
        for column in filter(None, dict(changes.get("columns", {})).values()):
            if column not in train.column_names:
                raise InputError(f"arms: column {column!r} of {name!r} is not in train_dataset: {train.column_names}")
    if group_column is not None and group_column not in held_out.column_names:
        raise InputError(f"group_column={group_column!r} is not in eval_dataset: {held_out.column_names}")


def _with_columns(rows: Dataset, columns: Mapping[str, str | None], alternatives: set[str | None]) -> Dataset:
    """The rows as an arm reads them: each name of `columns` holds another column, or is gone; `alternatives` that it
    has not chosen are gone, too."""
    chosen = {name: source for name, source in columns.items() if source is not None}
    kept = [name for name in rows.column_names if name not in columns and name not in alternatives]
    table = rows.select_columns([*kept, *dict.fromkeys(chosen.values())])
    return table.rename_columns({source: name for name, source in chosen.items()})


def _content_sha256(rows: Dataset) -> str:
    digest = hashlib.sha256(json.dumps(sorted(rows.column_names)).encode())
    for batch in rows.with_format(None).iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """JSON values, with sets in order: the key of a stage must not change with the order of a hash table."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value


def _check_steps(steps: dict[str, list[int]]) -> None:
    if len(set(map(tuple, steps.values()))) > 1:
        shown = ", ".join(f"{name} {counts}" for name, counts in steps.items())
        raise InputError(f"the arms took different numbers of steps ({shown}), so they cannot be compared")


def _stacked(folders: Sequence[Path]) -> dict[str, np.ndarray]:
    tables = [pq.read_table(folder / _ROWS).to_pydict() for folder in folders]
    return {measure: np.stack([np.array(table[measure], float) for table in tables]) for measure in tables[0]}
