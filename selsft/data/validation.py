"""Rows against the model that reads them, before its weights are loaded: chat template, marks, context, vocabulary.

`validate_rows` is what every command calls before anything expensive. Rejected: naming the row when TRL has failed,
which is after the model was loaded, and for rows that only a later stage sees after hours of training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names, maybe_convert_to_chatml

from .._compat import find_adapter_config_file
from ..errors import InputError, first_line
from .columns import SCORE_COLUMNS, TOKEN_COLUMNS
from .preparation import check_lengths
from .rows import IDS, PAIR, Split, check_rows, form_of
from .spans import check_marks, has_marks, join_parts, read_marks

_PEEK = 1000  # rows that are looked at for a warning
_ENDS, _BEGINS = re.compile(r"[A-Za-z0-9?!.,:;]\Z"), re.compile(r"[A-Za-z0-9]")


@dataclass(frozen=True)
class ModelFacts:
    """What rows must fit, known without the weights of a model.

    Attributes:
        processor: its tokenizer, or the processor that holds it.
        template: chat template of the run; `None` where there is none.
        context: tokens that the model can see; `None` where its configuration does not say.
        vocabulary: number of token ids; likewise.
    """

    processor: Any
    template: str | None
    context: int | None = None
    vocabulary: int | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processor, "tokenizer", self.processor)


def read_model_facts(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, chat_template_path: str | None = None
) -> ModelFacts:
    """Tokenizer and configuration of a model, or of an adapter's base.

    Raises:
        `InputError` naming the flag.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if find_adapter_config_file(name, revision=revision) is not None:
        name = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path or name
    else:
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(name, **options).get_text_config()
        processor = AutoProcessor.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model_name_or_path={name!r} cannot be loaded: {first_line(error)}") from error
    template = processor.chat_template
    if chat_template_path is not None:  # as SFTTrainer reads it
        try:
            path = Path(chat_template_path)
            if path.is_file() and path.suffix in (".jinja", ".j2"):
                template = path.read_text(encoding="utf-8")
            else:
                template = AutoTokenizer.from_pretrained(chat_template_path).chat_template
        except (OSError, ValueError) as error:
            raise InputError(
                f"chat_template_path={chat_template_path!r} is neither a .jinja file nor a model with a template: "
                f"{first_line(error)}"
            ) from error
    context = getattr(config, "max_position_embeddings", None)
    return ModelFacts(processor, template, context, getattr(config, "vocab_size", None))


def validate_rows(
    data: Split, facts: ModelFacts, args: SFTConfig, *, what: str = "the data", context: bool = True
) -> str | None:
    """Raise for the first row that a model cannot be trained on or scored with, before anything is computed.

    Of a stream the columns alone are looked at: its rows are checked as they come.

    Args:
        data: raw or tokenised rows.
        args: what decides tokens: `dataset_text_field`, `max_length`, `assistant_only_loss`.
        what: the data, in words.
        context: refuse rows that are longer than the model's context after truncation. Plain training takes them, as
            `SFTTrainer` does; a score of a token beyond the context means nothing.

    Returns:
        a warning where prompts run into their completions.

    Raises:
        `InputError` as `check_rows`; for messages without a chat template or that it cannot render; for marks of a
        wrong form; for token columns of another length than the tokens, and ids that the model does not have; for
        rows beyond the context.
    """
    text_field = args.dataset_text_field
    names = get_dataset_column_names(data)
    check_marks(data, text_field)
    check_rows(data, text_field, what=what)
    if isinstance(data, IterableDataset) or {"image", "images"} & set(names):
        return None
    limit = facts.context if context else None
    if limit is not None and args.max_length is not None and args.max_length <= limit:
        limit = None  # rows are cut before they reach it
    if form_of(data, text_field) == IDS:
        _check_ids(data, facts.vocabulary, limit, args.max_length, what)
        return None
    row = maybe_convert_to_chatml(dict(data[0]))
    value = row.get("messages", row.get("prompt"))
    if isinstance(value, list) and facts.template is None:
        raise InputError(
            f"row 0 of {what} has messages, and the model's tokenizer has no chat template to render them with: give "
            "--chat_template_path FILE.jinja or the name of a model with a template, or bring 'prompt' and "
            "'completion' as text"
        )
    marked = has_marks(data, text_field)
    if isinstance(value, list) or marked or limit is not None:
        rows = join_parts(data) if marked else data
        for number, row in enumerate(rows):
            row = maybe_convert_to_chatml(dict(row))
            if marked:
                read_marks(row, number, text_field)
            text = _text(row, facts, args, f"row {number} of {what}")
            if limit is not None and len(text.encode()) + 2 > limit:  # a token spells a byte or more, but BOS and EOS
                count = len(facts.tokenizer(text, add_special_tokens=not isinstance(value, list))["input_ids"])
                if count > limit:
                    raise _too_long(f"row {number} of {what}", count, limit)
    return _glued(data, facts, what) if isinstance(value, str) else None


def _text(row: Mapping[str, Any], facts: ModelFacts, args: SFTConfig, where: str) -> str:
    """A row as the text that is tokenised; that of a conversation which only a processor can render is empty."""
    messages = row.get("messages")
    if isinstance(row.get("completion"), list):
        messages = [*row["prompt"], *row["completion"]]
    if not isinstance(messages, list):
        pair = isinstance(row.get("completion"), str)
        text = row["prompt"] + row["completion"] if pair else row[args.dataset_text_field]
        end = facts.tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end
    if args.assistant_only_loss and not any(message.get("role") == "assistant" for message in messages):
        raise InputError(
            f"{where} has no message of the role 'assistant', which assistant_only_loss=True trains on: remove the "
            "row, or set assistant_only_loss to false"
        )
    if facts.processor is not facts.tokenizer:
        return ""
    try:
        tools = row.get("tools")
        rendered = facts.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=facts.template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        )
    except Exception as error:  # a template is code
        raise InputError(
            f"{where}: the chat template cannot render its messages ({type(error).__name__}: {first_line(error)}): "
            "repair or remove the row, or give another --chat_template_path"
        ) from error
    return str(rendered)


def _too_long(where: str, count: int, limit: int) -> InputError:
    return InputError(
        f"{where} has {count} tokens, more than the model's context of {limit}: set --max_length {limit} or less, or "
        "split the row"
    )


def _check_ids(data: Dataset, vocabulary: int | None, limit: int | None, max_length: int | None, what: str) -> None:
    names = get_dataset_column_names(data)
    columns = ["input_ids", *({"labels", *TOKEN_COLUMNS, *SCORE_COLUMNS.values()} & set(names))]
    check_lengths(data, columns)
    start = 0
    for chunk in data.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
        column = chunk["input_ids"].combine_chunks()
        ids = column.flatten()
        ends = pc.min_max(ids).as_py()
        if ids and vocabulary is not None and not (ends["min"] >= 0 and ends["max"] < vocabulary):
            outside = pc.or_(pc.less(ids, 0), pc.greater_equal(ids, vocabulary))
            place = pc.index(outside, True).as_py()
            row = int(pc.list_parent_indices(column)[place].as_py())
            raise InputError(
                f"row {start + row} of {what}: input_ids holds {ids[place].as_py()}, and the model has the "
                f"tokens 0 to {vocabulary - 1}: tokenise the rows with this model's tokenizer"
            )
        if limit is not None:
            lengths = pc.list_value_length(column)
            lengths = lengths if max_length is None else pc.min_element_wise(lengths, max_length)
            if (row := pc.index(pc.greater(lengths, limit), True).as_py()) >= 0:
                raise _too_long(f"row {start + row} of {what}", lengths[row].as_py(), limit)
        start += len(chunk)


def _glued(data: Dataset, facts: ModelFacts, what: str) -> str | None:
    """Prompt and completion are joined as they are, so a missing space glues two words together."""
    if form_of(data) != PAIR:
        return None
    rows = data.select(range(min(len(data), _PEEK)))
    glued = [
        number for number, row in enumerate(rows) if _ENDS.search(row["prompt"]) and _BEGINS.match(row["completion"])
    ]
    if len(glued) <= len(rows) / 2:
        return None
    row = rows[glued[0]]
    remedy = "end the prompts with a space or a newline"
    if facts.template is not None:
        remedy = f"bring messages, which the model's chat template renders, or {remedy}"
    return (
        f"prompts run into their completions, as in row {glued[0]} of {what}: "
        f"{row['prompt'][-20:] + row['completion'][:20]!r}: {remedy}"
    )
