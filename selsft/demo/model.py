"""The demo's tokenizer, its tiny Llama, and the rows they train on.

Everything is made on the spot, so the demo needs no network and no download. A pretrained model of a few hundred
megabytes would be more lifelike, but it would know the facts already and would not train in seconds on two cores.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selsft.demo.world import Statement

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(statements: Iterable[Statement], vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    texts = (s.prompt + s.response for s in statements)
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=1, special_tokens=[BOS, EOS, PAD], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left"
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, hidden_size: int = 128, layers: int = 3
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(statement: Statement, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """One training row: `input_ids`, `labels` (the response only), `noise_mask` (1 on the wrong tokens) and
    `part_lengths` (tokens of the response before, in and after the answer).

    Prompt and response parts are tokenised one by one, so an answer never shares a token with its surroundings and the
    mask is exact. A wrong answer that begins like the right one is wrong only from where they part.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before, answer, after = (ids(part) for part in statement.parts)
    noise = [0] * len(answer)
    if statement.wrong:
        right = ids(f" {statement.fact.answer}")
        same = 0
        while same < min(len(answer), len(right)) and answer[same] == right[same]:
            same += 1
        # A wrong answer that is a prefix of the right one has no wrong token of its own: blame its last.
        noise = [int(i >= min(same, len(answer) - 1)) for i in range(len(answer))]
    prompt = [tokenizer.bos_token_id, *ids(statement.prompt)]
    response = [*before, *answer, *after, tokenizer.eos_token_id]
    mask = [0] * len(before) + noise + [0] * (len(after) + 1)
    return {
        "input_ids": prompt + response,
        "labels": [-100] * len(prompt) + response,
        "noise_mask": [0] * len(prompt) + mask,
        "part_lengths": [len(before), len(answer), len(after) + 1],
    }


def encode_all(statements: Iterable[Statement], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    return Dataset.from_list([encode(s, tokenizer) for s in statements])
