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

import pyarrow.parquet as pq
import yaml
from trl import DatasetMixtureConfig

from ..data.loading import DataSource, load_rows, parse_columns
from ..data.scored_folder import read_manifest
from ..errors import InputError, input_errors
from ..evaluation.settings import METRICS
from ..records import read_json, write_json
from ..report.run import write_report
from ..selection.select import SELECTED, select
from ..training.checkpoints import last_checkpoint
from ..workflow.child import run_child
from ..workflow.run import RUN, execute
from ..workflow.stage import Stage, data_source, model_source
from .arms import IGNORE, ORACLE, PLAIN, RANDOM, Arm, method_of, same_training, write_random
from .check import check
from .outlook import Outlook, outlook, reasons_to_stop
from .recipe import FORGET, OWN, POOLING, REFERENCED, SCORED, SELECTION, SILENT, Recipe
from .results import MEASURES, results
from .split import split
from .triage import write_triage

Run = Callable[[str, list[str]], None]
# Known by their content, and only to the stage `split`
_SOURCES = {
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "datasets", "streaming", "columns",
}  # fmt: skip
_NAMES = {
    "model_name_or_path", "model_revision", "reference_model", "base_model_name_or_path", "judged", "judged_test",
    "probe", "probe_clean", "noisy_reference_model",
}  # fmt: skip


class Stopped(Exception):
    """The run has ended before training, for a reason that its message gives; what was finished is kept."""


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
        self.trained: dict[str, list[Stage]] = {}  # arm -> its trainings, a stage for each seed
        if (wanted := recipe.run.headline) is not None and wanted not in MEASURES:
            raise InputError(f"headline={wanted!r} is none of the measures: {', '.join(MEASURES)}")
        self._build()

    def _build(self) -> None:
        recipe = self.recipe
        settings = recipe.split
        world = self._world() if "world" in recipe.stages else None
        self._model_inputs: dict[str, Stage | str] = (
            {"model": world} if world else {"model": model_source(self.model, recipe.get("model_revision"))}
        )
        self.parts = parts = self._split(world)
        self.checked = self._check(parts)
        given = recipe.get("reference_model", stage="score")
        self.reference: Stage | str | None = None
        self._reference_inputs: dict[str, Stage | str] = {}
        if settings.parts == 1 and self.score in REFERENCED:
            self.reference = given or self._train("reference", parts, "reference", {})
            known = given if given in (None, "base") else model_source(given)
            self._reference_inputs = {"reference": known or self.reference}
        if settings.parts > 1:
            self._self_evolving(parts, settings.parts)
            self.arms = recipe.arms
        else:
            self._arms(recipe.arms)
        if recipe.run.only_score:
            return
        self._evaluate("evaluate-base", None)
        if isinstance(self.reference, Stage):
            self._evaluate("evaluate-reference", self.reference)
        for stage in (each for stages in self.trained.values() for each in stages):
            self._evaluate(f"evaluate-{stage.name.removeprefix('train-')}", stage)

    def _arms(self, arms: list[Arm]) -> None:
        """Scores and selection once, then every arm with every seed: seed by seed, so that a run that is cut off has
        whole pairs."""
        recipe, settings = self.recipe, self.recipe.run
        self.arms = arms
        self._scored: Stage | None = None
        if self.score in SCORED:
            self._scored = self._score("score", self.parts, "train", self.reference, self._reference_inputs)
            self.selected = self._select("select", self._scored, {})
            inputs: dict[str, Stage | str] = {"selected": self.selected, "scored": self._scored}
            self._add("triage", {}, {**inputs, "check": self.checked, "split": self.parts}, self._triage)
        elif settings.only_score:
            raise InputError(
                f"only_score=true with score={self.score!r}, which is not computed beforehand: leave it out"
            )
        if settings.only_score:
            return
        first = int(recipe.get("seed", 42, "train"))
        method = method_of(arms)
        own = {arm.name: self._selection_of(arm) for arm in arms}
        for seed in range(first, first + settings.seeds):
            for arm in arms:
                stage = self._train_arm(arm, seed, own[arm.name])
                if arm is method and seed == first:
                    stage.links = {stage.name: ".", "train": "."}
                self.trained.setdefault(arm.name, []).append(stage)

    def _selection_of(self, arm: Arm) -> Stage | None:
        """The stage with the arm's own weights: the shared one unless it selects otherwise."""
        if self._scored is None or arm.kind in (PLAIN, ORACLE):
            return None
        changes = {key: value for key, value in arm.changes.items() if key in SELECTION}
        selected = self._select(f"select-{arm.name}", self._scored, changes) if changes else self.selected
        if arm.kind != RANDOM:
            return selected

        def work(folder: Path) -> str:
            with input_errors():
                count = write_random(
                    selected.folder / SELECTED, self.model, folder, 0, self.recipe.get("trust_remote_code", False)
                )
            return f"{count:,} negative tokens, drawn"

        return self._add(f"random-{arm.name}", {"seed": 0}, {"selected": selected, **self._model_inputs}, work)

    def _train_arm(self, arm: Arm, seed: int, selected: Stage | None) -> Stage:
        """The training of one arm: from the base, on the rows of `train.parquet`, whatever weights they have."""
        changes: dict[str, Any] = {key: value for key, value in arm.changes.items() if key not in SELECTION}
        changes |= {"seed": seed, "data_seed": seed}
        if arm.kind == IGNORE:
            changes["forget_weight"] = 0.0
        name, marked = f"train-{arm.name}-seed{seed}", arm.kind == ORACLE or self.score == ORACLE
        if arm.kind == PLAIN:
            return self._train(name, self.parts, "train", {}, changes=changes, kept=set())
        if arm.kind == RANDOM and selected is None:
            raise InputError(
                f"arms: {arm.name!r} deals out the weights of scored rows, which score={self.score!r} has not"
            )
        if marked:  # spans say themselves what they are; a mask needs the score that reads it
            changes["score"] = ORACLE
            return self._train(name, self.parts, "marked", {}, changes=changes, kept=FORGET | {"score"})
        if selected is not None:
            kept = {"forget_weight"} if arm.kind == IGNORE else FORGET
            return self._train(name, selected, SELECTED, {}, changes=changes, kept=kept)
        extra = {} if self.reference is None else {"reference_model": self.reference}
        changes |= {key: value for key, value in arm.changes.items() if key in SELECTION}
        file = "marked" if self.score == "given" else "train"
        return self._train(name, self.parts, file, extra, self._reference_inputs, changes=changes, kept=OWN)

    def execute(
        self, overrides: list[str], from_stage: str | None = None, echo: Callable[[str], None] = print
    ) -> None:
        """Run all stages that are not finished, and write the report (`workflow.run.execute`).

        Args:
            overrides: of the recipe, for the record.

        Raises:
            `Stopped` when the scores give no reason to train, unless `go_on`; the report says so, too.
        """
        recipe = self.recipe
        about = {
            "recipe": recipe.name,
            "overrides": overrides,
            "flags": recipe.common,
            "stage_flags": recipe.stages,
            "arms": {
                arm.name: {
                    "kind": arm.kind,
                    "changes": dict(arm.changes),
                    "train": [stage.name for stage in self.trained.get(arm.name, [])],
                }
                for arm in self.arms
            },
            "method": method_of(self.arms).name,
            "headline": recipe.run.headline,
            "score": self.score,
            "only_score": recipe.run.only_score,
        }

        def report(root: Path) -> Path:
            return write_report(root, results(root))

        def after(stage: Stage) -> None:
            if stage.name == "select":
                self._look(stage, echo)
            elif stage.name.startswith("train-") and recipe.split.parts == 1:
                seed = stage.name.rpartition("-")[2]
                done = {
                    arm: each.folder / "model"
                    for arm, stages in self.trained.items()
                    for each in stages
                    if each.name.endswith(f"-{seed}") and each.state() == "finished"
                }
                same_training(done)

        try:
            execute(self.stages, self.root, about, from_stage=from_stage, report=report, echo=echo, after=after)
        except Stopped as stopped:
            write_json(self.root / RUN, {**read_json(self.root / RUN), "stopped": str(stopped)})
            echo(f"Report: {report(self.root)}")
            raise

    def _look(self, selected: Stage, echo: Callable[[str], None]) -> None:
        """What the scores say, before any arm is trained.

        Raises:
            `Stopped` for a reason not to train, unless `go_on`.
        """
        found = Outlook.read(selected.folder)
        echo("\n".join(f"  {line}" for line in found.lines()))
        reasons = reasons_to_stop(found)
        if not reasons or self.recipe.run.only_score:
            return
        for reason in reasons:
            echo(f"  {reason}")
        if not self.recipe.get("go_on", False):
            raise Stopped(f"{reasons[0]}. Train all the same with --go_on true")

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
            chosen = self._select(f"select-{number}", scored, {})
            model = self._train(f"train-{number}", chosen, SELECTED, {}, start=model, merge=True, kept=FORGET)
        model.links = {model.name: ".", "train": "."}
        self.trained = {method_of(self.recipe.arms).name: [model]}

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
        named: dict[str, str | None] = {"reference": settings.reference_dataset, "eval": settings.eval_dataset}
        if settings.reference_size or settings.reference_dataset:
            named["replay"] = settings.replay_dataset
        named |= {"judged": recipe.get("judged"), "judged-test": recipe.get("judged_test")}
        given = {name: path for name, path in named.items() if path}
        if world is None:
            inputs |= {name: data_source(str(path)) for name, path in given.items()}
        train_split = recipe.get("dataset_train_split", "train")
        mixture = DatasetMixtureConfig(datasets=recipe.get("datasets") or [])
        columns, text = parse_columns(recipe.get("columns")), recipe.get("dataset_text_field", "text")

        def work(folder: Path) -> str:
            with input_errors():
                data = load_rows(
                    DataSource(sources["data"], sources["config"], train_split, mixture=mixture, columns=columns), text
                )
                others = {}
                for name, path in given.items():
                    try:
                        others[name] = _load(path, columns, text)
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
        return self._add("split", flags, inputs, work)

    def _check(self, parts: Stage) -> Stage:
        """Reads every row as training will, before anything expensive."""
        flags = {key: value for key, value in self.recipe.flags("check").items() if key not in _SOURCES}

        def work(folder: Path) -> str:
            with input_errors():
                return check(parts.folder, self.model, flags, folder)

        return self._add("check", flags, {"split": parts, **self._model_inputs}, work)

    def _triage(self, folder: Path) -> str:
        assert self._scored is not None
        flags = {key: value for key, value in self.recipe.flags("select").items() if key in SELECTION}
        with input_errors():
            return write_triage(
                self.selected.folder, self._scored.folder, self.checked.folder, self.parts.folder, folder, self.model,
                flags,
            )  # fmt: skip

    def _train(
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
        flags = {**self.recipe.flags(kind), **(changes or {})}
        flags = {key: value for key, value in flags.items() if key not in _SOURCES | (OWN - set(kept))}
        if "reference_model" in kept:  # known as an input, or there is none
            flags.pop("reference_model", None)
        path = data.folder / (file if file.endswith(".parquet") else f"{file}.parquet")
        everything: dict[str, Stage | str] = {"data": data, **(inputs or {}), **self._model_inputs}
        if start is not None:
            everything["start"] = start
        merge = merge and bool(self.recipe.get("use_peft", stage=kind))

        def work(folder: Path) -> None:
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
        settings = self.recipe.split
        judged = bool(self.recipe.get("judged") or settings.judged_fraction)
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

        return self._add(name, flags, {"data": data, **inputs, **self._model_inputs}, work)

    def _select(self, name: str, scored: Stage, changes: dict[str, Any]) -> Stage:
        """Scores to weights, the same for all arms: an arm that ignores treats negative tokens as neutral itself."""
        flags = {**self.recipe.flags("select"), **changes}
        if {"negative_threshold", "positive_fraction"} <= {key for key, value in flags.items() if value is not None}:
            other = {"negative_threshold", "positive_fraction"} - set(changes)
            if len(other) == 1:  # the arm's own rule in the place of the recipe's
                flags.pop(other.pop())
        train = self.recipe.flags("train")
        npo = [train.get("forget_objective"), *(arm.changes.get("forget_objective") for arm in self.recipe.arms)]
        settings = {**flags, "base_logps": "npo" in npo}  # which compares with the start

        def work(folder: Path) -> str:
            chosen = read_manifest(scored.folder / "scored").get("selection") or {}
            rule = flags.get("negative_threshold") is not None or flags.get("positive_fraction") is not None
            if not rule and chosen.get("target_precision") is not None and chosen["negative_threshold"] is None:
                raise Stopped(
                    f"{chosen['threshold']} (score={chosen['score']}). Judge more rows, try another --score or "
                    "--score_pooling, lower --target_precision, or set --negative_threshold yourself"
                )
            with input_errors():
                found = select(
                    scored.folder / "scored", self.model, flags, folder, "npo" in npo,
                    self.recipe.get("trust_remote_code", False),
                )  # fmt: skip
                outlook(folder, scored.folder / "scored", self.model, flags)
            trained = max(found["trained"], 1)
            shares = ", ".join(f"{k} {found[k] / trained:.1%}" for k in ("positive", "neutral", "negative"))
            return f"{found['trained']:,} supervised tokens: {shares}"

        return self._add(name, settings, {"scored": scored}, work)

    def _evaluate(self, name: str, trained: Stage | None) -> None:
        flags, data = self.recipe.flags("evaluate"), self.parts
        names = ("neutral_text", "options_file", "dataset_name", "lm_eval_include")
        files = {key: flags[key] for key in names if flags.get(key)}
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


def _load(path: str, columns: dict[str, str], text: str) -> Any:
    """Rows of another file than the data, whose columns may be called as there, or as training calls them."""
    try:
        return load_rows(DataSource(path, columns=columns), text)
    except InputError:
        if not columns:
            raise
        return load_rows(DataSource(path), text)


def _train_flags(flags: dict[str, Any], path: Path) -> dict[str, Any]:
    """Flags without a score that the rows do not ask for: spans and weights say themselves what they are."""
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
