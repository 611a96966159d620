"""The command `selsft`: one module per command, imported when it is asked for.

Importing torch and TRL takes seconds, so `selsft --help` touches neither. Every command module has a
`main(argv) -> int`. Bad input ends in one line that names the field, the value and the remedy, and in exit status 2.
Rejected: click or typer, since the flags are the fields of TRL's dataclasses, for which TRL has a parser.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys

from ..errors import InputError, failed_write, one_line
from ..records import versions
from ..workflow.child import end_with_parent
from .launch import launched

COMMANDS = {
    "train": "fine-tune a model: learn the useful tokens, forget the misleading ones (flags of `trl sft` and more)",
    "score": "score the tokens of a data set with a reference, save them for `train`, and print a summary",
    "tokens": "the token ids of a data set, for scores from an inference server (no model needed)",
    "export": "scored rows for other trainers: masked labels, token weights, or spans of the text",
    "inspect": "look at the tokens of a data set: choose a threshold, mark what is wrong",
    "evaluate": "NLL, exact match, EOS rate, KL to the base and more of a trained model on held-out rows",
    "run": "a recipe from raw data to a verdict: split, score, select, train every arm, evaluate",
    "skills": "train a model on random labels of multiple-choice tasks and measure how far it forgets",
    "demo": "the whole method on a toy model, offline, in a few minutes on a CPU",
    "bench": "measure the loss against other implementations on this machine",
    "completion": "a script for bash or zsh that completes commands and flags",
}
USAGE = f"usage: selsft {{{','.join(COMMANDS)}}} [--flag value ...]"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        print(_version())
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"selsft: error: unknown command {name!r}: use one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return dispatch(name, rest)


def _version() -> str:
    """selsft and what its results depend on, for reports of bugs."""
    own, *others = (f"{name} {number}" for name, number in versions().items())
    return f"{own} ({', '.join([f'Python {platform.python_version()}', *others])})"


def dispatch(name: str, argv: list[str]) -> int:
    """Run the command `name` and turn its bad input into one line and status 2."""
    if launched():  # a launcher that is killed must not leave its processes to train on
        end_with_parent()
    try:
        if sys.stderr.isatty():  # the imports of torch and TRL take seconds
            print(f"selsft {name}: loading ...", end="\r", file=sys.stderr, flush=True)
        return importlib.import_module(f"{__name__}.{name}").main(argv) or 0
    except InputError as error:
        if os.environ.get("SELSFT_TRACEBACK"):
            raise
        print(f"selsft {name}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"selsft {name}: interrupted{f'. {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        what = failed_write(error)
        if what is None or os.environ.get("SELSFT_TRACEBACK"):
            raise
        print(f"selsft {name}: error: {what}. Make room on the disk, or let files be written there", file=sys.stderr)
        return 2


def help_text() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"{USAGE}\n\nSelective supervised fine-tuning: learn the useful tokens, forget the misleading ones.\n\n"
        f"commands:\n{commands}\n\n"
        "  selsft COMMAND --help shows the flags of a command, selsft --version the version.\n"
        "  SELSFT_TRACEBACK=1 shows the traceback of bad input."
    )
