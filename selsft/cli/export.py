"""`selsft export`: scored rows for other trainers, as masked labels, token weights or spans.

The work is in `selsft.selection.export`; here are the flags. Rejected: `CommandParser`, whose flags load models and
train them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import textwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..config import SelectiveSFTConfig
from ..data.cards import write_card
from ..data.scored_folder import is_scored
from ..errors import InputError, input_errors
from ..records import exclusive, make_writable, now, replaced, resumable, versions, write_json
from .inspect import Parser
from .manifest import NAME

DESCRIPTION = (
    "Write the rows of SCORED, a folder of `selsft score`, for other trainers. The tokens that are learnt and "
    "forgotten are those of `selsft train` on the same folder and with the same flags. The user's own columns go "
    "along."
)
EXAMPLES = """examples:
  selsft export runs/scored --output masked.parquet
  selsft export runs/scored --form weights --negative_threshold 2.0 --output runs/weighted
  selsft export runs/scored --form spans --output marked.jsonl"""
SELECTION = (
    "score", "score_base_weight", "score_pooling", "score_row_worst", "score_lookahead", "negative_threshold",
    "positive_fraction", "selection_scope", "neutral_band", "protect_special_tokens", "gate_reference_prob",
    "max_negative_share",
)  # fmt: skip
ENDINGS = (".parquet", ".jsonl")
FORMS = {
    "labels": "input_ids, attention_mask and labels, -100 for all that is not learnt; rows without a label go",
    "weights": "input_ids, attention_mask, labels and token_weights: 1 learn, 0 leave out, -1 forget",
    "spans": "the rows of the data with spans of what is negative or neutral, in characters of the text",
}


def _parser() -> argparse.ArgumentParser:
    forms = "\n".join(f"  {name:8} {text}" for name, text in FORMS.items())
    parser = Parser(
        "selsft export", description=textwrap.fill(DESCRIPTION, 100), epilog=f"forms:\n{forms}\n\n{EXAMPLES}",
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("scored", metavar="SCORED", type=Path, help="folder of `selsft score`, finished")
    add("--output", type=Path, metavar="FILE|FOLDER", help="a new file (.parquet, .jsonl), or a folder")
    add("--form", choices=list(FORMS), default="labels", help="what to write (default: labels)")
    add("--model_name_or_path", help="whose tokenizer made the rows (default: the model that scored them)")
    add("--trust_remote_code", action="store_true", help="let the tokenizer run code of its own")
    add("--go_on", action="store_true", help="select by a score that judged rows do not show to be any good")
    selection = parser.add_argument_group("selection, as for `selsft train`")
    hints = get_type_hints(SelectiveSFTConfig)
    for item in dataclasses.fields(SelectiveSFTConfig):
        if item.name not in SELECTION:
            continue
        hint = hints[item.name]
        kind = next(each for each in (bool, int, float, str) if each in (hint, *get_args(hint)))
        selection.add_argument(
            f"--{item.name}",
            type=_boolean if kind is bool else kind,
            choices=item.metadata.get("choices"),
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=str(item.metadata["help"]).replace("%", "%%"),
        )
    return parser


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() == "true"


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    output: Path | None = arguments.output
    if output is None:
        raise InputError("--output is missing: give --output FILE.parquet, FILE.jsonl or FOLDER")
    if not is_scored(arguments.scored):
        raise InputError(f"{str(arguments.scored)!r} is no folder of `selsft score`: give one that it has written")
    if output.is_file() or (output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir())):
        raise InputError(f"--output {str(output)!r} exists and is not empty, nothing was overwritten: choose another")
    if output.suffix and output.suffix not in ENDINGS:
        raise InputError(f"--output {str(output)!r}: write {' or '.join(ENDINGS)}, or into a folder")
    options = {name: getattr(arguments, name) for name in (*SELECTION, "go_on") if hasattr(arguments, name)}

    from ..selection.export import export, write_rows

    folder = output.parent if output.suffix else output
    held = contextlib.nullcontext() if output.suffix else exclusive(folder, "--output")
    with resumable(folder, "--output", "nothing else is written, start it again"), held:
        make_writable(folder, "--output")
        with input_errors():
            rows, counts = export(
                arguments.scored, arguments.form, options, arguments.model_name_or_path, arguments.trust_remote_code
            )
        path = output if output.suffix else output / "train.parquet"
        with replaced(path) as file:
            write_rows(rows, file, path.suffix)
        if not output.suffix:
            write_card(folder, f"Rows of {arguments.scored.name} for other trainers, by `selsft export`.")
            record = {"command": "export", "arguments": argv, "finished": now(), "versions": versions()}
            write_json(folder / NAME, record | {"selection": options, "counts": counts})
    for line in _lines(counts, len(rows), arguments.form):
        print(line)
    print(f"Rows: {path}")
    return 0


def _lines(counts: dict[str, Any], written: int, form: str) -> list[str]:
    tokens = max(counts["tokens"], 1)
    shares = ", ".join(f"{counts[name] / tokens:.1%} {name}" for name in ("positive", "neutral", "negative"))
    lines = [f"{written:,} rows as {form}; of {counts['tokens']:,} supervised tokens {shares}"]
    if counts["left_out"]:
        lines.append(f"left out: {counts['left_out']:,} rows without a token to learn")
    if counts["unmarked"]:
        lines.append(f"{counts['unmarked']:,} negative tokens belong to the chat template and have no span")
    return lines
