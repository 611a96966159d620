"""The study: base -> fine-tuned -> forgotten for each task, method and seed, everything scored on everything.

Each model is a stage of `workflow.run`. An interrupted stage starts anew: seeds belong to the stage and weights pass
from one to the next through the disk, so the tables are the same. Where there is a finished stage of other settings, a
study asks for `recompute`, since a changed flag can cost hours; the old folder stays in any case.

    study.json                   settings, versions, tasks, model, stages
    examples.parquet             the questions
    stages/<model>-<key>/        what came of a model: scores.parquet, hidden/, notes.json, stage.json
    scores/<model>.parquet       a link to its rows of the score table
    hidden/<model>/              a link to its hidden states
    models/<model>/              its weights, while a stage to come starts from them
    tables/, report.html         made from all of it

Rejected: checkpoints within a stage, which takes minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoConfig

from ..errors import InputError
from ..evaluation.options import count_tokens, model_max_length, score_options
from ..records import json_sha256, read_json, remove, replaced_folder, write_json
from ..training.model import Model
from ..workflow.quiet import quiet
from ..workflow.run import check_folder, execute
from ..workflow.stage import Stage, model_source
from . import train as training
from .config import StudyConfig
from .plan import StudyModel, evaluations, keeps_states, scoring_settings, study_models, training_settings
from .scoring import save_states, score_table, write_examples
from .suite import load_task
from .table import RANDOM_LABELS, write_scores
from .tasks import SkillTask, prepare, rng

MANIFEST = "study.json"


class Study:
    """Tasks, tokenizer and stages of a study; `run` does what is left to do.

    Args:
        echo: shows a line.

    Raises:
        `ValueError` or `OSError` for tasks, a model or a folder that cannot be used.
    """

    def __init__(self, config: StudyConfig, echo: Callable[[str], None] = print):
        self.config, self.echo, self.path = config, echo, Path(config.output_dir)
        check_folder(self.path, MANIFEST)
        source = None if config.tasks_dir is None else Path(config.tasks_dir)
        if source is not None and not source.is_dir():
            raise ValueError(f"tasks_dir={config.tasks_dir!r} is not a folder")
        self.tasks: dict[str, SkillTask] = {}
        for name in config.task_list:
            loaded = load_task(name, source, config.test_fraction, config.data_seed)
            self.tasks[name] = prepare(loaded, config.task_settings())
        self.tokenizer = training.load_tokenizer(config)
        model = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        self.max_length = config.max_length or model_max_length(model)
        layers = model.get_text_config().num_hidden_layers + 1
        if config.hidden_states != "none" and not -layers <= config.hidden_layer < layers:
            raise ValueError(
                f"hidden_layer={config.hidden_layer}: the model has {layers} hidden states, so use {-layers} to "
                f"{layers - 1}, or hidden_states='none'"
            )
        self.fingerprints = {name: task.fingerprint() for name, task in self.tasks.items()}
        self.source = model_source(config.model_name_or_path)
        self.models = study_models(config)
        self.stages: dict[str, Stage] = {}
        for made in self.models:
            self.stages[made.name] = self._stage(made)

    def _stage(self, model: StudyModel) -> Stage:
        settings = {
            "training": training_settings(self.config, model, self.fingerprints),
            "scoring": scoring_settings(self.config, model, self.fingerprints),
        }
        links = {f"scores/{model.name}.parquet": "scores.parquet", f"hidden/{model.name}": "hidden"}
        if model.parent is None:
            links["examples.parquet"] = "examples.parquet"
        inputs = {"model": self.source if model.parent is None else self.stages[model.parent.name]}
        return Stage(model.name, settings, inputs, lambda folder: self._work(model, folder), self.path, links)

    def dry_run(self) -> None:
        """Print every stage with the tokens that it trains on and scores."""
        self._describe_tasks()
        config = self.config
        sizes: dict[tuple[str, str, bool], int] = {}
        lengths = {
            name: sum(len(row["input_ids"]) for row in self._gold_rows(name)) / len(task.train)
            for name, task in self.tasks.items()
        }
        totals = [0, 0]
        for number, model in enumerate(self.models, 1):
            rows = {name: len(self.tasks[name].train) for name in model.tasks}
            kept = []
            if model.kind == "forgotten":
                kept = training.retained(config, self.tasks, model.label_task, model.seed)
            mean = sum(lengths[name] for name in config.retain_task_names) / max(1, len(config.retain_task_names))
            once = sum(lengths[name] * count for name, count in rows.items()) + mean * len(kept)
            trained = round(model.epochs * once)
            for key in evaluations(config, model):
                if key not in sizes:
                    name, split, states = key
                    examples = self.tasks[name].split(split)
                    sizes[key] = count_tokens(self.tokenizer, examples, self.max_length, states)
            scored = sum(sizes[key] for key in evaluations(config, model))
            if config.score_steps and rows:
                steps = training.steps(sum(rows.values()) + len(kept), model.epochs, config)
                looks = steps // config.score_steps + 1
                scored += looks * sum(sizes[name, "train", keeps_states(config, model, name)] for name in rows)
            totals = [totals[0] + trained, totals[1] + scored]
            done = "done" if self.stages[model.name].state() == "finished" else "to do"
            self.echo(
                f"[{number:3}/{len(self.models)}] {model.name}: {done}; trains on about {trained:,} tokens, scores "
                f"about {scored:,}"
            )
        self.echo(f"In all about {totals[0]:,} tokens of training and {totals[1]:,} of scoring.")

    def run(self) -> None:
        """Run all unfinished stages and write the report.

        Raises:
            `InputError` when the folder holds finished stages of other settings (unless `recompute`), or when another
            process works in it.
        """
        if not self.config.recompute:
            for stage in self.stages.values():
                self._refuse_changed(stage)
        self._describe_tasks()
        stages = list(self.stages.values())
        execute(stages, self.path, self._about(), manifest=MANIFEST, report=self._report, echo=self.echo)

    def _report(self, folder: Path) -> Path:
        """The report of this study's models only, not of those that an earlier study left in the folder."""
        from ..report.skills import write_report
        from .results import compute

        for link in (*folder.glob("scores/*"), *folder.glob("hidden/*")):
            if link.name.removesuffix(".parquet") not in self.stages:
                link.unlink()
        self._keep_models(set())
        return write_report(folder, compute(folder))

    def _work(self, model: StudyModel, folder: Path) -> str:
        """Train, score, write."""
        config = self.config
        later = self.models[self.models.index(model) :]
        self._keep_models({other.parent for other in later})
        trained, notes, tables = self._make_model(model)
        labels, questions = notes.pop("labels", None), 0
        with replaced_folder(folder / "hidden") as states_in:
            for name, split, states in evaluations(config, model):
                examples = self.tasks[name].split(split)
                scores = score_options(
                    trained,
                    self.tokenizer,
                    examples,
                    batch_tokens=config.batch_tokens,
                    max_length=config.max_length,
                    layer=config.hidden_layer if states else None,
                    description=f"{model.name}: {name} {split}",
                )
                questions += len(examples)
                assigned = labels if split == "train" and name == model.label_task else None
                tables.append(score_table(model.identity, name, split, examples, scores, assigned))
                if states:
                    save_states(states_in, model.identity, name, split, examples, scores, config.hidden_layer)
        if model.parent is None:
            write_examples(folder / "examples.parquet", list(self.tasks.values()))
        write_scores(folder / "scores.parquet", pa.concat_tables(tables))
        write_json(folder / "notes.json", notes)
        del trained
        _free()
        how = f"trained on {notes['rows']} rows, " if "rows" in notes else ""
        right = "".join(f", {rate:.3f} of the labels are right" for rate in notes.get("match_rate", []))
        return f"{how}scored {questions} questions{right}"

    def _make_model(self, model: StudyModel) -> tuple[Model, dict[str, Any], list[pa.Table]]:
        """The weights of a model, notes about its training, and the tables of its learning curves."""
        config, parent = self.config, model.parent
        if parent is None:
            return training.load_model(config), {}, []
        start = None if parent.kind == "base" else self._weights(parent)
        if start is not None and not self._has_weights(parent):
            self._make_model(parent)  # they were removed: the same seeds make the same weights
            _free()
        labels: list[int] | None = None
        notes: dict[str, Any] = {}
        if model.kind == "finetuned":
            rows = [row for name in model.tasks for row in self._gold_rows(name)]
        else:
            rows, labels, notes = training.forgetting_rows(
                config, self.tokenizer, self.tasks, model.label_task, model.method, model.seed, self.max_length
            )
        seed = rng("train", model.name).randrange(2**31)
        curves = []
        if config.score_steps:
            score = functools.partial(
                score_options, tokenizer=self.tokenizer, batch_tokens=config.batch_tokens,
                max_length=config.max_length, progress=False,
            )  # fmt: skip
            curves = [
                training.CurveCallback(functools.partial(score, examples=self.tasks[name].train), config.score_steps)
                for name in model.tasks
            ]
        torch.manual_seed(seed)  # a new adapter is drawn before the trainer sets its seed
        trained = training.train(
            training.load_model(config, start),
            self.tokenizer,
            rows,
            config,
            learning_rate=model.learning_rate,
            epochs=model.epochs,
            seed=seed,
            method=model.method,
            in_order=model.method in RANDOM_LABELS and config.redraw == "per_epoch",
            description=f"{model.name}: training",
            callbacks=curves,
        )
        tables = [
            score_table(model.identity, name, "train", self.tasks[name].train, scores, labels, step)
            for name, curve in zip(model.tasks, curves, strict=False)
            for step, scores in curve.curve.items()
        ]
        if config.keep_models or any(other.parent == model for other in self.models):
            with replaced_folder(self._weights(model)) as part:
                with quiet():
                    trained.save_pretrained(str(part))
                self.tokenizer.save_pretrained(part)
                write_json(part / "selsft_stage.json", {"model": model.name, "key": self._weights_key(model)})
        return trained, {**notes, "rows": len(rows), "labels": labels}, tables

    def _gold_rows(self, name: str) -> training.Rows:
        return training.answer_rows(self.tokenizer, self.tasks[name].train, max_length=self.max_length)

    def _weights(self, model: StudyModel) -> Path:
        return self.path / "models" / model.name

    def _weights_key(self, model: StudyModel) -> str:
        return json_sha256([self.source, training_settings(self.config, model, self.fingerprints)])

    def _has_weights(self, model: StudyModel) -> bool:
        return read_json(self._weights(model) / "selsft_stage.json").get("key") == self._weights_key(model)

    def _keep_models(self, waiting: set[StudyModel | None]) -> None:
        """Remove the weights that no remaining stage starts from."""
        if not self.config.keep_models:
            for model in self.models:
                if model not in waiting:
                    remove(self._weights(model))

    def _refuse_changed(self, stage: Stage) -> None:
        earlier = stage.earlier()
        if not earlier or stage.state() == "finished":
            return
        old, new = _flat(earlier["settings"]), _flat(stage.settings)
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if not changed:  # the base model, of which every stage is made
            old, new, changed = earlier["inputs"], {"model": self.source}, ["model"]
        # a setting says more than the hash of what came of it
        name = min(changed, key=lambda key: ("data" in key, "parent" in key, key))
        raise InputError(
            f"output_dir={self.config.output_dir!r} holds the stage {stage.name} made with other settings: {name} was "
            f"{old.get(name)!r} and is {new.get(name)!r} now. Choose another folder, go back to the old setting, "
            "or compute the changed stages too with --recompute"
        )

    def _about(self) -> dict[str, Any]:
        tasks = {
            name: {
                "area": task.area,
                "source": task.source,
                "train": len(task.train),
                "test": len(task.test),
                "dropped": task.dropped,
                "sha256": self.fingerprints[name],
            }
            for name, task in self.tasks.items()
        }
        return {
            "protocol": "of Zhang et al. (arXiv 2409.02228), with documented choices (docs/skills.md)",
            "config": dataclasses.asdict(self.config),
            "model": {"name": self.config.model_name_or_path, "source": self.source},
            "tasks": tasks,
            "device": str(training.device(self.config)),
        }

    def _describe_tasks(self) -> None:
        for name, task in self.tasks.items():
            lost = ", ".join(f"{number} {reason}" for reason, number in task.dropped.items())
            self.echo(f"{name}: {len(task.train)} train, {len(task.test)} test{lost and f' (left out: {lost})'}")


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {k: v for key, value in content.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
