"""Flags of `selsft score` and `selsft tokens`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.chunks import TOKENS_PER_CHUNK

ENGINES = ("processes", "ray")


@dataclass
class ScoreArguments:
    """Flags of `selsft score` only."""

    scored_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the scores: new, or one that this command has begun. Default: output_dir."},
    )
    show_tokens: int = field(default=10, metadata={"help": "How many of the most negative tokens to print."})
    shard_tokens: int = field(
        default=TOKENS_PER_CHUNK,
        metadata={"help": "Tokens of a shard: what is in memory at once, and what an interrupt can cost."},
    )
    base_logps: str | None = field(
        default=None,
        metadata={
            "help": "Parquet file or folder with the log-probabilities under the model, computed elsewhere: one row "
            "per document with input_ids and base_logps or logps."
        },
    )
    ref_logps: str | None = field(
        default=None, metadata={"help": "The same for the reference, instead of --reference_model."}
    )
    mixed_batches: bool = field(
        default=False,
        metadata={
            "help": "Score model and reference in one forward pass where both are LoRA adapters of one model: faster "
            "for small batches, twice the memory, equal to rounding."
        },
    )
    engine: str = field(
        default="processes",
        metadata={
            "help": "What runs the models: the processes of this command, or workers on a Ray cluster (pip install "
            "'selsft[ray]'), to which RAY_ADDRESS leads; without it Ray starts on this machine.",
            "choices": list(ENGINES),
        },
    )
    ray_workers: int | None = field(
        default=None,
        metadata={"help": "How many Ray workers. Default: one per GPU of the cluster, without GPUs one per node."},
    )
    rescore: bool = field(default=False, metadata={"help": "Remove the scores in the folder, whatever made them."})


@dataclass
class TokensArguments:
    """Flags of `selsft tokens` only."""

    tokens_dir: str | None = field(
        default=None, metadata={"help": "Folder for the token ids, which must be new. Default: output_dir."}
    )
    part_tokens: int = field(
        default=TOKENS_PER_CHUNK, metadata={"help": "Tokens of a file: what a server scores before anything is kept."}
    )
