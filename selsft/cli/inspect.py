"""`selsft inspect`: look at the tokens of a data set and at their classes under a threshold, and mark what is wrong.

Reads what `selsft score` writes, and any tokenised rows. Rejected: `CommandParser`, whose
flags load models and train them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import textwrap
from pathlib import Path
from typing import Any, NoReturn

from ..config import SelectiveSFTConfig
from ..data.corrections import spans_of_corrections
from ..data.loading import DataSource, load_rows
from ..data.scored_folder import is_scored, read_manifest
from ..errors import InputError, input_errors
from ..records import resumable

DESCRIPTION = (
    "Look at the tokens of a data set, coloured by their scores, on one HTML page: choose a threshold, see what it "
    "makes negative, mark what is wrong and save the marks as a judged sample. SCORED is a folder of `selsft score`, "
    "or rows that are tokenised already: a folder of save_to_disk (as axolotl and TRL prepare), a file, a name on the "
    "Hub."
)
EXAMPLES = """examples:
  selsft inspect runs/scored --output look.html
  selsft inspect runs/scored --text --rows 20 --negative_threshold 0.5
  selsft inspect last_run_prepared/0f3a --model_name_or_path Qwen/Qwen3-0.6B --output look.html"""


class Parser(argparse.ArgumentParser):
    """Errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "selsft inspect", description=textwrap.fill(DESCRIPTION, 100), epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("scored", metavar="SCORED", help="folder of scores, or rows that are tokenised")
    add("--output", type=Path, metavar="PAGE.html", help="the page to write")
    add("--text", action="store_true", help="print rows in colour instead, those with the most negative tokens first")
    add("--rows", type=int, default=10, help="rows that --text prints (default: 10)")
    add("--model_name_or_path", help="whose tokenizer made the rows (default: the model that scored them)")
    add("--trust_remote_code", action="store_true", help="let the tokenizer run code of its own")
    add("--dataset_train_split", default="train", help="split of a saved data set or of the Hub (default: train)")
    add("--score", help="which score to begin with (default: what training takes, or the first that there is)")
    add(
        "--score_pooling",
        choices=("token", "word", "word_sum", "span", "row"),
        help="begin with this pooling (default: that of training)",
    )
    add(
        "--negative_threshold",
        type=float,
        help="begin with this threshold (default: the rule of training)",
    )
    add("--neutral_band", type=float, default=0.0, help="begin with this band (default: 0.0)")
    add("--judged", type=Path, metavar="FILE.jsonl", help="a judged sample whose marks are shown")
    add("--max_tokens", type=int, default=1_000_000, help="beyond this, a random draw of rows (default: 1000000)")
    return parser


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if not arguments.text and arguments.output is None:
        raise InputError("--output is missing: give --output PAGE.html, or --text to print rows")
    for name in ("rows", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise InputError(f"{name}={getattr(arguments, name)} must be at least 1")
    if arguments.output is not None and arguments.output.is_dir():
        raise InputError(f"--output {str(arguments.output)!r} is a folder: give the path of a page")
    judged = [] if arguments.judged is None else _read_judged(arguments.judged)
    scored = is_scored(arguments.scored)
    manifest = read_manifest(arguments.scored) if scored else {}

    from ..data.tokenizers import load_tokenizer
    from ..evaluation.judging import read_verdict
    from ..report.inspect import (
        WEIGHTED,
        boundary_at,
        classes,
        pooled,
        print_rows,
        score_names,
        score_of,
        write_inspection,
    )
    from ..report.tokens import read_rows

    with input_errors():
        data = load_rows(DataSource(arguments.scored, split=arguments.dataset_train_split))
        tokenizer = load_tokenizer(arguments.model_name_or_path or manifest.get("model"), arguments.trust_remote_code)
        rows = read_rows(data, tokenizer, arguments.max_tokens)
    settings = _settings(arguments, score_names(rows), scored)
    if arguments.text:
        values = score_of(rows, settings["score"], settings["score_base_weight"])
        if settings["score"] != WEIGHTED:
            values = pooled(
                rows, values, settings["score_pooling"], settings["score_lookahead"], settings["score_row_worst"]
            )
            share, threshold = settings["positive_fraction"], settings["negative_threshold"]
            boundary = -threshold if share is None else boundary_at(rows, values, share)
        else:
            boundary = 0.0
        print_rows(rows, classes(rows, values, boundary, settings["neutral_band"], True), arguments.rows)
    if arguments.output is not None:
        about = {
            "title": Path(arguments.scored).name or arguments.scored,
            "lines": _lines(manifest),
            "total": len(data),
            "judged": judged,
            "measured": read_verdict(Path(arguments.scored)) if scored else {},
        }
        with resumable(arguments.output.parent, "--output", "nothing else is written, start it again"):
            print(f"Page: {write_inspection(arguments.output, rows, about, settings)}")
    return 0


def _settings(arguments: argparse.Namespace, names: list[str], scored: bool) -> dict[str, Any]:
    """What the page begins with: the settings of a run on these scores that says nothing else, and what was given.

    Args:
        names: what the rows can be coloured by, the best first.
        scored: whether they are a folder of scores, whose judged rows may have chosen a score and a threshold.
    """
    from ..report.inspect import SETTINGS, default_rule
    from ..selection.select import selection_args

    args = SelectiveSFTConfig("unused", use_cpu=True, bf16=False, go_on=True)
    if scored:
        with contextlib.suppress(InputError):  # no threshold has the precision that was asked for
            args = selection_args(Path(arguments.scored), {})
    chosen = next((name for name in names if SETTINGS.get(name) == args.score), names[0])
    score = arguments.score or chosen
    if score not in names:
        raise InputError(f"--score {score}: the rows have {', '.join(names)}")
    rule = default_rule(score)
    if score == chosen and SETTINGS.get(score) == args.score:
        rule = {
            "score_pooling": args.pooling,
            "negative_threshold": args.effective_threshold,
            "positive_fraction": args.effective_fraction,
        }
    if arguments.negative_threshold is not None:
        rule |= {"negative_threshold": arguments.negative_threshold, "positive_fraction": None}
    if arguments.score_pooling is not None:
        rule["score_pooling"] = arguments.score_pooling
    return {
        "score": score,
        **rule,
        "neutral_band": arguments.neutral_band,
        "score_base_weight": args.score_base_weight,
        "score_lookahead": args.score_lookahead,
        "score_row_worst": args.score_row_worst,
        "protect_special_tokens": args.protect_special_tokens,
    }


def _lines(manifest: dict[str, Any]) -> list[str]:
    source = (manifest.get("data") or {}).get("source")
    named = {"policy": manifest.get("model"), "reference": manifest.get("reference"), "data": source}
    return [f"{what}: {name}" for what, name in named.items() if name]


def _read_judged(path: Path) -> list[dict[str, Any]]:
    """The rows of a judged sample, as they are.

    Raises:
        `InputError` naming the line.
    """
    if not path.is_file():
        raise InputError(f"judged={str(path)!r}: no such file")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # also of bytes that are not UTF-8
            raise InputError(f"judged={str(path)!r}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"judged={str(path)!r}: line {number} is not a JSON object with a key per column")
        text = row.get("completion", row.get("text"))
        if "corrected" in row and "spans" not in row and isinstance(text, str):
            texts = row["corrected"] if isinstance(row["corrected"], list) else [row["corrected"]]
            try:
                row["spans"] = spans_of_corrections(text, texts)
            except InputError as error:
                raise InputError(f"judged={str(path)!r}: line {number}: {error}") from error
        rows.append(row)
    return rows
