"""One seed of the demo, from the world to the table: what is trained, in which order, and what is kept.

The arms are `workflow.arms.compare_arms`; they start from the same base and are scored by the same reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from selsft.config import SelectiveSFTConfig
from selsft.demo.evaluate import Scores, answers, questions
from selsft.demo.model import encode_all, make_model, train_tokenizer
from selsft.demo.train import Recipe, train_model
from selsft.demo.world import World, WorldConfig, make_world
from selsft.evaluation.metrics import auc
from selsft.records import read_json
from selsft.trainer import SelectiveSFTTrainer
from selsft.workflow.arms import compare_arms
from selsft.workflow.quiet import QUIET, quiet
from selsft.workflow.run import execute
from selsft.workflow.stage import RECORD, Stage

ARMS = ("base", "reference", "plain SFT", "ignore negatives", "forget negatives")
# Whatever the defaults are: the demo's figures were made with these
RULE = {
    "score_base_weight": 1.0,
    "score_pooling": "token",
    "negative_threshold": 1.0,
    "forget_objective": "unlikelihood",
}


@dataclass(frozen=True)
class DemoConfig:
    """The settings were chosen on seeds 100 and 101 (docs/demo.md); the demo reports others."""

    world: WorldConfig = field(default_factory=WorldConfig)
    vocab_size: int = 1000
    hidden_size: int = 128
    layers: int = 3
    pretraining: Recipe = field(default_factory=lambda: Recipe(epochs=8, learning_rate=3e-3, weight_decay=0.01))
    reference: Recipe = field(default_factory=lambda: Recipe(epochs=5, learning_rate=1e-3))
    training: Recipe = field(default_factory=lambda: Recipe(epochs=3, learning_rate=5e-4))
    forget_weight: float = 1.0
    samples_per_group: int = 3


@dataclass
class Sample:
    """A training sentence: `pieces` of the response are (text, negative, wrong on purpose)."""

    group: str
    prompt: str
    pieces: list[tuple[str, bool, bool]]


@dataclass
class TokenStats:
    """The scores and the negatives of the training split, compared with the known mask, without EOS."""

    tokens: int
    wrong_share: float
    auc: float
    auc_answers: float
    """Among the tokens of answers only, where telling right from wrong is harder."""
    negative_share: float
    precision: float
    recall: float
    recall_systematic: float
    recall_random: float
    true_target: float
    """Share of the negatives that belong to a right answer, or its frame, about a target fact."""
    true_known: float
    """The same for known facts: negative because the reference has forgotten them."""


@dataclass
class SeedResult:
    seed: int
    sizes: dict[str, int]
    scores: dict[str, Scores]
    tokens: TokenStats
    samples: list[Sample]
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each model, with its evaluation where it is an arm."""


def _negatives(row: dict) -> list[bool]:
    """The supervised tokens that are not positive: weight 0 where negatives are ignored, else below."""
    return [w <= 0 and label != -100 for w, label in zip(row["token_weights"], row["labels"], strict=True)]


def token_stats(world: World, rows: Dataset, eos: int) -> TokenStats:
    """`rows` are the training rows in the order of `world.training`, with the columns that the trainer has added."""
    score, wrong, negative, answer, groups = [], [], [], [], []
    for statement, row in zip(world.training, rows, strict=True):
        kind = world.kinds.get(statement.fact, "known")
        spans = np.cumsum([0, *row["part_lengths"]])
        first = row["labels"].count(-100)
        negatives = _negatives(row)
        for t, label in enumerate(row["labels"]):
            if label in (-100, eos):
                continue
            score.append(row["ref_logps"][t] - row["base_logps"][t])
            wrong.append(row["noise_mask"][t] == 1)
            negative.append(negatives[t])
            answer.append(spans[1] <= t - first < spans[2])
            groups.append(kind)
    values, is_wrong, is_negative = np.array(score), np.array(wrong), np.array(negative)
    is_answer, kinds = np.array(answer), np.array(groups)

    def share(part: np.ndarray, of: np.ndarray) -> float:
        return float(part[of].mean()) if of.any() else float("nan")

    return TokenStats(
        tokens=len(values),
        wrong_share=float(is_wrong.mean()),
        auc=auc(-values, is_wrong),
        auc_answers=auc(-values[is_answer], is_wrong[is_answer]),
        negative_share=float(is_negative.mean()),
        precision=share(is_wrong, is_negative),
        recall=share(is_negative, is_wrong),
        recall_systematic=share(is_negative, is_wrong & (kinds == "systematic")),
        recall_random=share(is_negative, is_wrong & (kinds == "random")),
        true_target=share(~is_wrong & (kinds != "known"), is_negative),
        true_known=share(kinds == "known", is_negative),
    )


def pick_samples(
    world: World, rows: Dataset, tokenizer: PreTrainedTokenizerFast, seed: int, per_group: int
) -> list[Sample]:
    """Sentences drawn at random from each group, so that misses show as often as they occur."""
    groups: dict[str, list[int]] = {
        "wrong, systematic": [],
        "wrong, random": [],
        "right": [],
        "right, false alarm": [],
    }
    for i, (statement, row) in enumerate(zip(world.training, rows, strict=True)):
        if statement.wrong:
            groups[f"wrong, {world.kinds[statement.fact]}"].append(i)
        else:
            groups["right, false alarm" if any(_negatives(row)) else "right"].append(i)
    rng = random.Random(seed)
    samples = []
    for group, indices in groups.items():
        for i in sorted(rng.sample(indices, min(per_group, len(indices)))):
            samples.append(Sample(group, world.training[i].prompt, _pieces(rows[i], tokenizer)))
    return samples


def _pieces(row: dict, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, bool, bool]]:
    """Tokens of one style are decoded together, since a letter beyond ASCII can be split over several tokens."""
    runs: list[tuple[list[int], bool, bool]] = []
    for token, label, negative, wrong in zip(
        row["input_ids"], row["labels"], _negatives(row), row["noise_mask"], strict=True
    ):
        if label == -100 or token == tokenizer.eos_token_id:
            continue
        style = (negative, bool(wrong))
        if runs and runs[-1][1:] == style:
            runs[-1][0].append(token)
        else:
            runs.append(([token], *style))
    return [(str(tokenizer.decode(ids)), negative, wrong) for ids, negative, wrong in runs]


def run_seed(seed: int, config: DemoConfig, folder: Path, echo: Callable[[str], None] = print) -> SeedResult:
    """One seed in `folder`: base and reference, then the arms. Interrupted, it resumes at the stage that it was in."""
    world = make_world(seed, config.world)
    tokenizer = train_tokenizer(world.pretraining, config.vocab_size)
    noisy = encode_all(world.training, tokenizer)
    base, reference = model_stages(world, tokenizer, seed, config, folder)
    with quiet():
        execute([base, reference], folder, {"seed": seed}, echo=echo)
        models = {stage.name: stage.folder / "model" for stage in (base, reference)}
        scored = {"reference_model": str(models["reference"]), **RULE}
        compared = compare_arms(
            models["base"],
            noisy,
            questions(world, tokenizer),
            {
                "plain": {},
                "ignore": {**scored, "forget_weight": 0.0},
                "forget": {**scored, "forget_weight": config.forget_weight},
            },
            folder / "arms",
            seeds=[seed + 2],
            settings=config.training.settings(len(noisy)),
            untrained=models,
            measure=answers,
            echo=echo,
        )
        rows = _scored_rows(models["base"], noisy, config, {**scored, "forget_weight": 0.0}, folder / "arms")
    start = make_model(tokenizer, seed, config.hidden_size, config.layers)
    sizes = {
        "known facts": len(world.known),
        "target facts": len(world.target),
        "systematically wrong facts": len(world.myths),
        "pretraining statements": len(world.pretraining),
        "reference statements": len(world.reference),
        "training statements": len(world.training),
        "wrong training statements": sum(s.wrong for s in world.training),
        "held-out questions": len(world.questions(world.target)),
        "parameters": start.num_parameters(),
        "vocabulary": len(tokenizer),
    }
    names = dict(zip(ARMS, ("base", "reference", "plain", "ignore", "forget"), strict=True))
    made = [base.folder, reference.folder, *(compared.folders[names[arm]][0] for arm in ARMS[2:])]
    return SeedResult(
        seed,
        sizes,
        {arm: Scores(**{k: compared.mean(name, k) for k in compared.values[name]}) for arm, name in names.items()},
        token_stats(world, rows, tokenizer.eos_token_id),
        pick_samples(world, rows, tokenizer, seed, config.samples_per_group),
        {arm: read_json(each / RECORD)["seconds"] for arm, each in zip(ARMS, made, strict=True)},
    )


def model_stages(world: World, tokenizer: Any, seed: int, config: DemoConfig, root: Path) -> tuple[Stage, Stage]:
    """The stages that pretrain the base and fine-tune it into the reference, in `root`."""
    settings = {**asdict(config), "seed": seed}
    sizes = {key: settings[key] for key in ("world", "vocab_size", "hidden_size", "layers", "seed")}

    def pretrain(folder: Path) -> None:
        start = make_model(tokenizer, seed, config.hidden_size, config.layers)
        rows = encode_all(world.pretraining, tokenizer)
        train_model(start, tokenizer, rows, config.pretraining, seed, folder / "model")

    def train_reference(folder: Path) -> None:
        start = LlamaForCausalLM.from_pretrained(base.folder / "model")
        rows = encode_all(world.reference, tokenizer)
        train_model(start, tokenizer, rows, config.reference, seed + 1, folder / "model")

    base = Stage("base", {**sizes, "recipe": settings["pretraining"]}, {}, pretrain, root)
    reference = {**sizes, "recipe": settings["reference"]}
    return base, Stage("reference", reference, {"base": base}, train_reference, root)


def _scored_rows(base: Path, rows: Dataset, config: DemoConfig, arm: dict[str, Any], folder: Path) -> Dataset:
    """The rows of an arm with the columns that its trainer adds; their scores are read from the arms' cache."""
    settings = {**config.training.settings(len(rows)), **QUIET, **arm}
    args = SelectiveSFTConfig(output_dir=str(folder), scoring_cache_dir=str(folder / "scores"), **settings)
    return cast(Dataset, SelectiveSFTTrainer(str(base), args, train_dataset=rows).train_dataset)
