"""Which stages a recipe has, what each reads, and the arms that are trained from them (`pipeline.stages` makes them).

A model is evaluated as soon as it is trained, so that the weights of a whole model need not wait on the disk for those
of all others. Rejected: one folder for each arm with everything in it, which would score the same rows for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..records import read_json, write_json
from ..workflow.run import RUN, execute, read_anew, states_of
from ..workflow.stage import Stage, model_source
from .arms import IGNORE, ORACLE, PLAIN, RANDOM, Arm, method_of, same_training
from .flags import FORGET, KEEPING, OWN, REFERENCED, SCORED, SELECTION
from .recipe import Recipe
from .stages import Run, Stages, Stopped, run_command, with_own_rule
from .verdict import MEASURES

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")  # of models and checkpoints


class Plan:
    """The stages of one recipe, in the order in which they run.

    Args:
        root: folder of the run.
        run: runs a command; tests run it in their own process.
    """

    def __init__(self, recipe: Recipe, root: Path, run: Run = run_command):
        self.recipe, self.root = recipe, root
        self.score, self.arms = recipe.score, recipe.arms
        self.trained: dict[str, list[Stage]] = {}  # arm -> its trainings, a stage for each seed
        self.spent: dict[str, Stage] = {}  # evaluation -> the training whose weights nobody needs after it
        if (wanted := recipe.run.headline) is not None and wanted not in MEASURES:
            raise InputError(f"headline={wanted!r} is none of the measures: {', '.join(MEASURES)}")
        self.make = Stages(recipe, root, run)
        self.parts = self.make.split()
        self.checked = self.make.check(self.parts)
        self.reference: Stage | str | None = None
        self._reference_inputs: dict[str, Stage | str] = {}
        if recipe.split.parts > 1:
            self._self_evolving(recipe.split.parts)
        else:
            self._arms()

    @property
    def stages(self) -> list[Stage]:
        return self.make.all

    @property
    def model(self) -> str:
        """Folder or id of the model that training starts from."""
        return self.make.model

    def waiting(self, from_stage: str | None = None) -> list[Stage]:
        """The stages that a run would work on."""
        anew, states = read_anew(self.stages, from_stage), states_of(self.stages)
        return [stage for stage in self.stages if stage.name in anew or states[stage.name] != "finished"]

    def _arms(self) -> None:
        """Scores and selection once, then every arm with every seed: seed by seed, so that a run that is cut off has
        whole pairs."""
        recipe, settings = self.recipe, self.recipe.run
        if self.score in REFERENCED:
            given = recipe.get("reference_model", stage="score")
            self.reference = given or self.make.train("reference", self.parts, "reference", {})
            known = given if given in (None, "base") else model_source(given)
            self._reference_inputs = {"reference": known or self.reference}
        self._scored: Stage | None = None
        if self.score in SCORED:
            self._scored = self.make.score("score", self.parts, "train", self.reference, self._reference_inputs)
            self.selected = self.make.select("select", self._scored, {})
            self.make.triage(self.selected, self._scored, self.checked, self.parts)
        elif settings.only_score:
            raise InputError(
                f"only_score=true with score={self.score!r}, which is not computed beforehand: leave it out"
            )
        if settings.only_score:
            return
        own = {arm.name: self._selection_of(arm) for arm in self.arms}
        self.make.evaluate("evaluate-base", self.parts, None)
        if isinstance(self.reference, Stage):
            self.make.evaluate("evaluate-reference", self.parts, self.reference)
        first = int(recipe.get("seed", 42, "train"))
        whole = not recipe.get("use_peft", stage="train")
        for seed in range(first, first + settings.seeds):
            for arm in self.arms:
                stage = self._train_arm(arm, seed, own[arm.name])
                evaluation = self.make.evaluate(f"evaluate-{arm.name}-seed{seed}", self.parts, stage)
                self.trained.setdefault(arm.name, []).append(stage)
                if arm is method_of(self.arms) and seed == first:
                    stage.links = {stage.name: ".", "train": "."}
                elif whole and evaluation is not None and not settings.keep_models:
                    self.spent[evaluation.name] = stage

    def _selection_of(self, arm: Arm) -> Stage | None:
        """The stage with the arm's own weights: the shared one unless it selects otherwise."""
        if self._scored is None or arm.kind in (PLAIN, ORACLE):
            return None
        changes = {key: value for key, value in arm.changes.items() if key in SELECTION}
        selected = self.make.select(f"select-{arm.name}", self._scored, changes) if changes else self.selected
        return self.make.deal_out(f"random-{arm.name}", selected) if arm.kind == RANDOM else selected

    def _train_arm(self, arm: Arm, seed: int, selected: Stage | None) -> Stage:
        """The training of one arm: from the base, on the rows of `train.parquet`, whatever weights they have."""
        changes: dict[str, Any] = {key: value for key, value in arm.changes.items() if key not in SELECTION}
        changes |= {"seed": seed, "data_seed": seed}
        if arm.kind == IGNORE:
            changes["forget_weight"] = 0.0
        name, marked = f"train-{arm.name}-seed{seed}", arm.kind == ORACLE or self.score == ORACLE
        if arm.kind == PLAIN:
            return self.make.train(name, self.parts, "train", {}, changes=changes, kept=set())
        if arm.kind == RANDOM and selected is None:
            raise InputError(
                f"arms: {arm.name!r} deals out the weights of scored rows, which score={self.score!r} has not"
            )
        if marked:  # spans say themselves what they are; a mask needs the score that reads it
            changes["score"] = ORACLE
            return self.make.train(name, self.parts, "marked", {}, changes=changes, kept=FORGET | {"score"})
        if selected is not None:
            kept = {"forget_weight"} | KEEPING if arm.kind == IGNORE else FORGET
            return self.make.train(name, selected, "selected", {}, changes=changes, kept=kept)
        extra = {} if self.reference is None else {"reference_model": self.reference}
        changes |= {key: value for key, value in arm.changes.items() if key in SELECTION}
        file = "marked" if self.score == "given" else "train"
        return self.make.train(name, self.parts, file, extra, self._reference_inputs, changes=changes, kept=OWN)

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
            from ..report.run import write_report
            from .results import results

            return write_report(root, results(root))

        def after(stage: Stage) -> None:
            if stage.name == "select" or (stage.name.startswith("select-") and recipe.split.parts > 1):
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
            elif stage.name in self.spent:
                self.spent[stage.name].drop(_WEIGHTS)

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
        from .outlook import Outlook, reasons_to_stop

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
                flags = self.recipe.flags(kind)
                yield kind, command, _given(flags)
                for arm in self.arms if kind == "train" else ():
                    if arm.changes:
                        yield f"train-{arm.name}", command, _given(with_own_rule(flags, arm.changes))

    def _self_evolving(self, count: int) -> None:
        """Token Cleaning (2502.01968): the model of part t-1 is the reference of part t, and where its training
        starts; scores compare it with the base."""
        if self.score != "influence":
            raise InputError(
                f"score={self.score!r} with split.parts={count}: self-evolving selection uses 'influence'"
            )
        parts = self.parts
        model = self.make.train("train-1", parts, "train-1", {}, merge=True)
        for number in range(2, count + 1):
            scored = self.make.score(f"score-{number}", parts, f"train-{number}", model, {"reference": model})
            chosen = self.make.select(f"select-{number}", scored, {})
            model = self.make.train(f"train-{number}", chosen, "selected", {}, start=model, merge=True, kept=FORGET)
        model.links = {model.name: ".", "train": "."}
        self.trained = {method_of(self.arms).name: [model]}
        self.make.evaluate("evaluate-base", parts, None)
        self.make.evaluate(f"evaluate-{count}", parts, model)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that a parser can check: those with a value, and an output folder that nothing is written into."""
    there = {key: value for key, value in flags.items() if value is not None and key != "datasets"}
    return {**there, "output_dir": "unused"}
