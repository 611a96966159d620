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
