"""Multiple-choice data sets as `SkillTask`s: JSONL, BIG-bench task files, and tasks of lm-evaluation-harness by name.

The JSONL format is the project's own: one question a line, `{"id", "prompt", "options", "gold", "split"}` and, when
there is one, `"group"` and `"delimiter"`. Rejected: `datasets.load_dataset` for it, which turns a bad row into an
Arrow error without a line number.
"""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..evaluation.examples import SPLITS, MultipleChoiceExample, read_examples
from .tasks import SkillTask, split_by_group


def read_jsonl(path: Path, name: str | None = None, test_fraction: float = 0.4, seed: int = 0) -> SkillTask:
    """A task from a JSONL file. Where no row has a `split`, one is drawn by `group` (or prompt).

    Raises:
        `ValueError` for the first row that cannot be used, with file and line.
    """
    examples, with_split = read_examples(path)
    if not with_split:
        examples = split_by_group(examples, test_fraction, seed)
    return _task(name or path.stem, examples, {"file": path.name, "own_split": not with_split})


def _task(name: str, examples: Iterable[MultipleChoiceExample], source: dict[str, Any]) -> SkillTask:
    rows = list(examples)
    train, test = ([e for e in rows if e.split == split] for split in SPLITS)
    return SkillTask(name, train, test, source=source)


def read_bigbench(path: Path, name: str | None = None, test_fraction: float = 0.4, seed: int = 0) -> SkillTask:
    """A task from the `task.json` of a BIG-bench task, in its 0-shot form `Q: ...\\nA:`.

    BIG-bench has no splits: one is drawn by prompt. Rows without exactly one best option are dropped and counted. The
    canary is kept in `source` and out of every prompt.

    Raises:
        `ValueError` when the file is not a multiple-choice task of BIG-bench.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    rows = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: no 'examples': is this the task.json of a BIG-bench task?")
    prefix = content.get("task_prefix", "")
    before, after = content.get("example_input_prefix", "\nQ: "), content.get("example_output_prefix", "\nA: ")
    examples: list[MultipleChoiceExample] = []
    dropped: dict[str, int] = defaultdict(int)
    name = name or (path.parent.name if path.name == "task.json" else path.stem)
    for number, row in enumerate(rows):
        scores = row.get("target_scores") if isinstance(row, dict) else None
        if not isinstance(scores, dict) or not isinstance(row.get("input"), str):
            raise ValueError(
                f"{path}: examples[{number}] lacks 'input' or 'target_scores': not a multiple-choice task"
            )
        best = [option for option, score in scores.items() if score == max(scores.values())]
        if len(best) != 1 or len(scores) < 2:
            dropped["no single best option"] += 1
            continue
        options = list(scores)
        prompt = f"{prefix}{before}{row['input']}{after}".strip()
        examples.append(MultipleChoiceExample(f"{name}-{number}", prompt, tuple(options), options.index(best[0])))
    if not examples:
        raise ValueError(f"{path}: none of the {len(rows)} examples has exactly one best option")
    source = {"file": path.name, "canary": content.get("canary"), "own_split": True}
    task = _task(name, split_by_group(examples, test_fraction, seed), source)
    task.dropped = dict(dropped)
    return task


def read_lm_eval(
    name: str | dict[str, Any],
    test_fraction: float = 0.4,
    seed: int = 0,
    task_manager: Any = None,
    label: str | None = None,
) -> SkillTask:
    """A multiple-choice task of lm-evaluation-harness with its 0-shot prompts, from the hub or where its YAML says.

    Train rows come from its training split and test rows from its test split, or from its validation split where it
    has no test split or only an unlabelled one that the harness does not use. Without a training split the rows that
    there are get one of our own. A task that puts each option into the prompt and scores one ending (WinoGrande) is
    turned around: the prompt is what the options share, an option is its rest of the sentence.

    Args:
        name: of a task, or the settings of one as a dict.
        task_manager: `lm_eval.tasks.TaskManager`; by default one that knows the harness's own tasks (built once, 9 s).
        label: what to call the task; its name by default.

    Raises:
        `ImportError` without the extra, `ValueError` for a task that is unknown, cannot be loaded (no network) or is
        not a multiple-choice task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"the task {name!r} is read through lm-evaluation-harness: pip install 'selsft[lm-eval]', or give a "
            "folder of JSONL files with --tasks_dir"
        ) from error
    if task_manager is None:
        task_manager = _manager(TaskManager)
    shown = name if isinstance(name, str) else str(name.get("task"))
    try:
        loaded = task_manager.load([name])["tasks"]
    except Exception as error:  # the hub, a data set that is gone, a YAML file: the harness has no error of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        offline = " (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set)" if _offline() else ""
        raise ValueError(
            f"the task {shown!r} of lm-evaluation-harness could not be loaded{offline}: {reason}. Check the name "
            "(`lm-eval ls tasks`) and the network, or give a folder of JSONL files with --tasks_dir"
        ) from error
    if len(loaded) != 1:
        raise ValueError(f"{shown!r} is a group of {len(loaded)} tasks: name them one by one ({', '.join(loaded)})")
    (task,) = loaded.values()
    if task.OUTPUT_TYPE != "multiple_choice":
        raise ValueError(f"the task {shown!r} has output_type={task.OUTPUT_TYPE!r}: only multiple_choice has options")
    examples, has_train = [], task.has_training_docs()
    dropped: dict[str, int] = defaultdict(int)
    held_out = (
        task.test_docs() if task.has_test_docs() else task.validation_docs() if task.has_validation_docs() else []
    )
    for split, docs in (("train", task.training_docs() if has_train else []), ("test", held_out)):
        for number, doc in enumerate(docs or []):
            try:
                examples.append(_from_document(task, doc, f"{shown}-{split}-{number}", split))
            except ValueError:
                dropped["no gold answer among the options"] += 1
    if not examples:
        raise ValueError(f"the task {shown!r} has no labelled rows")
    own = not (has_train and any(e.split == "train" for e in examples) and any(e.split == "test" for e in examples))
    if own:
        examples = split_by_group(examples, test_fraction, seed)
    made = _task(label or shown, examples, {"lm_eval": shown, "version": task.VERSION, "own_split": own})
    made.dropped = dict(dropped)
    return made


@functools.cache
def _manager(kind: type) -> Any:
    return kind()


def _offline() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def _from_document(task: Any, doc: Any, name: str, split: str) -> MultipleChoiceExample:
    text, choices, target = task.doc_to_text(doc), list(task.doc_to_choice(doc)), task.doc_to_target(doc)
    delimiter = task.config.target_delimiter
    if isinstance(text, int):  # the options are contexts, the target is what follows each of them
        texts = [f"{choice}{delimiter}{target}" for choice in choices]
        shared = os.path.commonprefix(texts)  # noqa: RUF071 (of texts, not of paths)
        shared = shared[: shared.rfind(" ") + 1].rstrip()  # whole words
        options, gold, text, delimiter = [rest[len(shared) :].lstrip() for rest in texts], text, shared, " "
    elif isinstance(target, int):
        options, gold = choices, target
    elif target in choices:
        options, gold = choices, choices.index(target)
    else:
        raise ValueError(f"target {target!r} is not among the options")
    return MultipleChoiceExample(name, text, tuple(options), gold, split, delimiter=delimiter)
