"""Token columns through TRL's data preparation: marks of the text, truncation, packing.

TRL truncates and packs `input_ids` and `labels` and either drops every other column or leaves it at its old length. So
rows that bring weights or scores are tokenised by TRL without truncation and packing, and both are done here over all
columns alike, with the same rules and `trl.pack_dataset`. Rejected: encoding a weight in the labels, which would leave
`-100` and the token id no room.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, pack_dataset
from trl.data_utils import get_dataset_column_names

from ..errors import InputError
from .alignment import Alignment
from .columns import BASE_LOGPS, NOISY_LOGPS, PROBE_SCORES, REF_LOGPS, TOKEN_SCORES, WEIGHTS, token_columns
from .spans import TokenMarks, chat_options, chat_renderer, has_marks, mark_tokens, read_marks, weight_of


def brings_weights(dataset: Dataset | IterableDataset, score: str = "influence", text_field: str = "text") -> bool:
    """Whether the rows of `dataset` bring weights, scores or marks of their own."""
    return bool(token_columns(dataset, score)) or has_marks(dataset, text_field)


def message_token_weights(
    messages: list[dict[str, Any]],
    input_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    default: float = 1.0,
    **template_kwargs,
) -> list[float]:
    """Weight of every token of a rendered conversation, from the `weight` (or `train`) of its messages.

    The tokens of a message are those between the rendering of the conversation before it (with the generation prompt,
    for an assistant) and the rendering that includes it: its text and the end-of-turn marker, not its header.

    Args:
        messages: `{"role", "content", "weight"}`, weight signed and finite.
        input_ids: the tokenised conversation, as the chat template renders it.
        default: weight of everything else.

    Raises:
        `ValueError` when the template does not render a prefix of the conversation as a prefix of the tokens, as
        templates that drop earlier reasoning do: then no span of tokens belongs to the message.
    """
    weights = [default] * len(input_ids)
    for position, message in enumerate(messages):
        weight = weight_of(message, f"message {position}")
        if weight is None or weight == default:
            continue
        before = _render(tokenizer, messages[:position], message["role"] == "assistant", template_kwargs)
        after = _render(tokenizer, messages[: position + 1], False, template_kwargs)
        if input_ids[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                f"the chat template renders message {position} ({message['role']}) differently when others follow, "
                "so its weight cannot be given to tokens: use a template that keeps earlier turns unchanged, or "
                f"bring a {WEIGHTS!r} column with the tokenised data"
            )
        weights[len(before) : len(after)] = [weight] * (len(after) - len(before))
    return weights


def _render(tokenizer, messages: list[dict], generation_prompt: bool, template_kwargs: dict) -> list[int]:
    if not messages:
        return []
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=True, **template_kwargs
    )
    return list(rendered["input_ids"])


def read_token_marks(
    example: dict[str, Any],
    row: int,
    tokenizer: PreTrainedTokenizerBase,
    alignment: Alignment,
    chat_template: str | None,
    text_field: str,
    judged: bool = False,
) -> TokenMarks:
    """What the marks of row number `row` say about its tokens. TRL has tokenised it and kept its text.

    Raises:
        `InputError` naming the row.
    """
    marks = read_marks(example, row, text_field, tokenizer.eos_token)
    options = chat_options(example, chat_template)
    ids = example["input_ids"]
    try:
        return mark_tokens(
            marks,
            ids,
            alignment,
            chat_renderer(example, tokenizer, chat_template),
            lambda messages, default: np.array(
                message_token_weights(messages, ids, tokenizer, default, **options), np.float32
            ),
            judged,
        )
    except ValueError as error:
        raise InputError(f"row {row}: {error}") from error


def add_marked_weights(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, args: SFTConfig
) -> Dataset | IterableDataset:
    """Add `token_weights` to rows that TRL has tokenised and that still have their text and its marks.

    Raises:
        `InputError` for the first row whose marks are wrong, naming it.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    alignment, text_field = Alignment(tokenizer), args.dataset_text_field

    def weigh(example, row):
        tokens = read_token_marks(example, row, tokenizer, alignment, chat_template, text_field)
        return {WEIGHTS: tokens.weights}

    options = _map_options(dataset, args, "Finding marked tokens")
    return dataset.map(weigh, with_indices=True, **options)


def truncate_and_pack(
    dataset: Dataset | IterableDataset, args: SFTConfig, packing: bool, score: str = "influence"
) -> Dataset | IterableDataset:
    """Truncate, drop fully masked rows, pack and shuffle as `SFTTrainer` does, over all token columns alike."""
    columns = ["input_ids", "labels", *token_columns(dataset, score)]
    if packing and "seq_lengths" in get_dataset_column_names(dataset):
        raise ValueError(
            "the train dataset is packed already (it has the column 'seq_lengths'), and packing it again would lose "
            "its document boundaries: bring one document a row, or set packing=False and padding_free=True"
        )
    _check_context(args, packing, columns)
    check_lengths(dataset, columns)
    if args.max_length is not None and not packing:
        kept = slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(None, args.max_length)
        dataset = dataset.map(
            lambda row: {name: row[name][kept] for name in columns},
            **_map_options(dataset, args, "Truncating train dataset"),
        )
        dataset = dataset.filter(
            lambda row: any(label != -100 for label in row["labels"]),
            **_map_options(dataset, args, "Dropping fully masked examples"),
        )
    if packing:
        if args.max_length is None:
            raise ValueError("packing=True needs max_length, which is None")
        dataset = dataset.select_columns(columns)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        options = _map_options(dataset, args, "Packing train dataset")
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, options)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    return dataset


def _check_context(args: SFTConfig, packing: bool, columns: list[str]) -> None:
    """A score depends on the tokens before it: dropping some of them would silently make it wrong."""
    cuts = (
        args.packing_strategy in ("wrapped", "bfd_split")
        if packing
        else (args.max_length is not None and args.truncation_mode == "keep_end")
    )
    scores = sorted({BASE_LOGPS, REF_LOGPS, NOISY_LOGPS, PROBE_SCORES, TOKEN_SCORES} & set(columns))
    if cuts and scores:
        how = f"packing_strategy={args.packing_strategy!r}" if packing else "truncation_mode='keep_end'"
        raise ValueError(
            f"the columns {scores} were computed in another context than {how} gives: pack or truncate before "
            "scoring, or use packing_strategy='bfd'"
        )


def check_lengths(dataset: Dataset | IterableDataset, columns: list[str]) -> None:
    """Raise `ValueError` for the first row of which one of `columns` has not one finite value per token, naming it.
    Streamed rows are checked by the collator, as they come."""
    if isinstance(dataset, IterableDataset):
        return
    start = 0  # first row of the chunk; a Python loop over tokens would take minutes on a large data set
    for chunk in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        tokens = pc.list_value_length(chunk["input_ids"]).to_numpy()
        for name in columns:
            column = chunk[name].combine_chunks()
            if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
                raise ValueError(
                    f"column {name!r} holds {column[0].as_py()!r} in row {start}, or another value that is no list: "
                    "it needs one number per token"
                )
            if not pa.types.is_primitive(column.type.value_type):
                raise ValueError(f"column {name!r} holds lists of something else than numbers")
            lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
            if (wrong := np.flatnonzero(lengths != tokens)).size:
                row = int(wrong[0])
                held = "nothing" if lengths[row] < 0 else f"{lengths[row]} values"
                raise ValueError(
                    f"row {start + row}: column {name!r} has {held} for {tokens[row]} tokens; it needs one value per "
                    "token"
                )
            if name in ("input_ids", "labels"):
                continue
            values = pc.cast(column.flatten(), pa.float64()).to_numpy(zero_copy_only=False)  # a missing one is NaN
            if (broken := np.flatnonzero(~np.isfinite(values))).size:
                row = int(np.searchsorted(np.cumsum(tokens), broken[0], side="right"))
                raise ValueError(f"row {start + row}: column {name!r} holds a value that is missing or not finite")
        start += len(tokens)


def _map_options(dataset: Dataset | IterableDataset, args: SFTConfig, description: str) -> dict[str, Any]:
    if isinstance(dataset, IterableDataset):  # knows neither workers nor a progress bar
        return {}
    return {"num_proc": args.dataset_num_proc, "desc": description}
