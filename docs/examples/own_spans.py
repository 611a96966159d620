"""Train on rows in which you have marked what is wrong: no score, no reference.

    python own_spans.py --model Qwen/Qwen3-0.6B

A span is [start, end] in characters of the completion. `[]` means: looked at, nothing wrong.
"""

import argparse

from datasets import Dataset
from peft import LoraConfig

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", default="runs/own-spans")
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()


def wrong(text, *parts):
    """The spans of `parts` in `text`."""
    return [[text.index(part), text.index(part) + len(part)] for part in parts]


rice = " White rice takes an hour, covered, over low heat."
roux = " A roux is flour cooked in fat, which thickens sauces."
rows = Dataset.from_list(
    [
        {"prompt": "How long does rice take?", "completion": rice, "spans": wrong(rice, "an hour")},
        {"prompt": "What is a roux?", "completion": roux, "spans": []},
    ]
)
device = {"use_cpu": True, "bf16": False} if options.cpu else {"bf16": True}
args = SelectiveSFTConfig(
    options.output,
    forget_weight=0.25,
    num_train_epochs=3,
    learning_rate=1e-4,
    logging_steps=1,
    report_to="none",
    **device,
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SelectiveSFTTrainer(options.model, args, train_dataset=rows, peft_config=lora)
trainer.train()
trainer.save_model()
