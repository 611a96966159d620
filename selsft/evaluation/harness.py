"""Tasks of lm-evaluation-harness on a trained model, with the extra `selsft[lm-eval]`.

The harness has hundreds of published tasks and their prompts; rewriting any of them would give numbers that compare
with nobody's. It is an extra because it brings about forty packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..training.model import Model


def run_harness(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: str | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of each task, by name, as the harness calls them (`acc`, `acc_norm`, `acc_stderr`, ...).

    Args:
        tasks: names of tasks of the harness, or of YAML files in `include_path`.
        limit: documents of each task; all when `None`.
        include_path: folder of task files of one's own; the tasks of the harness are then not listed, which takes it
            seconds.

    Raises:
        `ImportError` without the extra, `ValueError` for a task that the harness does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"lm_eval_tasks={','.join(tasks)} needs lm-evaluation-harness, which is not installed: "
            "pip install 'selsft[lm-eval]'"
        ) from error
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm_eval_tasks={unknown[0]!r} is not a task of lm-evaluation-harness: `lm-eval ls tasks` lists them"
        )
    training = model.training
    try:  # `HFLM` leaves the model in evaluation mode
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        measured: Any = simple_evaluate(
            model=harness, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0
        )
    finally:
        model.train(training)
    return {
        task: {
            key.replace(",none", ""): float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in measured["results"].items()
    }
