"""How each stage of a run is made: the settings and inputs that name its folder, and the work that fills it.

Heavy stages are commands (`train`, `score`, `evaluate`) on a `config.yaml` in the stage's folder, so that any of them
can be run again by hand, and several GPUs are `accelerate launch`'s business as ever. Libraries are imported where
the work is done: a plan is printed without them. Rejected: calling trainers in one process, where the memory and the
settings of one stage reach into the next.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, input_errors
from ..workflow.child import run_child
from ..workflow.stage import Stage, data_source, model_source
from .arms import ORACLE, write_random
from .flags import NAMES, OWN, POOLING, RULES, SILENT, SOURCES
from .recipe import Recipe

Run = Callable[[str, list[str]], None]


class Stopped(Exception):
    """The run has ended before training, for a reason that its message gives; what was finished is kept."""


def run_command(command: str, argv: list[str]) -> None:
    """Run `selsft COMMAND` in a process of its own, which ends with this one."""
    status = run_child([sys.executable, "-m", "selsft.cli", command, *argv])
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if status:
        raise InputError(f"selsft {command} ended in status {status} (its message is above)")


class Stages:
    """Makes the stages of one recipe, and keeps them in the order in which they are made.

    Args:
        root: folder of the run.
        run: runs a command; tests run it in their own process.

    Attributes:
        all: the stages.
        model: folder or id of the model that training starts from.
    """

    def __init__(self, recipe: Recipe, root: Path, run: Run):
        self.recipe, self.root, self.run = recipe, root, run
        self.all: list[Stage] = []
        self.model: str = recipe.get("model_name_or_path", "")
        self.made = self.world() if "world" in recipe.stages else None
        self.model_inputs: dict[str, Stage | str] = {
            "model": self.made or model_source(self.model, recipe.get("model_revision"))
        }

    def add(self, name: str, settings: dict[str, Any], inputs: dict[str, Stage | str], work) -> Stage:
        silent = SILENT | NAMES | (set() if name == "split" else SOURCES)
        settings = {key: value for key, value in settings.items() if key not in silent}
        stage = Stage(name, settings, inputs, work, self.root)
        self.all.append(stage)
        return stage

    def world(self) -> Stage:
        """The demo's facts and base model, made on the spot."""
        flags = self.recipe.flags("world")

        def work(folder: Path) -> None:
            from ..demo.files import write_world

            write_world(folder, **flags)

        stage = self.add("world", flags, {}, work)
        self.model = str(stage.folder / "base")
        return stage

    def split(self) -> Stage:
        recipe, settings, world = self.recipe, self.recipe.split, self.made
        sources: dict[str, Any] = {"data": recipe.get("dataset_name"), "config": recipe.get("dataset_config")}
        inputs: dict[str, Stage | str] = {}
        if world is not None:
            inputs["world"] = world
            sources["data"] = str(world.folder / "train.jsonl")
            settings.reference_dataset = str(world.folder / "reference.jsonl")
            settings.eval_dataset = str(world.folder / "eval.jsonl")
        elif recipe.get("datasets"):
            inputs["data"] = yaml.safe_dump(recipe.get("datasets"))
        else:
            inputs["data"] = data_source(sources["data"])
        named: dict[str, str | None] = {"reference": settings.reference_dataset, "eval": settings.eval_dataset}
        if settings.reference_size or settings.reference_dataset:
            named["replay"] = settings.replay_dataset
        named |= {"judged": recipe.get("judged"), "judged-test": recipe.get("judged_test")}
        given = {name: path for name, path in named.items() if path}
        if world is None:
            inputs |= {name: data_source(str(path)) for name, path in given.items()}
        train_split = recipe.get("dataset_train_split", "train")
        columns, text = recipe.columns, recipe.get("dataset_text_field", "text")

        def work(folder: Path) -> str:
            from trl import DatasetMixtureConfig

            from ..data.loading import DataSource, load_rows
            from .split import check_every_mark, split

            mixture = DatasetMixtureConfig(datasets=recipe.get("datasets") or [])
            with input_errors():
                data = load_rows(
                    DataSource(sources["data"], sources["config"], train_split, mixture=mixture, columns=columns), text
                )
                check_every_mark(data, text)
                others = {}
                for name, path in given.items():
                    try:
                        others[name] = _load(path, columns, text)
                        check_every_mark(others[name], text)
                    except InputError as error:
                        raise InputError(f"{name} rows: {error}") from error
                counts = split(data, settings, others, folder)
            return ", ".join(f"{name} {count:,}" for name, count in counts.items())

        flags = {**vars(settings), "dataset_config": sources["config"], "dataset_train_split": train_split}
        flags |= {"columns": columns or None, "text": None if text == "text" else text}
        for name in ("reference", "eval"):  # known by their content
            if name in given:
                flags.pop(f"{name}_dataset")
        flags.pop("replay_dataset")
        return self.add("split", flags, inputs, work)

    def check(self, parts: Stage) -> Stage:
        """Reads every row as training will, before anything expensive."""
        flags = {key: value for key, value in self.recipe.flags("check").items() if key not in SOURCES}

        def work(folder: Path) -> str:
            from .check import check

            with input_errors():
                return check(parts.folder, self.model, flags, folder)

        return self.add("check", flags, {"split": parts, **self.model_inputs}, work)

    def triage(self, selected: Stage, scored: Stage, checked: Stage, parts: Stage) -> Stage:
        """The scored rows as a table of the user's own."""
        flags = {key: value for key, value in self.recipe.flags("select").items() if key in POOLING | {"score"}}

        def work(folder: Path) -> str:
            from .triage import write_triage

            with input_errors():
                return write_triage(
                    selected.folder, scored.folder, checked.folder, parts.folder, folder, self.model, flags
                )

        inputs: dict[str, Stage | str] = {"selected": selected, "scored": scored, "check": checked, "split": parts}
        return self.add("triage", {}, inputs, work)

    def deal_out(self, name: str, selected: Stage) -> Stage:
        """The weights of a selection, dealt out by chance."""

        def work(folder: Path) -> str:
            from ..selection.select import SELECTED

            with input_errors():
                count = write_random(
                    selected.folder / SELECTED, self.model, folder, 0, self.recipe.get("trust_remote_code", False)
                )
            return f"{count:,} negative tokens, drawn"

        return self.add(name, {"seed": 0}, {"selected": selected, **self.model_inputs}, work)

    def train(
        self,
        name: str,
        data: Stage,
        file: str,
        extra: dict[str, Any],
        inputs: dict[str, Stage | str] | None = None,
        *,
        start: Stage | None = None,
        merge: bool = False,
        changes: dict[str, Any] | None = None,
        kept: set[str] | frozenset[str] = frozenset(),
    ) -> Stage:
        """A stage that trains a model: the reference, or an arm.

        Args:
            start: stage whose model training starts from; the base of the run when `None`.
            merge: whether an adapter is merged into its base afterwards.
            changes: flags in which it differs from the recipe.
            kept: of the settings that selsft adds to TRL's, those that mean something here.
        """
        kind = name.split("-")[0]
        flags = with_own_rule(self.recipe.flags(kind), changes or {})
        flags = {key: value for key, value in flags.items() if key not in SOURCES | (OWN - set(kept))}
        if "reference_model" in kept:  # known as an input, or there is none
            flags.pop("reference_model", None)
        path = data.folder / f"{file}.parquet"
        everything: dict[str, Stage | str] = {"data": data, **(inputs or {}), **self.model_inputs}
        if start is not None:
            everything["start"] = start
        merge = merge and bool(self.recipe.get("use_peft", stage=kind))

        def work(folder: Path) -> None:
            from ..training.checkpoints import last_checkpoint

            references = {key: _model_of(value) for key, value in extra.items()}
            config = {
                **_train_flags(flags, path),
                **references,
                "model_name_or_path": _model_of(start) if start else self.model,
                "dataset_name": str(path),
                "output_dir": str(folder / "model"),
            }
            argv = ["--config", _write_config(folder, config)]
            if (folder / "model").is_dir():
                if last_checkpoint(folder / "model"):
                    argv += ["--resume_from_checkpoint", "true"]
                else:  # cut off before the first checkpoint: nothing to go on from
                    shutil.rmtree(folder / "model")
            self.run("train", argv)
            if merge:
                merge_adapter(folder / "model", folder / "merged", bool(config.get("trust_remote_code")))

        return self.add(name, flags, everything, work)

    def score(
        self,
        name: str,
        data: Stage,
        file: str,
        reference: Stage | str | None,
        inputs: dict[str, Stage | str],
    ) -> Stage:
        flags = {key: value for key, value in self.recipe.flags("score").items() if key not in SOURCES}
        settings = self.recipe.split
        judged = self._judged
        if judged or self.score == "probe":  # what a probe and a threshold are fitted for
            flags |= {key: value for key, value in self.recipe.flags("select").items() if key in POOLING}
        tested = judged and bool(settings.judged_test_size or self.recipe.get("judged_test"))
        external = {key: flags[key] for key in ("probe", "probe_clean", "noisy_reference_model") if flags.get(key)}
        for key, path in external.items():
            inputs = {**inputs, key: model_source(path) if key != "probe_clean" else data_source(path)}

        def work(folder: Path) -> None:
            rows = {"judged": judged and "judged.parquet", "judged_test": tested and "judged-test.parquet"}
            config = {
                **flags,
                **external,
                **{key: str(data.folder / path) if path else None for key, path in rows.items()},
                "model_name_or_path": self.model,
                "reference_model": _model_of(reference) or None,
                "dataset_name": str(data.folder / f"{file}.parquet"),
                "output_dir": str(folder / "scored"),
                "scored_dir": str(folder / "scored"),
            }
            self.run("score", ["--config", _write_config(folder, config)])

        return self.add(name, flags, {"data": data, **inputs, **self.model_inputs}, work)

    def select(self, name: str, scored: Stage, changes: dict[str, Any]) -> Stage:
        """Scores to weights, the same for all arms: an arm that ignores treats negative tokens as neutral itself."""
        flags = with_own_rule(self.recipe.flags("select"), changes)
        if (target := flags.get("target_precision")) is not None and not self._judged:
            raise InputError(
                f"target_precision={target} without judged rows: give --judged FILE or --split.judged_fraction"
            )
        training = [self.recipe.flags("train"), *(arm.changes for arm in self.recipe.arms)]
        start = any(each.get("forget_objective") == "npo" or each.get("anchor_weight") for each in training)
        settings = {**flags, "base_logps": start}  # with which these compare

        def work(folder: Path) -> str:
            from ..evaluation.judging import choose_threshold
            from ..selection.select import select
            from .outlook import outlook

            place, options = scored.folder / "scored", dict(flags)
            chosen: dict[str, Any] = {}
            with input_errors():
                if (target := options.pop("target_precision", None)) is not None:
                    chosen, threshold = choose_threshold(place, target)
                    if threshold.negative_threshold is None:
                        raise Stopped(
                            f"{threshold} (score={self.recipe.score}). Judge more rows, try another --score or "
                            "--score_pooling, lower --target_precision, or set --negative_threshold yourself"
                        )
                    options["negative_threshold"] = threshold.negative_threshold
                found = select(place, self.model, options, folder, start, self.recipe.get("trust_remote_code", False))
                outlook(folder, place, self.model, options, chosen)
            trained = max(found["trained"], 1)
            shares = ", ".join(f"{k} {found[k] / trained:.1%}" for k in ("positive", "neutral", "negative"))
            return f"{found['trained']:,} supervised tokens: {shares}"

        return self.add(name, settings, {"scored": scored}, work)

    @property
    def _judged(self) -> bool:
        return bool(self.recipe.get("judged") or self.recipe.split.judged_fraction)

    def evaluate(self, name: str, data: Stage, trained: Stage | None) -> Stage | None:
        """The metrics of a model, of the base without one; `None` where there is nothing to evaluate on."""
        flags = self.recipe.flags("evaluate")
        names = ("neutral_text", "options_file", "dataset_name", "lm_eval_include")
        files = {key: flags[key] for key in names if flags.get(key)}
        own_data = "dataset_name" in self.recipe.stages.get("evaluate", {})
        settings = self.recipe.split
        has_rows = own_data or settings.eval_size > 0 or settings.eval_dataset or "world" in self.recipe.stages
        if not (has_rows or files.get("neutral_text") or files.get("options_file") or flags.get("lm_eval_tasks")):
            return None
        if not own_data:
            files.pop("dataset_name", None)
        inputs: dict[str, Stage | str] = {key: data_source(path) for key, path in files.items()}
        inputs |= self.model_inputs
        inputs["data"] = data
        if trained is not None:
            inputs["trained"] = trained

        def work(folder: Path) -> None:
            from ..evaluation.settings import METRICS

            if (folder / "evaluation" / METRICS).exists():  # finished, and cut off before the stage said so
                shutil.rmtree(folder / "evaluation")
            config = {
                **flags,
                "model_name_or_path": _model_of(trained) if trained else self.model,
                "output_dir": str(folder / "evaluation"),
                "evaluation_dir": str(folder / "evaluation"),
            }
            if trained is not None and not (Path(_model_of(trained)) / "adapter_config.json").is_file():
                config["base_model_name_or_path"] = self.model
            if not own_data:
                config = {key: value for key, value in config.items() if key not in SOURCES}
                if has_rows:
                    config["dataset_name"] = str(data.folder / "eval.parquet")
            self.run("evaluate", ["--config", _write_config(folder, config)])

        kept = {key: value for key, value in flags.items() if key not in files}
        return self.add(name, kept, inputs, work)


def with_own_rule(flags: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Flags with an arm's changes, whose rule of selection takes the place of the recipe's."""
    own = {rule for rule in RULES if changes.get(rule) is not None}
    return {key: value for key, value in flags.items() if not own or key not in RULES} | dict(changes)


def _model_of(source: Stage | str | None) -> str:
    """Folder of the model that a stage has made."""
    if not isinstance(source, Stage):
        return source or ""
    merged = source.folder / "merged"
    return str(merged if merged.is_dir() else source.folder / "model")


def _load(path: str, columns: dict[str, str], text: str) -> Any:
    """Rows of another file than the data, whose columns may be called as there, or as training calls them."""
    from ..data.loading import DataSource, load_rows

    try:
        return load_rows(DataSource(path, columns=columns), text)
    except InputError:
        if not columns:
            raise
        return load_rows(DataSource(path), text)


def _train_flags(flags: dict[str, Any], path: Path) -> dict[str, Any]:
    """Flags without a score that the rows do not ask for: spans and weights say themselves what they are."""
    import pyarrow.parquet as pq

    if flags.get("score") != ORACLE or "negative_mask" in pq.read_schema(path).names:
        return flags
    return {key: value for key, value in flags.items() if key != "score"}


def _write_config(folder: Path, flags: dict[str, Any]) -> str:
    """The flags of a stage's command, as a file that can be run again by hand."""
    path = folder / "config.yaml"
    text = yaml.safe_dump({key: value for key, value in flags.items() if value is not None}, sort_keys=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def merge_adapter(adapter: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Save the model that an adapter makes of its base, as a model of its own."""
    from ..evaluation.load import load_model

    shutil.rmtree(target, ignore_errors=True)
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model, tokenizer = load_model(str(adapter), {"trust_remote_code": trust_remote_code})
    model.merge_and_unload().save_pretrained(temporary)  # type: ignore[operator]
    tokenizer.save_pretrained(temporary)
    temporary.rename(target)
