"""Which stages a recipe has, what each reads, and the command that does its work.

Heavy stages are the commands `train`, `score` and `evaluate` on a `config.yaml` in the stage's folder, so that any of
them can be run again by hand, and several GPUs are `accelerate launch`'s business as ever. Rejected: calling trainers
in one process, where the memory and the settings of one stage reach into the next.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from trl import DatasetMixtureConfig

from ..data.loading import DataSource, load_rows
from ..errors import InputError, input_errors
from ..evaluation.settings import METRICS
from ..report.run import write_report
from ..selection.select import SELECTED, select
from ..training.checkpoints import last_checkpoint
from ..workflow.child import run_child
from ..workflow.run import execute
from ..workflow.stage import Stage, data_source, model_source
from .recipe import FORGET, SELECTION, SILENT, Recipe
from .split import split

Run = Callable[[str, list[str]], None]
# Known by their content, and only to the stage `split`
_SOURCES = {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "datasets", "streaming"}
_NAMES = {"model_name_or_path", "model_revision", "reference_model", "base_model_name_or_path"}


def run_command(command: str, argv: list[str]) -> None:
    """Run `selsft COMMAND` in a process of its own, which ends with this one."""
    status = run_child([sys.executable, "-m", "selsft.cli", command, *argv])
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if status:
        raise InputError(f"selsft {command} ended in status {status} (its message is above)")


class Plan:
    """The stages of one recipe, in the order in which they run.

    Args:
        root: folder of the run.
        run: runs a command; tests run it in their own process.
    """

    def __init__(self, recipe: Recipe, root: Path, run: Run = run_command):
        self.recipe, self.root, self.run = recipe, root, run
        self.stages: list[Stage] = []
        self.model: str = recipe.get("model_name_or_path", "")
        self.score = recipe.score
        self.trained: Stage | None = None
        self._build()

    def _build(self) -> None:
        recipe = self.recipe
        settings = recipe.split
        world = self._world() if "world" in recipe.stages else None
        self._model_inputs: dict[str, Stage | str] = (
            {"model": world} if world else {"model": model_source(self.model, recipe.get("model_revision"))}
        )
        parts = self._split(world)
        given = recipe.get("reference_model", stage="score")
        if given and settings.parts == 1:
            self.reference: Stage | str | None = given
            reference_inputs = {"reference": given if given == "base" else model_source(given)}
        elif self.score in ("random", "oracle"):
            self.reference, reference_inputs = None, {}
        elif settings.parts == 1:
            self.reference = self._train("reference", parts, "reference", {})
            reference_inputs = {"reference": self.reference}
        if settings.parts > 1:
            self._self_evolving(parts, settings.parts)
        elif self.score == "influence":
            scored = self._score("score", parts, "train", self.reference, reference_inputs)
            chosen = self._select("select", scored)
            self.trained = self._train("train", chosen, SELECTED, {})
        else:
            extra = {} if self.reference is None else {"reference_model": self.reference}
            self.trained = self._train("train", parts, "train", extra, reference_inputs, online=True)
        self._evaluate("evaluate-base", None, parts)
        if isinstance(self.reference, Stage) and settings.parts == 1:
            self._evaluate("evaluate-reference", self.reference, parts)
        self._evaluate("evaluate-trained", self.trained, parts)

    def execute(
        self, overrides: list[str], from_stage: str | None = None, echo: Callable[[str], None] = print
    ) -> None:
        """Run all stages that are not finished, and write the report (`workflow.run.execute`).

        Args:
            overrides: of the recipe, for the record.
        """
        recipe = self.recipe
        about = {
            "recipe": recipe.name,
            "overrides": overrides,
            "flags": recipe.common,
            "stage_flags": recipe.stages,
        }
        execute(self.stages, self.root, about, from_stage=from_stage, report=write_report, echo=echo)

    def commands(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Kind of stage, command and flags of everything that this run starts, for whoever can check flags."""
        for kind, command in (
            ("reference", "train"),
            ("score", "score"),
            ("train", "train"),
            ("evaluate", "evaluate"),
        ):
            if any(stage.name.split("-")[0] == kind for stage in self.stages):
                flags = {key: value for key, value in self.recipe.flags(kind).items() if value is not None}
                flags.pop("datasets", None)
                yield kind, command, {**flags, "output_dir": "unused"}

    def _self_evolving(self, parts: Stage, count: int) -> None:
        """Token Cleaning (2502.01968): the model of part t-1 is the reference of part t, and where its training
        starts; scores compare it with the base."""
        if self.score != "influence":
            raise InputError(
                f"score={self.score!r} with split.parts={count}: self-evolving selection uses 'influence'"
            )
        model = self._train("train-1", parts, "train-1", {}, merge=True)
        for number in range(2, count + 1):
            scored = self._score(f"score-{number}", parts, f"train-{number}", model, {"reference": model})
            chosen = self._select(f"select-{number}", scored)
            model = self._train(f"train-{number}", chosen, SELECTED, {}, start=model, merge=True)
        self.reference, self.trained = None, model

    def _add(self, name: str, settings: dict[str, Any], inputs: dict[str, Stage | str], work) -> Stage:
        silent = SILENT | _NAMES | (set() if name == "split" else _SOURCES)
        settings = {key: value for key, value in settings.items() if key not in silent}
        stage = Stage(name, settings, inputs, work, self.root)
        self.stages.append(stage)
        return stage

    def _world(self) -> Stage:
        """The demo's facts and base model, made on the spot."""
        from ..demo.files import write_world

        flags = self.recipe.flags("world")

        def work(folder: Path) -> None:
            write_world(folder, **flags)

        stage = self._add("world", flags, {}, work)
        self.model = str(stage.folder / "base")
        return stage

    def _split(self, world: Stage | None) -> Stage:
        recipe, settings = self.recipe, self.recipe.split
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
        given = {"reference": settings.reference_dataset, "eval": settings.eval_dataset}
        if settings.reference_size or settings.reference_dataset:
            given["replay"] = settings.replay_dataset
        given = {name: path for name, path in given.items() if path}
        if world is None:
            inputs |= {name: data_source(str(path)) for name, path in given.items()}
        train_split = recipe.get("dataset_train_split", "train")
        mixture = DatasetMixtureConfig(datasets=recipe.get("datasets") or [])

        def work(folder: Path) -> str:
            with input_errors():
                data = load_rows(DataSource(sources["data"], sources["config"], train_split, mixture=mixture))
                others = {name: load_rows(DataSource(path)) for name, path in given.items()}
                counts = split(data, settings, others, folder)
            return ", ".join(f"{name} {count:,}" for name, count in counts.items())

        flags = {**vars(settings), "dataset_config": sources["config"], "dataset_train_split": train_split}
        for name in given:  # known by their content
            flags.pop(f"{name}_dataset")
        return self._add("split", flags, inputs, work)

    def _train(
        self,
        name: str,
        data: Stage,
        file: str,
        extra: dict[str, Any],
        inputs: dict[str, Stage | str] | None = None,
        *,
        start: Stage | None = None,
        online: bool = False,
        merge: bool = False,
    ) -> Stage:
        """A stage that trains a model: the reference, or the model itself.

        Args:
            start: stage whose model training starts from; the base of the run when `None`.
            online: whether the trainer selects tokens by itself.
            merge: whether an adapter is merged into its base afterwards.
        """
        kind = name.split("-")[0]
        flags = {key: value for key, value in self.recipe.flags(kind).items() if key not in _SOURCES}
        dropped = SELECTION | {"reference_model", "reference_model_init_kwargs", "precompute_scores"}
        if not online:
            flags = {key: value for key, value in flags.items() if key not in dropped}
        if kind == "reference" or file.startswith("train-1"):
            flags = {key: value for key, value in flags.items() if key not in FORGET}
        path = data.folder / (file if file.endswith(".parquet") else f"{file}.parquet")
        everything: dict[str, Stage | str] = {"data": data, **(inputs or {}), **self._model_inputs}
        if start is not None:
            everything["start"] = start
        merge = merge and bool(self.recipe.get("use_peft", stage=kind))

        def work(folder: Path) -> None:
            references = {key: _model_of(value) for key, value in extra.items()}
            config = {
                **flags,
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

        return self._add(name, flags, everything, work)

    def _score(
        self,
        name: str,
        data: Stage,
        file: str,
        reference: Stage | str | None,
        inputs: dict[str, Stage | str],
    ) -> Stage:
        flags = {key: value for key, value in self.recipe.flags("score").items() if key not in _SOURCES}

        def work(folder: Path) -> None:
            config = {
                **flags,
                "model_name_or_path": self.model,
                "reference_model": _model_of(reference),
                "dataset_name": str(data.folder / f"{file}.parquet"),
                "output_dir": str(folder / "scored"),
                "scored_dir": str(folder / "scored"),
            }
            self.run("score", ["--config", _write_config(folder, config)])

        return self._add(name, flags, {"data": data, **inputs, **self._model_inputs}, work)

    def _select(self, name: str, scored: Stage) -> Stage:
        flags = self.recipe.flags("select")
        flags.pop("score", None)
        forget = self.recipe.flags("train")
        options: dict[str, Any] = {key: forget[key] for key in ("forget_weight", "forget_objective") if key in forget}
        # Only whether negatives are ignored, and whether npo needs their start, changes the file
        settings = {
            **flags,
            "ignore": options.get("forget_weight") == 0,
            "base_logps": options.get("forget_objective") == "npo",
        }

        def work(folder: Path) -> str:
            with input_errors():
                rows = load_rows(DataSource(str(scored.folder / "scored")))
            found = select(rows, self.model, {**flags, **options}, folder, self.recipe.get("trust_remote_code", False))
            trained = max(found["trained"], 1)
            shares = ", ".join(f"{k} {found[k] / trained:.1%}" for k in ("positive", "neutral", "negative"))
            remark = f"{found['trained']:,} supervised tokens: {shares}"
            if found["positive"] == found["trained"]:
                remark += ". No token is negative, so training will be plain: train the reference longer"
                remark += ", or lower the threshold"
            return remark

        return self._add(name, settings, {"scored": scored}, work)

    def _evaluate(self, name: str, trained: Stage | None, data: Stage) -> None:
        flags = self.recipe.flags("evaluate")
        files = {key: flags[key] for key in ("neutral_text", "options_file", "dataset_name") if flags.get(key)}
        own_data = "dataset_name" in self.recipe.stages.get("evaluate", {})
        settings = self.recipe.split
        has_rows = own_data or settings.eval_size > 0 or settings.eval_dataset or "world" in self.recipe.stages
        if not (has_rows or files.get("neutral_text") or files.get("options_file") or flags.get("lm_eval_tasks")):
            return
        if not own_data:
            files.pop("dataset_name", None)
        inputs: dict[str, Stage | str] = {key: data_source(path) for key, path in files.items()}
        inputs |= self._model_inputs
        inputs["data"] = data
        if trained is not None:
            inputs["trained"] = trained

        def work(folder: Path) -> None:
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
                config = {key: value for key, value in config.items() if key not in _SOURCES}
                if has_rows:
                    config["dataset_name"] = str(data.folder / "eval.parquet")
            self.run("evaluate", ["--config", _write_config(folder, config)])

        kept = {key: value for key, value in flags.items() if key not in files}
        self._add(name, kept, inputs, work)


def _model_of(source: Stage | str | None) -> str:
    """Folder of the model that a stage has made."""
    if not isinstance(source, Stage):
        return source or ""
    merged = source.folder / "merged"
    return str(merged if merged.is_dir() else source.folder / "model")


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
