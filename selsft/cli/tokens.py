"""`selsft tokens`: the token ids of a data set as training and scoring see them, for an inference server.

Takes the flags of `score`, so that one YAML file serves both, and needs of the model its tokenizer alone. Rejected:
rows that somebody tokenised by himself, whose template, truncation and EOS must agree token by token.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from trl import SFTTrainer

from ..data.cards import write_card
from ..data.chunks import TokenChunk, supervised_mask, token_chunks
from ..data.loading import data_errors, load_splits
from ..data.rows import Split
from ..data.source_rows import numbered, write_source_rows
from ..data.spans import refuse_late_marks
from ..data.tokenizers import set_up, tokenizer_sha256
from ..data.validation import read_model_facts, validate_rows
from ..errors import InputError, input_errors
from ..records import now, replaced, versions, write_json
from ..score import check_prepared, check_unmarked, row_settings
from ..scoring.settings import TokensArguments
from .arguments import MODEL_MISSING, Arguments, CommandParser
from .launch import at_work
from .manifest import NAME
from .train import check_new

DESCRIPTION = (
    "Write the token ids of a data set to Parquet, as `selsft score` sees them with the same flags, for an inference "
    "server or another program that computes log-probabilities. Of the model only the tokenizer is read. Hand what "
    "comes back to `selsft score --ref_logps FOLDER`, which compares the ids one by one."
)
EXAMPLES = """examples:
  selsft tokens --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --tokens_dir runs/tokens
  selsft tokens --config recipe.yaml --tokens_dir runs/tokens"""

# The libraries' settings look at the machine, which does not matter here
ANY_MACHINE = ["--use_cpu", "true", "--bf16", "false"]


def main(argv: list[str]) -> int:
    arguments = CommandParser("tokens", DESCRIPTION, EXAMPLES, TokensArguments).parse([*ANY_MACHINE, *argv])
    if arguments is None:
        return 0
    if arguments.launch:
        raise InputError(f"unknown argument {arguments.launch[0]}: selsft tokens runs in one process")
    training, extra = arguments.training, arguments.extra
    folder, field = (
        Path(str(extra.tokens_dir or training.output_dir)),
        "tokens_dir" if extra.tokens_dir else "output_dir",
    )
    if extra.part_tokens < 1:
        raise InputError(f"part_tokens={extra.part_tokens} must be at least 1")
    if not arguments.model.model_name_or_path:
        raise InputError(MODEL_MISSING)
    arguments.source.check()
    check_new(folder, field, "choose another folder")
    with at_work(folder, field, "what is there is not complete: remove it and start again"):
        counts = _write(arguments, folder)
    print(
        f"{counts['rows']:,} rows, {counts['tokens']:,} tokens, {counts['supervised']:,} of them supervised: {folder}"
    )
    return 0


def _write(arguments: Arguments, folder: Path) -> dict[str, int]:
    training = arguments.training
    source, _ = load_splits(arguments.source, None, training.dataset_text_field, strict=True)
    check_unmarked(source, training.dataset_text_field)
    with input_errors(), data_errors(arguments.source):
        facts = read_model_facts(
            str(arguments.model.model_name_or_path), revision=arguments.model.model_revision,
            trust_remote_code=training.trust_remote_code, chat_template_path=training.chat_template_path,
        )  # fmt: skip
        validate_rows(source, facts, training)
        tokenizer = facts.tokenizer
        template = set_up(tokenizer, vars(training))
        args = row_settings(training, folder)
        prepared = _prepared(numbered(source), tokenizer, args, template)
        sha256 = tokenizer_sha256(tokenizer, template)
        counts = {"rows": 0, "tokens": 0, "supervised": 0}
        chunks = token_chunks(prepared, ["input_ids", "labels"], arguments.extra.part_tokens, documents=True)
        for index, chunk in enumerate(chunks):
            check_prepared(chunk, facts.context)
            _write_part(folder / f"part-{index:05d}.parquet", chunk, sha256)
            counts["rows"] += len(chunk.lengths)
            counts["tokens"] += chunk.size
            counts["supervised"] += int(supervised_mask(chunk, padding_free=False).sum())
        write_source_rows(folder, source, prepared)
    write_card(folder, "Token ids, by `selsft tokens`.")
    record = {"command": "tokens", "arguments": arguments.own, "finished": now(), "versions": versions(), **counts}
    facts_of = {"model": arguments.model.model_name_or_path, "tokenizer_sha256": sha256}
    write_json(folder / NAME, record | facts_of | {"data": arguments.source.description})
    return counts


def _prepared(data: Split, tokenizer: Any, args: Any, template: str | None) -> Split:
    """The rows as `SFTTrainer` prepares them; its method needs no more of the trainer than is set here."""
    first: dict[str, Any] = next(iter(data), {})
    completion_only = args.completion_only_loss
    if completion_only is None:
        completion_only = {"prompt", "completion"} <= set(first)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=completion_only)
    data = refuse_late_marks(data)
    return SFTTrainer._prepare_dataset(cast(Any, trainer), data, tokenizer, args, args.packing, None, "train")


def _write_part(path: Path, chunk: TokenChunk, sha256: str) -> None:
    offsets = pa.array(np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32))
    flat = {name: pa.array(np.asarray(chunk.columns[name]), pa.int32()) for name in ("input_ids", "labels")}
    table = pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()})
    with replaced(path) as file:
        pq.write_table(table.replace_schema_metadata({"tokenizer_sha256": sha256}), file)
