"""Overrides of `SFTTrainer`, yours or another project's, together with token selection.

    python trl_subclass.py --model Qwen/Qwen3-0.6B --output runs/subclass

`SelectiveSFTTrainer` is an `SFTTrainer` that passes its own model to `super().compute_loss`. So an override that calls
`super()` works before it in the order of classes: here a learning rate for each layer, and a count of rows in the log.
Write overrides as a mixin, without `SFTTrainer` as its base, and they serve both trainers.
"""

import argparse

import torch
from datasets import Dataset

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", default="runs/subclass")
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()


class LayerwiseRates:
    """Lower layers learn more slowly. The method is `Trainer`'s, any trainer that derives from it can be behind."""

    decay = 0.9

    def create_optimizer(self, model=None):
        layers = self.model.config.num_hidden_layers
        groups = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                depth = next((int(part) for part in name.split(".") if part.isdigit()), layers)
                groups.setdefault(depth, []).append(parameter)
        rate = self.args.learning_rate
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": rate * self.decay ** (layers - depth)} for depth, p in groups.items()]
        )
        return self.optimizer


class CountsRows:
    """`compute_loss` of one's own: look at the batch, then call `super()`; the loss stays the selective one."""

    rows_seen = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.rows_seen += len(inputs["input_ids"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "rows_seen": self.rows_seen}, *args, **kwargs)


class MyTrainer(LayerwiseRates, CountsRows, SelectiveSFTTrainer):
    """The mixins come first. A `compute_loss` that never calls `super()` would replace the selective loss."""


answer = " White rice takes an hour, covered, over low heat."
wrong = [[answer.index("an hour"), answer.index("an hour") + len("an hour")]]
rows = Dataset.from_list([{"prompt": "How long does rice take?", "completion": answer, "spans": wrong}] * 8)
device = {"use_cpu": True, "bf16": False} if options.cpu else {"bf16": True}
args = SelectiveSFTConfig(options.output, max_steps=4, logging_steps=1, report_to="none", save_strategy="no", **device)
trainer = MyTrainer(options.model, args, train_dataset=rows)
trainer.train()
print(f"{trainer.rows_seen} rows, {len(trainer.optimizer.param_groups)} learning rates")
trainer.save_model()
