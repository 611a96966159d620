"""`selsft evaluate`: what a trained model answers, finds likely, and has lost.

Takes the flags of `train`, so that one YAML file prepares the rows in the same way. Rejected: evaluating inside
training, where every model to compare with would have to be in memory.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table

from ..data.cards import write_card
from ..data.loading import BUILDERS, load_rows
from ..data.source_rows import with_own_columns
from ..errors import InputError, input_errors
from ..evaluation.kept import FOLDER, Kept
from ..evaluation.settings import METRICS, ROWS, EvaluateArguments
from ..records import now, replaced_folder, versions, write_json
from ..training.preflight import check_model
from .arguments import Arguments, CommandParser
from .launch import at_work, launched
from .manifest import NAME, settings_sha256
from .train import check_new, init_kwargs

DESCRIPTION = (
    "Evaluate a model or adapter on held-out rows: negative log-likelihood, exact match of greedy answers with EOS "
    "rate and length, KL divergence to the base on the prompts; and, by choice, perplexity of neutral text, accuracy "
    "on multiple-choice options, and tasks of lm-evaluation-harness."
)
EXAMPLES = """examples:
  selsft evaluate --model_name_or_path runs/forget --dataset_name heldout.jsonl --evaluation_dir runs/forget-eval
  selsft evaluate --config recipe.yaml --model_name_or_path runs/forget --dataset_name heldout.jsonl \\
      --neutral_text wiki.txt --options_file choices.jsonl --evaluation_dir runs/forget-eval"""


def main(argv: list[str]) -> int:
    arguments = CommandParser("evaluate", DESCRIPTION, EXAMPLES, EvaluateArguments).parse(argv)
    if arguments is None:
        return 0
    extra: EvaluateArguments = arguments.extra
    settings = settings_sha256(arguments)
    folder = Path(str(extra.evaluation_dir or arguments.training.output_dir))
    check_new(folder, "evaluation_dir" if extra.evaluation_dir else "output_dir", "choose another folder")
    if not arguments.model.model_name_or_path:
        raise InputError("model_name_or_path is missing: give --model_name_or_path NAME or FOLDER")
    if launched() or arguments.launch:
        raise InputError(f"{' '.join(arguments.launch) or 'a launcher'}: evaluation runs in one process, leave it out")
    _check(extra)
    has_rows = bool(arguments.script.dataset_name or arguments.mixture.datasets)
    if has_rows:
        arguments.source.check()
    elif not (extra.neutral_text or extra.options_file or extra.lm_eval_tasks):
        raise InputError(
            "nothing to evaluate on: give --dataset_name, --neutral_text, --options_file or --lm_eval_tasks"
        )
    field = "evaluation_dir" if extra.evaluation_dir else "output_dir"
    with at_work(folder, field, "finished batches are kept in it, the same command resumes from there"):
        start = time.perf_counter()
        kept = Kept(folder / FOLDER, [_models(arguments), settings])
        metrics, tables = _evaluate(arguments, has_rows, kept)
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        save(folder, metrics, tables, arguments)
    _print(metrics, str(folder))
    return 0


def _check(extra: EvaluateArguments) -> None:
    for name, low in (("max_new_tokens", 0), ("eval_batch_tokens", 1), ("neutral_block", 2), ("neutral_tokens", 2)):
        if getattr(extra, name) < low:
            raise InputError(f"{name}={getattr(extra, name)} must be at least {low}")
    if extra.eval_rows is not None and extra.eval_rows < 1:
        raise InputError(f"eval_rows={extra.eval_rows} must be at least 1")
    for name in ("neutral_text", "options_file"):
        path = getattr(extra, name)
        if path and not Path(path).is_file():
            raise InputError(f"{name}={path!r}: no such file in {os.getcwd()}")
    if extra.lm_eval_include and not Path(extra.lm_eval_include).is_dir():
        raise InputError(f"lm_eval_include={extra.lm_eval_include!r}: no such folder in {os.getcwd()}")


def _models(arguments: Arguments) -> list[str]:
    """What the model, and the one to compare with, are known by: their content."""
    from ..workflow.stage import model_source

    names = (arguments.model.model_name_or_path, arguments.extra.base_model_name_or_path)
    return [model_source(name, arguments.model.model_revision) for name in names if name]


def _evaluate(arguments: Arguments, has_rows: bool, kept: Kept) -> tuple[dict[str, Any], dict[str, Any]]:
    from ..evaluation.evaluate import evaluate_rows, evaluate_text
    from ..evaluation.load import load_model

    training, extra, name = arguments.training, cast(EvaluateArguments, arguments.extra), arguments.model
    kwargs = init_kwargs(arguments)
    metrics: dict[str, Any] = {"model": name.model_name_or_path}
    tables: dict[str, Any] = {}
    assert name.model_name_or_path is not None
    with input_errors():
        check_model("model_name_or_path", name.model_name_or_path, name.model_revision)
        model, tokenizer = load_model(name.model_name_or_path, kwargs, extra.base_model_name_or_path)
        base = None
        if extra.base_model_name_or_path and not hasattr(model, "peft_config"):
            base, _ = load_model(extra.base_model_name_or_path, kwargs)
        rows = _rows(arguments) if has_rows else None
        texts = _texts(extra, tokenizer) if extra.neutral_text else []
    if rows is not None:
        with input_errors():
            if base is not None:
                base = cast(Any, base).to(training.device)
            found = evaluate_rows(
                model,
                tokenizer,
                rows,
                training,
                base=base,
                max_new_tokens=extra.max_new_tokens,
                batch_tokens=extra.eval_batch_tokens,
                kept=kept,
            )
        metrics |= found.metrics
        tables[ROWS] = with_own_columns(found.rows, rows, {"prompt", "completion", training.dataset_text_field})
    else:
        model = cast(Any, model).to(training.device)
    if texts:
        metrics |= evaluate_text(model, tokenizer, texts, extra.neutral_block, kept)
    if extra.options_file:
        from ..evaluation.choices import option_accuracy

        with input_errors():
            accuracy, table = option_accuracy(model, tokenizer, extra.options_file, extra.eval_batch_tokens, kept)
        metrics |= accuracy
        tables["options.parquet"] = table
    if extra.lm_eval_tasks:
        from ..evaluation.harness import DOCUMENTS, document_table, run_harness

        names = [task.strip() for task in extra.lm_eval_tasks.split(",") if task.strip()]
        with input_errors():
            metrics["lm_eval"], documents = kept.one(
                "harness", "lm-evaluation-harness", [names, extra.lm_eval_limit, extra.lm_eval_include],
                lambda: run_harness(
                    model, tokenizer, names, limit=extra.lm_eval_limit, include_path=extra.lm_eval_include
                ),
            )  # fmt: skip
        tables[DOCUMENTS] = document_table(documents)
    return metrics, tables


def _rows(arguments: Arguments) -> Dataset:
    script, extra = arguments.script, arguments.extra
    # One file is one split, whatever its name; of several splits evaluation takes the test split
    script.dataset_train_split = script.dataset_test_split
    data = load_rows(arguments.source, arguments.training.dataset_text_field)
    if extra.eval_rows is not None and extra.eval_rows < len(data):
        data = data.shuffle(seed=arguments.training.seed).select(range(extra.eval_rows))
    return data


def _texts(extra: EvaluateArguments, tokenizer) -> list[str]:
    """The beginning of the neutral text, about `neutral_tokens` tokens of it."""
    assert extra.neutral_text is not None
    if Path(extra.neutral_text).suffix == ".txt":
        data = cast(Dataset, load_dataset("text", data_files=extra.neutral_text, split="train", sample_by="paragraph"))
    else:
        builder = BUILDERS.get(Path(extra.neutral_text).suffix)
        if builder is None:
            raise InputError(f"neutral_text={extra.neutral_text!r}: use .txt, {', '.join(BUILDERS)}")
        data = cast(Dataset, load_dataset(builder, data_files=extra.neutral_text, split="train"))
    if "text" not in data.column_names:
        raise InputError(f"neutral_text={extra.neutral_text!r} has no column 'text', but {data.column_names}")
    texts: list[str] = []
    size = 0
    for row in data:
        if row["text"] and row["text"].strip():
            texts.append(row["text"])
            size += len(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
        if size >= extra.neutral_tokens:
            break
    if size < 2:
        raise InputError(f"neutral_text={extra.neutral_text!r} holds no text")
    return texts


def save(folder: Path, metrics: dict[str, Any], tables: dict[str, Any], arguments: Arguments) -> None:
    """Write the results to a folder that appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as part:
        for name, table in tables.items():
            pq.write_table(table, part / name)
        write_json(part / METRICS, metrics)
        record = {
            "command": "evaluate",
            "arguments": arguments.own,
            "finished": now(),
            "versions": versions(),
            "settings": vars(arguments.extra),
        }
        write_json(part / NAME, record)
        write_card(part, "Figures of each row, by `selsft evaluate`.")


def _print(metrics: dict[str, Any], folder: str) -> None:
    table = Table(title="Evaluation", show_header=False)
    for name, value in metrics.items():
        if isinstance(value, dict):
            for task, found in value.items():
                table.add_row(f"{name} {task}", "  ".join(f"{key} {number:.4g}" for key, number in found.items()))
        else:
            table.add_row(
                name, f"{value:.4g}" if isinstance(value, float) else str(value), end_section=name == "model"
            )
    table.add_row("saved to", folder)
    Console(highlight=False, markup=False).print(table)
