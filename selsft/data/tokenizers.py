"""What selsft asks of a tokenizer: which ids are special, and a hash of what it makes of text."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..records import json_sha256


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
