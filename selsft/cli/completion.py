"""`selsft completion bash|zsh`: a script that completes commands and their flags.

The flags are written into the script: asking a parser at each press of Tab would import torch. Rejected: shtab and
argcomplete, which know neither the flags that a YAML parser hands on nor those of a stage.
"""

from __future__ import annotations

import argparse
import importlib

from ..errors import InputError
from . import COMMANDS

SHELLS = ("bash", "zsh")
HELP = """usage: selsft completion {bash,zsh}

For this shell: eval "$(selsft completion bash)". Better, save it once in a file."""
SCRIPT = """_selsft() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    if [[ "$COMP_CWORD" -gt 1 && "$word" != -* ]]; then COMPREPLY=($(compgen -f -- "$word"))
    else COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}}
complete -o filenames -F _selsft selsft"""


def main(argv: list[str]) -> int:
    if argv in (["-h"], ["--help"]):
        print(HELP)
        return 0
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise InputError(f"completion needs the name of a shell: {' or '.join(SHELLS)}")
    cases = "\n".join(f'            {name}) words="{" ".join(flags_of(name))}" ;;' for name in COMMANDS)
    script = SCRIPT.format(commands=" ".join(COMMANDS), cases=cases)
    print("autoload -U +X bashcompinit && bashcompinit\n" * (argv[0] == "zsh") + script)
    return 0


def flags_of(command: str) -> list[str]:
    """The flags of a command, sorted."""
    from ..evaluation.settings import EvaluateArguments
    from ..scoring.settings import ScoreArguments, TokensArguments
    from .arguments import CommandParser
    from .skills import SkillsParser

    parser: argparse.ArgumentParser
    more: set[str] = set()
    extra: dict[str, type | None] = {
        "train": None,
        "score": ScoreArguments,
        "tokens": TokensArguments,
        "evaluate": EvaluateArguments,
    }
    if command in extra:
        parser = CommandParser(command, "", "", extra[command])
        more = {"--config", "--help_all"}
    elif command == "run":
        parser, more = CommandParser("train", "", ""), {"--dry_run", "--from"}
    elif command == "skills":
        parser, more = SkillsParser(), {"--config"}
    elif command == "completion":
        return []
    else:
        elsewhere = {"demo": "..demo.run", "bench": "..bench.kernels"}
        place = elsewhere.get(command, f".{command}")
        module = importlib.import_module(place, __package__)
        make = next(getattr(module, name) for name in ("_parser", "make_parser", "parser") if hasattr(module, name))
        parser = make()
    return sorted({flag for flag in parser._option_string_actions if flag.startswith("--")} | more)
