"""`selsft inspect`: look at the tokens of a data set and at their classes under a threshold, and mark what is wrong.

Reads what `selsft score` writes, and any tokenised rows. Rejected: `CommandParser`, whose
flags load models and train them.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any, NoReturn

from ..config import SelectiveSFTConfig
from ..data.corrections import spans_of_corrections
from ..data.loading import DataSource, load_rows
from ..data.scored_folder import is_scored, read_manifest
from ..errors import InputError, input_errors
from ..records import read_json, resumable

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
JUDGED = "judged.json"


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
    add("--score", help="which score to begin with (default: influence, or the first that there is)")
    add(
        "--negative_threshold",
        type=float,
        help="begin with this threshold (default: that of training, or the worst 5 %%)",
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

    from ..report.inspect import (
        WEIGHTED,
        classes,
        print_rows,
        score_names,
        score_of,
        starting_threshold,
        write_inspection,
    )
    from ..report.tokens import read_rows

    with input_errors():
        data = load_rows(DataSource(arguments.scored, split=arguments.dataset_train_split))
        tokenizer = _tokenizer(arguments, manifest)
        rows = read_rows(data, tokenizer, arguments.max_tokens)
    names = score_names(rows)
    if arguments.score is not None and arguments.score not in names:
        raise InputError(f"--score {arguments.score}: the rows have {', '.join(names)}")
    score = arguments.score or names[0]
    base_weight = manifest.get("score_base_weight", 1.0)
    values = score_of(rows, score, base_weight)
    threshold = arguments.negative_threshold
    settings: dict[str, Any] = {
        "score": score,
        "negative_threshold": starting_threshold(rows, values) if threshold is None else threshold,
        "neutral_band": arguments.neutral_band,
        "score_base_weight": base_weight,
        "protect_special_tokens": SelectiveSFTConfig.protect_special_tokens,
    }
    if arguments.text:
        boundary = 0.0 if score == WEIGHTED else -settings["negative_threshold"]
        print_rows(rows, classes(rows, values, boundary, settings["neutral_band"], True), arguments.rows)
    if arguments.output is not None:
        about = {
            "title": Path(arguments.scored).name or arguments.scored,
            "lines": _lines(manifest),
            "total": len(data),
            "judged": judged,
            "measured": read_json(Path(arguments.scored) / JUDGED) if scored else {},
        }
        with resumable(arguments.output.parent, "--output", "nothing else is written, start it again"):
            print(f"Page: {write_inspection(arguments.output, rows, about, settings)}")
    return 0


def _tokenizer(arguments: argparse.Namespace, manifest: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    name = arguments.model_name_or_path or manifest.get("model")
    if not name:
        raise InputError("model_name_or_path is missing: give the model whose tokenizer made the rows")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer at {name!r} ({str(error).splitlines()[0]}): give --model_name_or_path NAME or FOLDER"
        ) from error


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
