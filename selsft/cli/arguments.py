"""The flags of `train` and `score`: TRL's dataclasses, with `SelectiveSFTConfig` for `SFTConfig`, and YAML.

`trl.TrlParser` does the work. Added here: errors of one line instead of the usage of 250 flags, no abbreviated flags
(a misspelt one would set another), a help text with the important flags first, and recipes that ship with the package.
Rejected: new names for TRL's flags, since a command line of `trl sft` must work unchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from ..config import SelectiveSFTConfig
from ..data.foreign import FORMATS, with_format
from ..data.loading import DataSource, parse_columns
from ..errors import InputError, input_errors
from ..recipes import find_recipe
from ..secrets import to_environment

MODEL_MISSING = "model_name_or_path is missing: give --model_name_or_path NAME or FOLDER"
COMMON = (
    "config", "model_name_or_path", "dataset_name", "dataset_train_split", "dataset_test_split", "columns",
    "format",
    "output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "packing", "dtype", "bf16", "use_cpu", "use_peft", "lora_r",
    "lora_alpha", "eval_strategy",
    "report_to", "resume_from_checkpoint", "push_to_hub", "seed",
)  # fmt: skip


@dataclass
class DataArguments(ScriptArguments):
    """TRL's flags of the data set, and names for its columns."""

    columns: str | None = field(
        default=None,
        metadata={"help": "New names of the data's columns, as in prompt=question,completion=answer."},
    )
    format: str | None = field(
        default=None,
        metadata={"help": f"Read the file dataset_name as {', '.join(FORMATS)} (docs/formats.md)."},
    )

    def __post_init__(self):
        """The format goes in front of the name, which is how every other flag takes it."""
        self.dataset_name = with_format(self.dataset_name, self.format)


@dataclass
class Arguments:
    """Everything that a command was given.

    Args:
        launch: flags that are not ours, for `accelerate launch`.
        own: the flags that are, as they came from the command line.
        extra: an instance of the command's own dataclass, if it has one.
    """

    script: DataArguments
    training: SelectiveSFTConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    launch: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    extra: Any = None

    @property
    def source(self) -> DataSource:
        script = self.script
        name, config, split = script.dataset_name, script.dataset_config, script.dataset_train_split
        columns = parse_columns(script.columns)
        return DataSource(name, config, split, script.dataset_streaming, self.mixture, columns)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--flag VALUE` instead of `--flag FLAG, --other-spelling FLAG`."""
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else "VALUE"
        return f"{action.option_strings[0]} {choices}"


class SectionParser(TrlParser):
    """`TrlParser` with errors of one line and a help text in sections.

    Args:
        command: name after `selsft`.
    """

    def __init__(self, types: list[Any], command: str, description: str, examples: str):
        super().__init__(
            types,
            prog=f"selsft {command}",
            usage=f"selsft {command} [--config FILE.yaml] [--flag value ...]",
            description=description,
            epilog=examples,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))

    def _format(self, sections: dict[str, list[argparse.Action]]) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


class CommandParser(SectionParser):
    """The parser of one command that trains or scores.

    Args:
        extra: dataclass of flags that only this command has.
    """

    def __init__(self, command: str, description: str, examples: str, extra: type | None = None):
        self._extra = extra
        types: list[Any] = [DataArguments, SelectiveSFTConfig, ModelConfig, DatasetMixtureConfig]
        super().__init__([*types, extra] if extra else types, command, description, examples)

    def format_help(self) -> str:
        """Own flags, then the common ones; `--help_all` lists the rest."""
        shown = {name: actions for name, actions in self._sections().items() if actions}
        return self._format(shown) + (
            "\nAlso: --num_processes N and every other flag of `accelerate launch`, "
            "--accelerate_config NAME or FILE,\n"
            "and all flags of SFTConfig, TrainingArguments, ModelConfig and ScriptArguments: see --help_all.\n"
            f"\n{self.epilog}\n"
        )

    def format_help_all(self) -> str:
        return self._format({"all flags": self._actions})

    def _sections(self) -> dict[str, list[argparse.Action]]:
        by_name = {action.dest: action for action in reversed(self._actions)}
        config = argparse.Action(["--config"], "config", help="YAML file of flags, or the name of a recipe")
        by_name["config"] = config
        inherited = {item.name for item in dataclasses.fields(SFTConfig)}
        own = [item.name for item in dataclasses.fields(SelectiveSFTConfig) if item.name not in inherited]
        extra = [item.name for item in dataclasses.fields(self._extra)] if self._extra else []
        names = {"this command": extra, "scores, selection and forgetting": own, "common flags": COMMON}
        return {title: [by_name[name] for name in names] for title, names in names.items()}

    def parse(self, argv: list[str]) -> Arguments | None:
        """The arguments, or `None` after printing help.

        Raises:
            `InputError` for an unknown flag of the YAML file or the command line, a wrong type or choice, or settings
            that exclude each other.
        """
        if "-h" in argv or "--help" in argv:
            print(self.format_help())
            return None
        if "--help_all" in argv:
            print(self.format_help_all())
            return None
        argv = _with_config_path(argv)
        # TRL's own default for gradient_checkpointing sets this off in every run
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
        with input_errors():
            try:
                *parsed, in_file, in_line = self.parse_args_and_config(
                    argv, return_remaining_strings=True, separate_remaining_strings=True
                )
            except yaml.YAMLError as error:
                raise InputError(f"--config is not a YAML file: {error}") from error
            except ValueError as error:
                # The libraries' settings look at the machine, which means nothing while there is no model
                if not isinstance(error, InputError) and not self._names_a_model(argv):
                    raise InputError(MODEL_MISSING) from error
                raise
        # A sequence of its own: the same string may be a value of ours elsewhere
        own = _without(argv, in_line)
        script, training, model, mixture = parsed[:4]
        for part in parsed:
            to_environment(part.__dict__)
        launch = [*in_file, *in_line]
        self._check_unknown(launch)
        return Arguments(script, training, model, mixture, launch, own, parsed[4] if self._extra else None)

    @staticmethod
    def _names_a_model(argv: list[str]) -> bool:
        if any(part.split("=")[0] == "--model_name_or_path" for part in argv):
            return True
        file = argv[argv.index("--config") + 1] if "--config" in argv else None
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else None
        return isinstance(given, dict) and "model_name_or_path" in given

    def _check_unknown(self, launch: list[str]) -> None:
        """Flags that neither we nor `accelerate launch` know are spelling mistakes."""
        if not launch:
            return
        from accelerate.commands.launch import launch_command_parser

        known = set(launch_command_parser()._option_string_actions) | {"--accelerate_config"}
        if not launch[0].startswith("-"):
            raise InputError(f"unexpected argument {launch[0]!r}: every value needs a --flag before it")
        if "--stages" in (part.split("=")[0] for part in launch):
            raise InputError("--config is a recipe with stages: give it to `selsft run`")
        for part in launch:
            flag = part.split("=")[0]
            if flag.startswith("--") and flag not in known:
                close = difflib.get_close_matches(flag, [*self._option_string_actions, *known], n=1)
                hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help_all"
                raise InputError(f"unknown argument {flag}: {hint}")


def _with_config_path(argv: list[str]) -> list[str]:
    """`--config=FILE` as two parts, and the name of a recipe of the package as its path."""
    parts = [piece for part in argv for piece in (part.split("=", 1) if part.startswith("--config=") else [part])]
    if "--config" not in parts:
        return parts
    position = parts.index("--config") + 1
    if position == len(parts):
        raise InputError("--config needs a value: the path of a YAML file")
    parts[position] = str(find_recipe(parts[position], f"--config {parts[position]}"))
    return parts


def _without(parts: list[str], removed: list[str]) -> list[str]:
    """`parts` without the subsequence `removed`."""
    rest, kept = list(removed), []
    for part in parts:
        if rest and part == rest[0]:
            rest.pop(0)
        else:
            kept.append(part)
    return kept
