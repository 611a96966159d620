"""Flags of `selsft evaluate`, and the names of its files."""

from __future__ import annotations

from dataclasses import dataclass, field

METRICS, ROWS = "metrics.json", "rows.parquet"


@dataclass
class EvaluateArguments:
    """Flags of `selsft evaluate` only."""

    evaluation_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results, which must not exist. Default: output_dir."}
    )
    base_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model that the KL divergence compares with. Default: the base of an adapter, and no KL "
            "divergence for a full model."
        },
    )
    max_new_tokens: int = field(
        default=128, metadata={"help": "Longest answer that is generated. 0 generates nothing."}
    )
    eval_rows: int | None = field(
        default=None, metadata={"help": "Evaluate this many rows, drawn with `seed`. Default: all."}
    )
    eval_batch_tokens: int = field(default=8192, metadata={"help": "Tokens of a forward pass, padding included."})
    neutral_text: str | None = field(
        default=None,
        metadata={"help": "Text file, or data file with a column `text`, to take the perplexity of."},
    )
    neutral_block: int = field(default=512, metadata={"help": "Tokens of a block of the neutral text."})
    neutral_tokens: int = field(
        default=50_000, metadata={"help": "About how many tokens of the neutral text are read."}
    )
    options_file: str | None = field(
        default=None,
        metadata={"help": "JSONL file of multiple-choice questions (id, prompt, options, gold, split)."},
    )
    lm_eval_tasks: str | None = field(
        default=None, metadata={"help": "Tasks of lm-evaluation-harness, with commas. Needs selsft[lm-eval]."}
    )
    lm_eval_limit: int | None = field(default=None, metadata={"help": "Documents of each such task. Default: all."})
    lm_eval_include: str | None = field(
        default=None,
        metadata={"help": "Folder of task files (YAML) of your own; then lm_eval_tasks names tasks of this folder."},
    )
