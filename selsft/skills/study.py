"""The study: base -> fine-tuned -> forgotten for each task, method and seed, everything scored on everything.

A stage is finished when `stages/<stage>.json` is there, which is written last and says what the stage was made from;
then it is skipped. A stage that was cut off, however, starts anew: seeds belong to the stage and models pass from one
to the next through the disk, so the tables come out the same. A finished stage whose inputs have changed is refused
(or computed anew with `recompute`), since hours of work are not to be deleted in silence. Rejected: checkpoints inside
of a stage, which is minutes long, and a workflow engine for three levels.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoConfig

from ..evaluation.options import count_tokens, model_max_length, score_options
from ..records import now, read_json, remove, replaced_folder, versions, write_json
from ..scoring.reference import model_fingerprint
from ..training.model import Model
from ..workflow.quiet import quiet
from . import train as training
from .config import StudyConfig, is_random_labels
from .folder import StudyFolder
from .plan import VERSION, Plan, Stage
from .scoring import save_states, score_table, write_examples
from .suite import load_task
from .table import write_scores
from .tasks import SkillTask, prepare, rng


class Study:
    """Tasks, tokenizer and folder of a study; `run` does what is not done yet.

    Args:
        echo: shows a line.

    Raises:
        `ValueError` or `OSError` for tasks, a model or a folder that cannot be used.
    """

    def __init__(self, config: StudyConfig, echo: Callable[[str], None] = print):
        self.config, self.echo = config, echo
        self.folder = StudyFolder(config.output_dir)
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
        self.plan = Plan(config, self.tasks)
        self._base: dict[str, Any] = {}

    def dry_run(self) -> None:
        """Print every stage with the tokens that it trains on and scores."""
        self._describe_tasks()
        config, plan = self.config, self.plan
        sizes: dict[tuple[str, str, bool], int] = {}
        lengths = {
            name: sum(len(row["input_ids"]) for row in self._gold_rows(name)) / len(task.train)
            for name, task in self.tasks.items()
        }
        totals = [0, 0]
        for number, stage in enumerate(plan.stages, 1):
            epochs, _ = plan.schedule(stage)
            own = plan.trained_tasks(stage)
            rows = {name: len(self.tasks[name].train) for name in own}
            kept = training.retained(config, self.tasks, own[0], stage.seed) if stage.kind == "forgotten" else []
            mean = sum(lengths[name] for name in config.retain_task_names) / max(1, len(config.retain_task_names))
            trained = round(epochs * (sum(lengths[name] * count for name, count in rows.items()) + mean * len(kept)))
            for key in plan.evaluations(stage):
                if key not in sizes:
                    name, split, states = key
                    examples = self.tasks[name].split(split)
                    sizes[key] = count_tokens(self.tokenizer, examples, self.max_length, states)
            scored = sum(sizes[key] for key in plan.evaluations(stage))
            if config.score_steps and own:
                times = training.steps(sum(rows.values()) + len(kept), epochs, config) // config.score_steps + 1
                scored += times * sum(sizes[name, "train", plan.keeps_states(stage, name)] for name in own)
            totals = [totals[0] + trained, totals[1] + scored]
            done = "to do" if self.folder.finished_inputs(stage) is None else "done"
            self.echo(
                f"[{number:3}/{len(plan.stages)}] {stage.name}: {done}; trains on about {trained:,} tokens, scores "
                f"about {scored:,}"
            )
        self.echo(f"In all about {totals[0]:,} tokens of training and {totals[1]:,} of scoring.")

    def check(self) -> None:
        """Look for what would stop `run`, so that it is told before anything is done: the base model is read, and
        finished stages are compared with what is asked for.

        Raises:
            `ValueError` when the folder holds finished stages of other settings (unless `recompute`), `OSError` or
            `ValueError` when the model cannot be loaded.
        """
        model = training.load_model(dataclasses.replace(self.config, use_cpu=True))
        self.plan.base_hash = model_fingerprint(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        name = self.config.model_name_or_path
        self._base = {"name": name, "sha256": self.plan.base_hash, "parameters": parameters}
        if not self.config.recompute:
            for stage in self.plan.stages:
                self._refuse_changed(stage)

    def run(self) -> Path:
        """Do all stages that are not finished and write the report.

        Returns:
            the path of the report.

        Raises:
            As `check`, which it calls unless that was done. `records.exclusive` keeps other processes out.
        """
        from ..report.skills import write_report
        from .results import compute

        if not self._base:
            self.check()
        folder, stages = self.folder.path, self.plan.stages
        self._describe_tasks()
        self._write_manifest(finished=False)
        write_examples(folder / "examples.parquet", list(self.tasks.values()))
        for number, stage in enumerate(stages, 1):
            what = "done before" if self._is_done(stage) else self._run_stage(stage)
            self.echo(f"[{number:3}/{len(stages)}] {stage.name}: {what}")
            self._clean_models()
        self._write_manifest(finished=True)
        report = write_report(folder, compute(folder))
        self.echo(f"Report: {report}")
        return report

    def _run_stage(self, stage: Stage) -> str:
        """Train, score, write. Returns what was done."""
        start = time.perf_counter()
        folder, config = self.folder, self.config
        folder.discard(stage)
        model, notes, tables = self._make_model(stage)
        trained = time.perf_counter() - start
        labels, questions = notes.pop("labels", None), 0
        with replaced_folder(folder.hidden(stage)) as states_in:
            for name, split, states in self.plan.evaluations(stage):
                examples = self.tasks[name].split(split)
                scores = score_options(
                    model,
                    self.tokenizer,
                    examples,
                    batch_tokens=config.batch_tokens,
                    max_length=config.max_length,
                    layer=config.hidden_layer if states else None,
                    description=f"{stage.name}: {name} {split}",
                )
                questions += len(examples)
                assigned = labels if split == "train" and name == stage.label_task else None
                tables.append(score_table(stage.identity, name, split, examples, scores, assigned))
                if states:
                    save_states(states_in, stage.identity, name, split, examples, scores, config.hidden_layer)
        write_scores(folder.scores(stage), pa.concat_tables(tables))
        seconds = time.perf_counter() - start
        note = {
            "stage": vars(stage),
            "inputs": self.plan.inputs(stage),
            "notes": notes,
            "seconds": {"training": round(trained, 2), "scoring": round(seconds - trained, 2)},
            "versions": versions(),
            "finished": now(),
        }
        write_json(folder.note(stage), note)
        del model
        _free()
        how = f"trained on {notes['rows']} rows in {trained:.1f} s, " if "rows" in notes else ""
        right = "".join(f", {rate:.3f} of the labels are right" for rate in notes.get("match_rate", []))
        return f"{how}scored {questions} questions in {seconds - trained:.1f} s{right}"

    def _make_model(self, stage: Stage) -> tuple[Model, dict[str, Any], list[pa.Table]]:
        """The model of a stage, notes about its training, and the tables of its learning curves."""
        config, plan = self.config, self.plan
        if stage.kind == "base":
            return training.load_model(config), {}, []
        parent = plan.parent(stage)
        if parent.kind != "base" and not self._has_model(parent):
            self._make_model(parent)  # it was cleaned away: the same seeds make the same model
            _free()
        own = plan.trained_tasks(stage)
        labels: list[int] | None = None
        notes: dict[str, Any] = {}
        if stage.kind == "finetuned":
            rows = [row for name in own for row in self._gold_rows(name)]
        else:
            rows, labels, notes = training.forgetting_rows(
                config, self.tokenizer, self.tasks, stage.label_task, stage.method, stage.seed, self.max_length
            )
        seed = rng("train", stage.name).randrange(2**31)
        epochs, learning_rate = plan.schedule(stage)
        curves = []
        if config.score_steps:
            scorers = [training.scorer(self.tokenizer, config, self.tasks[name].train) for name in own]
            curves = [training.CurveCallback(score, config.score_steps) for score in scorers]
        torch.manual_seed(seed)  # a new adapter is drawn before the trainer sets its seed
        model = training.train(
            training.load_model(config, None if parent.kind == "base" else self.folder.model(parent)),
            self.tokenizer,
            rows,
            config,
            learning_rate=learning_rate,
            epochs=epochs,
            seed=seed,
            method=stage.method,
            in_order=is_random_labels(stage.method) and config.redraw == "per_epoch",
            description=f"{stage.name}: training",
            callbacks=curves,
        )
        tables = [
            score_table(stage.identity, name, "train", self.tasks[name].train, scores, labels, step)
            for name, curve in zip(own, curves, strict=False)
            for step, scores in curve.curve.items()
        ]
        if config.keep_models or plan.is_parent(stage):
            self._save_model(stage, model)
        return model, {**notes, "rows": len(rows), "labels": labels}, tables

    def _gold_rows(self, name: str) -> training.Rows:
        return training.answer_rows(self.tokenizer, self.tasks[name].train, max_length=self.max_length)

    def _save_model(self, stage: Stage, model: Model) -> None:
        with replaced_folder(self.folder.model(stage)) as part:
            with quiet():
                model.save_pretrained(str(part))
            self.tokenizer.save_pretrained(part)
            write_json(
                part / "selsft_stage.json", {"stage": vars(stage), "training": self.plan.training_inputs(stage)}
            )

    def _has_model(self, stage: Stage) -> bool:
        note = self.folder.model(stage) / "selsft_stage.json"
        return note.is_file() and read_json(note).get("training") == _plain(self.plan.training_inputs(stage))

    def _clean_models(self) -> None:
        """Remove the models that no stage will start from any more."""
        if not self.config.keep_models:
            waiting = {stage.parent for stage in self.plan.stages if not self._is_done(stage)}
            for stage in self.plan.stages:
                if stage.name not in waiting:
                    remove(self.folder.model(stage))

    def _is_done(self, stage: Stage) -> bool:
        return self.folder.finished_inputs(stage) == _plain(self.plan.inputs(stage))

    def _refuse_changed(self, stage: Stage) -> None:
        made_from = self.folder.finished_inputs(stage)
        if made_from is None or self._is_done(stage):
            return
        found, wanted = _flat(made_from), _flat(_plain(self.plan.inputs(stage)))
        changed = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        # a setting says more than the hash of what came of it
        name = min(changed, key=lambda key: ("data" in key, "parent" in key, key))
        raise ValueError(
            f"output_dir={self.config.output_dir!r} holds the stage {stage.name} made with other settings: {name} was "
            f"{found.get(name)!r} and is {wanted.get(name)!r} now. Choose another folder, go back to the old setting, "
            "or replace the changed stages with --recompute"
        )

    def _write_manifest(self, finished: bool) -> None:
        tasks = {
            name: {
                "area": task.area,
                "source": task.source,
                "train": len(task.train),
                "test": len(task.test),
                "dropped": task.dropped,
                "sha256": self.plan.fingerprints[name],
            }
            for name, task in self.tasks.items()
        }
        content = {
            "format": VERSION,
            "protocol": "of Zhang et al. (arXiv 2409.02228), with documented choices (docs/skills.md)",
            "config": dataclasses.asdict(self.config),
            "model": self._base,
            "tasks": tasks,
            "stages": [stage.name for stage in self.plan.stages],
            "versions": versions(),
            "device": str(training.device(self.config)),
            "finished": now() if finished else None,
        }
        write_json(self.folder.path / "study.json", content)

    def _describe_tasks(self) -> None:
        for name, task in self.tasks.items():
            lost = ", ".join(f"{number} {reason}" for reason, number in task.dropped.items())
            self.echo(f"{name}: {len(task.train)} train, {len(task.test)} test{lost and f' (left out: {lost})'}")


def _plain(content: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(content))


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {k: v for key, value in content.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
