"""`selsft skills`: make a model forget skills and measure how far the forgetting reaches.

The work is in `selsft.skills`; here are the flags. Rejected: `CommandParser`, whose 250 flags belong to one training
run, where a study has two kinds of them.
"""

from __future__ import annotations

import argparse
import dataclasses

import yaml

from ..errors import InputError, input_errors
from ..secrets import to_environment
from ..skills.config import StudyConfig
from .arguments import SectionParser, _with_config_path
from .launch import launched

DESCRIPTION = (
    "Fine-tune a model on multiple-choice tasks, make it forget each of them by random labels or by a token "
    "objective, and score every model on every task: the protocol of Zhang et al. (arXiv 2409.02228) with documented "
    "choices."
)
EXAMPLES = """examples:
  selsft skills --tasks copa,sst2,wic --tasks_dir DATA --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
      --methods uniform,flip,npo --seeds 3 --output_dir runs/skills --dry_run
  selsft skills --tasks arc_easy,boolq --model_name_or_path Qwen/Qwen3-0.6B --use_peft --output_dir runs/hub
  selsft skills --config study.yaml --tasks skills21"""
# Sections of the help text by the first flag of each
_SECTIONS = {
    "tasks": "what is studied",
    "options": "data",
    "learning_rate": "training",
    "score_train": "measuring",
    "keep_models": "the run",
}


class SkillsParser(SectionParser):
    def __init__(self):
        super().__init__([StudyConfig], "skills", DESCRIPTION, EXAMPLES)

    def format_help(self) -> str:
        by_name = {action.dest: action for action in reversed(self._actions)}
        sections: dict[str, list[argparse.Action]] = {}
        title = ""
        for item in dataclasses.fields(StudyConfig):
            title = _SECTIONS.get(item.name) or title
            sections.setdefault(title, []).append(by_name[item.name])
        return f"{self._format(sections)}\nAlso: --config FILE.yaml with flags as keys.\n\n{self.epilog}\n"

    def parse(self, argv: list[str]) -> StudyConfig | None:
        """The settings, or `None` after printing help.

        Raises:
            `InputError` for a flag that does not exist, of the command line or of the YAML file, or a value that
            cannot be used.
        """
        if "-h" in argv or "--help" in argv:
            print(self.format_help())
            return None
        with input_errors():
            try:
                config, *rest = self.parse_args_and_config(_with_config_path(argv), return_remaining_strings=True)
            except yaml.YAMLError as error:
                raise InputError(f"--config is not a YAML file: {error}") from error
            if rest[0]:
                raise InputError(f"unknown argument {rest[0][0]}: see selsft skills --help")
            to_environment(config.__dict__)
        return config


def main(argv: list[str]) -> int:
    config = SkillsParser().parse(argv)
    if config is None:
        return 0
    if launched():
        raise InputError("selsft skills runs in one process: start it without accelerate launch or torchrun")
    from ..skills.study import Study  # torch and the libraries take seconds

    with input_errors():
        study = Study(config)
    if config.dry_run:
        study.dry_run()
    else:
        study.run()
    return 0
