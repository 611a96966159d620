"""Models, tokenizers and data that tests make on the spot: two layers, a vocabulary of 300, no download."""

from __future__ import annotations

import functools

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{a} {b} user assistant" for a in WORDS for b in WORDS], trainer)
    return tokenizer.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


def small() -> dict:
    """Settings of a model that trains in milliseconds."""
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }


def llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**small(), **overrides}))


def sentence(index: int, words: int = 5) -> str:
    return " ".join(WORDS[(index * 7 + step * (index % 5 + 1)) % len(WORDS)] for step in range(words))


def text_data(rows: int = 24) -> Dataset:
    return Dataset.from_dict({"text": [sentence(i, 3 + i % 6) for i in range(rows)]})


def prompt_data(rows: int = 24) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [sentence(i, 2 + i % 3) for i in range(rows)],
            "completion": [" " + sentence(i + 3, 2 + i % 4) for i in range(rows)],
        }
    )


def chat_data(rows: int = 24) -> Dataset:
    return Dataset.from_dict(
        {
            "messages": [
                [
                    {"role": "user", "content": sentence(i, 3)},
                    {"role": "assistant", "content": sentence(i + 1, 2 + i % 4)},
                    {"role": "user", "content": sentence(i + 2, 2)},
                    {"role": "assistant", "content": sentence(i + 4, 3)},
                ]
                for i in range(rows)
            ]
        }
    )


def tokenised_data(rows: int = 24, prompt: int = 3, **columns) -> Dataset:
    """Rows of different lengths whose first `prompt` tokens have no label."""
    tok = tokenizer()
    ids = [tok(sentence(i, 3 + i % 6))["input_ids"] + [tok.eos_token_id] for i in range(rows)]
    labels = [[-100] * prompt + row[prompt:] for row in ids]
    made = {name: [function(index, row) for index, row in enumerate(ids)] for name, function in columns.items()}
    return Dataset.from_dict({"input_ids": ids, "labels": labels, **made})


def architectures() -> dict:
    """A config class and its settings for each family whose head or loss is special in some way."""
    import transformers as hf

    size = small()
    no_groups = {key: value for key, value in size.items() if key != "num_key_value_heads"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    return {
        "llama": (hf.LlamaConfig, size),
        "tied": (hf.LlamaConfig, {**size, "tie_word_embeddings": True}),
        "qwen2": (hf.Qwen2Config, size),
        "qwen3": (hf.Qwen3Config, {**size, "head_dim": 8}),
        "gemma2_softcap": (hf.Gemma2Config, {**size, "head_dim": 8, "final_logit_softcapping": 2.0}),
        "cohere_logit_scale": (hf.CohereConfig, {**size, "logit_scale": 0.25}),
        "granite_logits_scaling": (hf.GraniteConfig, {**size, "logits_scaling": 3.0}),
        "gpt_neox": (hf.GPTNeoXConfig, no_groups),
        "phi_head_bias": (hf.PhiConfig, size),
        "phi3": (hf.Phi3Config, size),
        "qwen3_moe": (hf.Qwen3MoeConfig, {**size, **experts, "head_dim": 8, "router_aux_loss_coef": 0.1}),
    }


def build(name: str, seed: int = 0):
    """A random model of a family, with a random head bias where it has one (zeros would hide a dropped bias)."""
    from transformers import AutoModelForCausalLM

    config_class, settings = architectures()[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**settings), attn_implementation="eager")
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model.float()
