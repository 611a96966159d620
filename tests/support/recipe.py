"""A recipe for a tiny model, and a run of it in the test's own process, where everything is imported."""

from __future__ import annotations

import importlib
from pathlib import Path

from selsft.errors import InputError
from selsft.pipeline.plan import Plan
from selsft.pipeline.recipe import load_recipe

RECIPE = {
    "model_name_or_path": "model",
    "dataset_name": "rows.jsonl",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "max_steps": 3,
    "learning_rate": 1.0e-2,
    "max_length": 32,
    "use_peft": True,
    "lora_target_modules": ["q_proj", "v_proj"],
    "negative_threshold": 0.01,
    "stages": {
        "split": {"reference_size": 0.3, "eval_size": 5},
        "reference": {"learning_rate": 2.0e-2},
        "evaluate": {"max_new_tokens": 3},
    },
}


def run_here(command, argv):
    """A command in this process, where everything is imported."""
    if status := importlib.import_module(f"selsft.cli.{command}").main(argv):
        raise InputError(f"selsft {command} ended in status {status}")


def plan(*overrides, root="run", run=run_here, source="recipe.yaml"):
    return Plan(load_recipe(source, list(overrides)), Path(root), run)
