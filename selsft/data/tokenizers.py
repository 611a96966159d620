"""What selsft asks of a tokenizer: to be set up as for training, which ids are special, a hash of what it makes of
text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..errors import InputError, first_line
from ..records import json_sha256


def load_tokenizer(name: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that made some rows.

    Raises:
        `InputError` without a name, and where there is no tokenizer.
    """
    if not name:
        raise InputError("model_name_or_path is missing: give the model whose tokenizer made the rows")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer at {name!r} ({first_line(error)}): give --model_name_or_path NAME or FOLDER"
        ) from error


def set_up(tokenizer: PreTrainedTokenizerBase, flags: Mapping[str, Any]) -> str | None:
    """Set special tokens and chat template of a tokenizer, in place, as `SFTTrainer` does under these settings.

    Returns:
        the chat template that it renders with instead of the tokenizer's own, if any.
    """
    if flags.get("eos_token"):
        tokenizer.eos_token = flags["eos_token"]
    tokenizer.pad_token = flags.get("pad_token") or tokenizer.pad_token or tokenizer.eos_token
    if source := flags.get("chat_template_path"):
        if Path(source).is_file():
            tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(source).chat_template
    if flags.get("assistant_only_loss") and not has_generation_markers(tokenizer.chat_template):
        return get_training_chat_template(tokenizer)
    return None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of EOS, chat markers and all other special tokens, `(n,)` int64."""
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    return np.unique(np.array([*tokenizer.all_special_ids, *added], dtype=np.int64))


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of which text each id stands for: all that matters to rows that are tokens already."""
    return json_sha256(tokenizer.get_vocab())


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> str:
    """Hash of what a tokenizer makes of text: its vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        rules = {
            key: value for key, value in rules.items() if key not in ("truncation", "padding")
        }  # of the last call
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = chat_template or tokenizer.chat_template or ""
    parts = [json.dumps(rules, sort_keys=True), special, json.dumps(template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
