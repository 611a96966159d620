"""`selsft run`: a recipe from raw data to a report, in stages that are skipped when nothing has changed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from ..errors import InputError, first_line, input_errors
from ..pipeline.plan import Plan, Stopped
from ..pipeline.recipe import load_recipe
from ..pipeline.verdict import NOTHING
from ..records import read_json
from ..workflow.run import preview

HELP = """usage: selsft run RECIPE [--output_dir DIR] [--dry_run] [--from STAGE] [--flag value] [--STAGE.flag value]

Run a recipe: split and check the data, train a reference, score the tokens, select, train every arm, evaluate, and say
which was better. A stage whose inputs are unchanged is skipped, one that was cut off resumes, and a changed setting
makes new folders beside the old ones. RECIPE is a YAML file, or the name of one that ships with selsft:

{recipes}

  --output_dir DIR     folder of the run (default: runs/ and the name of the recipe)
  --dry_run            print the stages, tokens and estimated times, and do nothing
  --from STAGE         do this stage and all that read from it anew; the old folders are renamed
  --flag value         a flag of `selsft train`, for all stages that it concerns: --model_name_or_path ...
  --STAGE.flag value   a flag for one stage: --reference.learning_rate 5e-5, --split.eval_size 200
  --arms LIST          what is trained and compared: plain,ignore,forget (default), random, oracle, or names of your
                       own with --NAME.flag value
  --seeds N            trainings of each arm (default: 1)
  --keep_models true   keep the weights of every arm, also of full fine-tuning
  --only_score true    end with the table of scored rows
  --go_on true         train although the scores give no reason to (exit status 3 otherwise)

examples:
  selsft run demo
  selsft run domain-lora --model_name_or_path Qwen/Qwen3-0.6B --dataset_name messy.jsonl --output_dir runs/mine
  selsft run domain-lora --output_dir runs/mine ... --negative_threshold 2.0    # selects and trains, nothing more

docs/pipeline.md has the stages, their flags and files."""


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP.format(recipes=_recipes()))
        return 0
    source, *rest = argv
    if source.startswith("-"):
        raise InputError(f"the recipe comes first: selsft run RECIPE {source} ...")
    dry, rest = _switch("--dry_run", rest)
    from_stage, rest = _take("--from", rest)
    output, rest = _take("--output_dir", rest)
    recipe = load_recipe(source, rest)
    root = Path(output or recipe.common.get("output_dir") or Path("runs") / recipe.name)
    with input_errors():
        plan = Plan(recipe, root)
    if dry:
        preview(plan.stages, f"{recipe.name} in {root}", from_stage, Console())
        check_flags(plan)
        _print_costs(plan, from_stage)
        return 0
    check_flags(plan)
    status = 0
    try:
        plan.execute(rest, from_stage)
    except Stopped as stopped:
        print(f"selsft run: stopped: {stopped}", file=sys.stderr)
        status = 3
    from ..report.run import print_report  # charts and pages, which a plan does without

    report = read_json(root / "report.json")
    print_report(report)
    return 3 if report["verdict"]["kind"] == NOTHING else status


def _print_costs(plan: Plan, from_stage: str | None) -> None:
    """What the stages that would run would cost, after the plan: measuring takes the model and half a minute."""
    waiting = plan.waiting(from_stage)
    if "world" in plan.recipe.stages or plan.recipe.get("datasets") or not waiting:
        return  # whose model or rows are not there yet; or nothing to do
    from ..pipeline.budget import costs, count_tokens, harness_requests, measure

    tokens = count_tokens(plan)
    rows = ", ".join(f"{name} {count:,} rows, {size:,} tokens" for name, (count, size) in tokens.items() if count)
    print(f"About {rows}. Measuring a second of scoring, training and decoding ...", flush=True)
    count, size = tokens.get("train", (0, 0))
    speed = measure(plan, size // max(count, 1))
    harness = None
    try:
        with input_errors():
            harness = harness_requests(plan)
    except OSError as error:  # an unreachable hub; unknown tasks and a missing extra are errors of the recipe
        print(f"Not in the estimate: lm_eval_tasks, whose data cannot be had ({first_line(error)})")
    if harness is not None:
        print(
            f"lm-evaluation-harness, for each model: {harness.documents:,} documents, {harness.read:,} tokens read, "
            f"at most {harness.written:,} written"
        )
    table = Table(
        title=f"Estimated from {speed.scoring:,.0f} tokens a second of scoring, {speed.training:,.0f} of training and "
        f"{speed.decoding:,.0f} of decoding, measured here"
    )
    for name in ("stage", "tokens", "minutes"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    found = costs(plan, tokens, speed, harness)
    for stage in waiting:
        if cost := found.get(stage.name):
            table.add_row(stage.name, f"{cost.tokens:,}", f"{cost.seconds / 60:.1f}")
    total = sum(found[stage.name].seconds for stage in waiting if stage.name in found)
    table.add_section()
    table.add_row("all", "", f"{total / 60:.1f}")
    Console().print(table)


def check_flags(plan: Plan) -> None:
    """Parse the flags of every command before the first stage runs, and look at what they name: models, adapters,
    trackers.

    Raises:
        `InputError` naming the stage and the flag.
    """
    from ..evaluation.settings import EvaluateArguments
    from ..score import check_score_settings
    from ..scoring.settings import ScoreArguments
    from ..training.preflight import check_trackers
    from .arguments import CommandParser
    from .train import check_model_and_data

    own: dict[str, type] = {"score": ScoreArguments, "evaluate": EvaluateArguments}
    for kind, command, flags in plan.commands():
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as handle:
            yaml.safe_dump(flags, handle)
            handle.flush()
            try:
                arguments = CommandParser(command, "", "", own.get(command)).parse(["--config", handle.name])
                assert arguments is not None
                training, extra = arguments.training, arguments.extra
                if command == "score":
                    check_score_settings(
                        training, training.reference_model or "base", extra.base_logps, extra.ref_logps,
                        extra.shard_tokens, {"judged"} if plan.recipe.split.judged_fraction else (),
                    )  # fmt: skip
                elif command == "train" and "world" not in plan.recipe.stages:
                    check_model_and_data(arguments)
                    check_trackers(training.report_to)
            except InputError as error:
                raise InputError(f"stage {kind}: {error}") from error


def _switch(flag: str, argv: list[str]) -> tuple[bool, list[str]]:
    """Whether a flag is on (`--flag`, `--flag true`, `--flag=true`), and the arguments without it."""
    if flag in argv and argv[argv.index(flag) + 1 : argv.index(flag) + 2] not in (["true"], ["false"]):
        return True, [part for part in argv if part != flag]
    value, rest = _take(flag, argv)
    if value not in (None, "true", "false"):
        raise InputError(f"{flag}={value!r} must be true or false")
    return value == "true", rest


def _take(flag: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, and the arguments without it."""
    for index, part in enumerate(argv):
        if part.startswith(f"{flag}="):
            return part.split("=", 1)[1], argv[:index] + argv[index + 1 :]
        if part == flag:
            if index + 1 == len(argv):
                raise InputError(f"{flag} needs a value")
            return argv[index + 1], argv[:index] + argv[index + 2 :]
    return None, argv


def _recipes() -> str:
    from ..recipes import RECIPES

    lines = []
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "\nstages:" in text:  # the others are for `selsft train --config`
            lines.append(f"  {path.stem:24} {text.partition(chr(10))[0].lstrip('# ')}")
    return "\n".join(lines)
