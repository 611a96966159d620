"""Skills whose answer is known: nouns with two independent properties, asked for in three ways.

`hot_yes` and `warm_yes` ask for the same property with the same labels in other words: one rule. `size` asks for the
other property with labels of its own. A question is a noun and a filler word; test questions are pairs that are not in
train, so that a model that knows the nouns can answer them.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selsft.skills import train
from selsft.skills.config import StudyConfig
from selsft.skills.suite import load_task

NOUNS = [f"noun{i}" for i in range(32)]
FILLERS = [f"filler{i}" for i in range(8)]
TASKS = {
    "hot_yes": ("is {noun} hot with {filler} ?", ("no", "yes"), 0),
    "warm_yes": ("{filler} and then {noun} warm ?", ("no", "yes"), 0),
    "size": ("the {noun} of {filler} has size", ("small", "large"), 1),
}


def properties(seed: int = 0) -> dict[str, tuple[int, int]]:
    """Of each noun; each of the four combinations equally often, so that one says nothing about the other."""
    rng = random.Random(seed)
    combinations = [pair for pair in itertools.product((0, 1), repeat=2) for _ in range(len(NOUNS) // 4)]
    rng.shuffle(combinations)
    return dict(zip(NOUNS, combinations, strict=True))


def write_tasks(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    bits = properties(seed)
    for name, (template, options, which) in TASKS.items():
        rng = random.Random(f"{name} {seed}")
        rows = []
        for noun in NOUNS:
            fillers = FILLERS[:]
            rng.shuffle(fillers)
            for place, filler in enumerate(fillers):
                rows.append(
                    {
                        "id": f"{name}-{noun}-{filler}",
                        "prompt": template.format(noun=noun, filler=filler),
                        "options": list(options),
                        "gold": bits[noun][which],
                        "split": "train" if place < 6 else "test",
                    }
                )
        rng.shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = [word for template, options, _ in TASKS.values() for word in [*template.split(), *options]]
    vocabulary = ["<pad>", "<eos>", *NOUNS, *FILLERS, *(w for w in dict.fromkeys(words) if "{" not in w)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    tok = tokenizer()
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_model(folder: Path, tasks: Path, seed: int = 0, epochs: float = 8.0) -> Path:
    """A base model that has seen a part of all tasks: what it is fine-tuned on is not new to it."""
    config = StudyConfig(
        tasks=",".join(TASKS),
        model_name_or_path="none",
        output_dir="none",
        use_cpu=True,
        per_device_train_batch_size=16,
    )
    tok = tokenizer()
    rows = [row for name in TASKS for row in train.answer_rows(tok, load_task(name, tasks).train)]
    made = train.train(model(seed), tok, rows, config, learning_rate=3e-3, epochs=epochs, seed=seed)
    made.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder
