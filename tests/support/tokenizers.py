"""Tokenizers of the families that people train, made on the spot: the pre-tokenisers, normalisers, special tokens and
chat templates of the originals on a vocabulary of a few hundred."""

from __future__ import annotations

import functools
import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and doesn't stop. 1234 times!",
    "user assistant system naïve café über straße Ελλάδα привет мир",
    "שלום עולם مرحبا بالعالم 你好世界 こんにちは 한국어",
    "😀 👍🏽 👩‍👩‍👧 e\u0301 n\u0303o  double  spaces\n\nand lines\ttabs",
] * 20
BYTES = [f"<0x{value:02X}>" for value in range(256)]
# Splitting rules of the originals
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _byte_level(pattern: str, special: list[str], normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece(model, trainer, normalizer, pre_tokenizer, strip: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    tokenizer.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    state = json.loads(tokenizer.to_str())  # the bytes are ordinary tokens of the vocabulary
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(state))


def _with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


@functools.cache
def _built(name: str) -> tuple[str, dict]:
    if name == "llama3":
        special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
        tokenizer = _with_bos(_byte_level(LLAMA3, special), special[0])
        options = {"bos_token": special[0], "eos_token": special[1], "chat_template": LLAMA3_CHAT}
    elif name == "qwen":  # composes combining marks
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = _byte_level(QWEN2, special, normalizers.NFC())
        options = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    elif name == "gpt2":  # `trim_offsets` and a prefix space, as in RoBERTa
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = _byte_level(QWEN2, special)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        options = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    else:
        special = ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
        settings = {"special_tokens": [*special, *BYTES], "show_progress": False}
        bpe = functools.partial(models.BPE, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
        if name == "gemma":
            tokenizer = _sentencepiece(
                bpe(), trainers.BpeTrainer(vocab_size=400, **settings), normalizers.Replace(" ", "▁"),
                pre_tokenizers.Split(" ", "merged_with_previous"), strip=False,
            )  # fmt: skip
        elif name == "llama2":  # a dummy prefix on every stretch between special tokens
            tokenizer = _sentencepiece(
                bpe(), trainers.BpeTrainer(vocab_size=400, **settings),
                normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, strip=True,
            )  # fmt: skip
        elif name == "unigram":  # SentencePiece's default normaliser, white space collapsed, and no byte fallback
            tokenizer = _sentencepiece(
                models.Unigram(),
                trainers.UnigramTrainer(
                    vocab_size=380, unk_token="<unk>", initial_alphabet=["\n", *map(chr, range(33, 127))], **settings
                ),
                normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
                pre_tokenizers.Metaspace("▁", "always"), strip=True,
            )  # fmt: skip
        else:
            raise ValueError(name)
        tokenizer = _with_bos(tokenizer, "<bos>")
        chat = LLAMA2_CHAT if name == "llama2" else GEMMA_CHAT
        options = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "chat_template": chat}
        special = special[3:]
    return tokenizer.to_str(), {**options, "additional_special_tokens": special}


NAMES = ("llama3", "qwen", "gpt2", "gemma", "llama2", "unigram")


def family(name: str) -> PreTrainedTokenizerFast:
    text, options = _built(name)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), pad_token=options["eos_token"], **options
    )
