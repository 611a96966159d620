"""The demo's world as files: a base model and three data sets, for `selsft run demo`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from selsft.demo.experiment import DemoConfig
from selsft.demo.model import encode, make_model, train_tokenizer
from selsft.demo.train import train_model
from selsft.demo.world import Statement, accepted, make_world


def write_world(folder: Path, seed: int = 0, countries: int | None = None, epochs: float | None = None) -> None:
    """Write `base/` (model and tokenizer, trained here), `reference.jsonl`, `train.jsonl` and `eval.jsonl`.

    Args:
        countries: how many of the countries the world has; all when `None`.
        epochs: of pretraining; the demo's own number when `None`.
    """
    config = DemoConfig()
    world = make_world(seed, replace(config.world, countries=countries))
    tokenizer = train_tokenizer(world.pretraining, config.vocab_size)
    recipe = config.pretraining if epochs is None else replace(config.pretraining, epochs=epochs)

    def rows(statements: list[Statement], answers: bool = False) -> list[dict]:
        return [
            {name: encoded[name] for name in ("input_ids", "labels")}
            | ({"answers": sorted(accepted(statement.fact, statement.answer))} if answers else {})
            for statement in statements
            for encoded in [encode(statement, tokenizer)]
        ]

    for name, statements in (("reference", world.reference), ("train", world.training)):
        _write(folder / f"{name}.jsonl", rows(statements))
    _write(folder / "eval.jsonl", rows(world.questions(world.target), answers=True))

    from datasets import Dataset

    pretraining = Dataset.from_list(rows(world.pretraining))
    start = make_model(tokenizer, seed, config.hidden_size, config.layers)
    train_model(start, tokenizer, pretraining, recipe, seed, folder / "base")


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
