"""A LoRA adapter on messy data, with a reference trained on rows that you trust.

    python domain_lora.py --model Qwen/Qwen3-0.6B --messy messy.jsonl --trusted trusted.jsonl --heldout heldout.jsonl

The files have `prompt` and `completion`, `messages`, or `text`. `--cpu` runs without a GPU.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer, evaluate

parser = argparse.ArgumentParser()
for name in ("model", "messy", "trusted", "heldout"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--output", default="runs/domain-lora")
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()


def rows(path):
    return load_dataset("json", data_files=path, split="train")


def settings(name, **changes):
    common = {"max_length": 1024, "learning_rate": 1e-4, "report_to": "none", "save_strategy": "no"}
    device = {"use_cpu": True, "bf16": False} if options.cpu else {"bf16": True}
    return SelectiveSFTConfig(f"{options.output}/{name}", **{**common, **device, **changes})


def train(name, data, **changes):
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SelectiveSFTTrainer(options.model, settings(name, **changes), train_dataset=data, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return trainer.args.output_dir


# Gently: what a reference has forgotten looks like noise to it
reference = train("reference", rows(options.trusted), learning_rate=5e-5)
plain = train("plain", rows(options.messy))
# forget_weight=0 ignores the negative tokens, the default also lowers their likelihood
selective = train("selective", rows(options.messy), reference_model=reference, forget_weight=0.0)

for name, model in (("plain", plain), ("selective", selective)):
    found = evaluate(model, rows(options.heldout), args=settings("unused"), max_new_tokens=64)
    print(
        f"{name:10} nll {found.metrics['nll']:.4f}",
        {k: found.metrics[k] for k in ("exact_match",) if k in found.metrics},
    )
