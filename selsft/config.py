"""`SelectiveSFTConfig`: `SFTConfig` plus what to call a negative token and how to forget it.

Only settings live here; what they mean is in `selection.py`, `schedules.py`, `reference.py` and
`selsft_kernels.objectives`. A nested dataclass per topic was rejected: TRL's command line and YAML files are flat.
"""

from __future__ import annotations

import copy
import math
import numbers
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from selsft_kernels.objectives import FORGET, FORGET_OBJECTIVES

SCORES = ("influence", "excess", "surprisal", "probe", "contrast", "random", "oracle", "given")
POOLINGS = ("token", "word", "word_sum", "span", "row")
WORD_POOLINGS = ("word", "word_sum", "span")
# Defaults where none is given, chosen by the worst of five sets (docs/scores.md); the presets of the papers have their
# own. beta of `influence`; how scores are pooled, `token` for all others; the share that is positive where neither
# `negative_threshold` nor `positive_fraction` is set, since a number of nats means another share on every set; the
# threshold of all other scores: a probability of being wrong above one half for `probe`, a nat
SCORE_BASE_WEIGHT = 0.5
DEFAULT_POOLINGS = {"influence": "word_sum", "surprisal": "word_sum", "probe": "word"}
POSITIVE_FRACTIONS = {"influence": 0.95, "surprisal": 0.95}
NEGATIVE_THRESHOLDS = {"probe": 0.5}
NEGATIVE_THRESHOLD = 1.0
SCOPES = ("global", "sequence", "batch")
FORGET_SCHEDULES = ("linear", "constant", "cosine")

# Taheri et al., arXiv 2508.04329, as its code runs: the worst 30 % of the response tokens are negative, whether they
# are noise or not, and their log-likelihood is descended without a bound, with a weight that grows to 0.25.
# Use it as `SelectiveSFTConfig(output_dir, reference_model=..., **PAPER_2508_04329)`.
PAPER_2508_04329: dict[str, Any] = {
    "score_base_weight": 1.0,
    "score_pooling": "token",
    "positive_fraction": 0.7,
    "selection_scope": "global",
    "protect_special_tokens": False,
    "forget_objective": "gradient_ascent",
    "forget_weight": 0.25,
    "forget_schedule": "linear",
    "forget_normalization": "separate",
}

# Lin et al., arXiv 2404.07965 (Rho-1, selective language modelling): of the tokens of each optimizer step those are
# trained that the current model is furthest behind the reference on; the others are dropped. 0.6 is the share of the
# 1.1B model, 0.7 that of the 7B one.
RHO_1_2404_07965: dict[str, Any] = {
    "score": "excess",
    "selection_scope": "batch",
    "positive_fraction": 0.6,
    "protect_special_tokens": False,
    "forget_weight": 0.0,
}

# Pang et al., arXiv 2502.01968 (Token Cleaning, fixed model): influence ranked over the whole pool, the rest dropped.
# The self-evolving variant runs these settings part by part with a reference that moves (docs/schemes.md).
TOKEN_CLEANING_2502_01968: dict[str, Any] = {
    "score": "influence",
    "score_base_weight": 1.0,
    "score_pooling": "token",
    "selection_scope": "global",
    "positive_fraction": 0.6,
    "protect_special_tokens": False,
    "forget_weight": 0.0,
}

_FORGET_HELP = ", ".join(f"'{name}' {(each.loss.__doc__ or '').split('`')[1]}" for name, each in FORGET.items())


@dataclass
class SelectiveSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`SelectiveSFTTrainer`].

    This class includes only the parameters that selective fine-tuning adds. For all others, please refer to the
    [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`] documentation.

    Parameters:
        > Parameters that control the scores

        reference_model (`str`, *optional*):
            Model that the tokens are scored with: model id on the Hub, folder of a model, folder or id of a LoRA
            adapter of the trained model's base (then one model is in memory and the adapter is switched), or `"base"`
            for the base of the trained adapter. A model that is already loaded goes to the trainer's argument of the
            same name. Without reference and without `token_weights` column the trainer is `SFTTrainer`.
        reference_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`] of the reference, for example
            `{"dtype": "bfloat16"}`. `trust_remote_code` is taken from the field of that name unless it is given here.
        score (`str`, *optional*, defaults to `"influence"`):
            Score of a token, high = useful; docs/scores.md has formulas, costs and what each is worth. `"influence"`
            is its log-probability under the reference minus `score_base_weight` times that under the model as it is at
            the start of training, in nats (arXiv 2508.04329). `"excess"` is the same against the current model,
            computed anew in every optimizer step (arXiv 2404.07965). `"surprisal"` is the log-probability under the
            model at the start alone. `"probe"` is minus the probability of being wrong that a probe of the model's
            hidden states gives (`probe`). `"contrast"` is the log-probability under the reference minus that under
            `noisy_reference_model` (arXiv 2603.01185). Controls: `"random"` is a seeded random ranking, `"oracle"`
            makes the tokens of the column `negative_mask` negative, `"given"` ranks by the column `token_scores`.
        score_base_weight (`float`, *optional*, defaults to `0.5`):
            beta of `"influence"`; the papers have 1. With 0 the score is the log-probability under the reference.
        score_pooling (`str`, *optional*):
            `"token"` leaves scores as they are; `"word"` gives a token the lowest score of its word, `"word_sum"` the
            sum over its word, `"span"` the lowest from the beginning of its word up to itself, `"row"` the mean of its
            row (of its document, in packed rows). Defaults to `"word_sum"` for `"influence"` and `"surprisal"`, to
            `"word"` for `"probe"`, else to `"token"`.
        score_row_worst (`int`, *optional*):
            With `score_pooling="row"`: the mean of so many lowest scores instead of all.
        score_lookahead (`float`, *optional*, defaults to `0.0`):
            Weight of the next token's score, which is added before scores are pooled.
        noisy_reference_model (`str`, *optional*):
            Reference trained on the noisy data, for `score="contrast"`; in the forms of `reference_model`.
        probe (`str`, *optional*):
            Folder of a saved probe, for `score="probe"`: the folder `probe` within a folder of `selsft score`. It must
            have been fitted on this model's weights and with this tokenizer.
        judged (`str`, *optional*):
            For `selsft score`: file or name of judged rows (docs/spans.md), on which the score is measured, a probe is
            fitted and a threshold is chosen.
        judged_test (`str`, *optional*):
            For `selsft score`: judged rows that nothing is fitted on.
        judged_group (`str`, *optional*):
            For `selsft score`: column of the judged rows; rows with equal values are kept in one fold when a probe is
            fitted. By default each row is by itself.
        target_precision (`float`, *optional*):
            For `selsft score`: precision that the threshold is chosen for, on judged rows that the score was not
            fitted on.
        probe_clean (`str`, *optional*):
            For `selsft score`: file or name of clean rows. The probe is fitted on these, damaged by rules, instead of
            on judged rows.
        probe_corruptions (`str`, *optional*):
            Rules that damage them, separated by commas: `swap`, `delete`, `double`, `inflect`, `spell`, `function`,
            `replace`, `insert`, `case` (all of these by default), or `answer` by itself.
        go_on (`bool`, *optional*, defaults to `False`):
            Whether to select by a score that judged rows do not show to be better than chance.
        precompute_scores (`bool`, *optional*, defaults to `True`):
            Whether to score the whole train dataset before training, with a cache on disk. If `False`, and always for
            streamed data, every batch is scored in the step that trains on it.
        scoring_batch_tokens (`int`, *optional*):
            Tokens per device and forward pass while scoring, padding included; rows of like length go together.
            Defaults to `per_device_eval_batch_size * max_length`.
        scoring_batch_size (`int`, *optional*):
            Rows per device and forward pass while scoring, whatever their length, instead of a number of tokens.
        scoring_cache_dir (`str`, *optional*):
            Folder of the cached log-probabilities. Defaults to the folder `selsft` beside the cache of `datasets`.

        > Parameters that control the selection

        negative_threshold (`float`, *optional*):
            A token is negative when its score is below minus this value, in nats; for `score="probe"` when its
            probability of being wrong is above it. Unless `positive_fraction` is set, defaults to what a scored folder
            was given by `target_precision`, else to `1.0` (`0.5` for `"probe"`; none for `"influence"` and
            `"surprisal"`, see `positive_fraction`).
        positive_fraction (`float`, *optional*):
            Share of the tokens that is positive, best scores first; the rest is negative (the paper uses `0.7`).
            Mutually exclusive with `negative_threshold`. Where neither is set, `0.95` for `"influence"` and
            `"surprisal"`, unless a scored folder brings a threshold.
        selection_scope (`str`, *optional*, defaults to `"global"`):
            Tokens that are ranked together under `positive_fraction`: the whole dataset (`"global"`), each row
            (`"sequence"`; a packed row counts as one), or all micro-batches and processes of the optimizer step
            (`"batch"`, with `score="excess"` and only there).
        neutral_band (`float`, *optional*, defaults to `0.0`):
            Tokens whose score is within this distance of the boundary, in nats, are neither learnt nor forgotten.
        protect_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether EOS and all other special tokens are never negative.
        gate_reference_prob (`float`, *optional*):
            A token stays positive, whatever its score, when its probability under the reference is at least this
            value: what the reference itself finds likely is no noise.
        max_negative_share (`float`, *optional*):
            Largest share of the tokens of a sequence (of a document, in packed rows) that may be negative. The worst
            ones stay negative, the others become neutral.
        excess_passes (`int`, *optional*, defaults to `2`):
            With `score="excess"`: `2` scores all micro-batches of the step before it trains on them, `1` selects
            within the training forward, against a moving average of the batch quantile.
        excess_decay (`float`, *optional*, defaults to `0.9`):
            Weight of the old value in that moving average.

        > Parameters that control the loss

        forget_objective (`str`, *optional*, defaults to `"unlikelihood"`):
            Term of a negative token with probability p. `"unlikelihood"` is -log(1 - p), `"probability"` is p, `"npo"`
            is the token-wise NPO against the model at the start of training, `"wga"` is p^beta / beta, and
            `"gradient_ascent"` is log p: the paper's choice, without a bound.
        forget_weight (`float`, *optional*, defaults to `0.25`):
            Final weight lambda of the forgetting term. With `0.0` negative tokens are ignored.
        forget_schedule (`str`, *optional*, defaults to `"linear"`):
            How lambda grows with the optimizer step: `"linear"` or `"cosine"` from 0, or `"constant"`.
        forget_normalization (`str`, *optional*, defaults to `"joint"`):
            `"joint"` divides both terms by the number of positive and negative tokens of the optimizer step,
            `"separate"` (the paper) each term by its own number, which makes each of a few negatives weigh many
            times a positive.
        forget_beta (`float`, *optional*, defaults to `1.0`):
            beta of `"npo"` and exponent of `"wga"`.
        forget_floor (`float`, *optional*):
            Log-probability below which a negative token is no longer forgotten.
        entropy_gate (`float`, *optional*):
            Entropy in nats below which a positive token counts less: its weight is multiplied by
            `min(1, entropy / entropy_gate)`, with the entropy of the model's distribution at its position as a
            constant (arXiv 2601.02151, whose unit is `math.log(20)`, about 3.0).
        anchor_weight (`float`, *optional*):
            Weight of a term that keeps every token with a weight close to its probability q at the start of training:
            KL(q || p) of the token against all others.
        z_loss_weight (`float`, *optional*):
            Weight of the squared log-sum-exp of the logits at every token with a weight, for example `1e-4`: keeps
            logits from drifting (arXiv 2204.02311).

    > [!NOTE]
    > `loss_type="dft"` applies to the positive tokens. `label_smoothing_factor` and `compute_loss_func` are refused
    > when tokens are selected.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (as TRL declares it)
        *SFTConfig._VALID_DICT_FIELDS,
        "reference_model_init_kwargs",
    ]

    # Parameters that control the scores
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Model that the tokens are scored with: model id, folder of a model, folder of a LoRA adapter of "
            "the same base, or 'base'. Without it, and without a `token_weights` column, the trainer is `SFTTrainer`."
        },
    )
    reference_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the reference."},
    )
    score: str = field(
        default="influence",
        metadata={
            "help": "Score of a token. 'influence': log-probability under the reference minus score_base_weight times "
            "that under the model at the start of training, in nats; 'excess': minus that under the current model; "
            "'surprisal': log-probability under the model at the start; 'probe': minus a probe's probability of being "
            "wrong; 'contrast': minus that under noisy_reference_model; 'random'; 'oracle': column negative_mask; "
            "'given': column token_scores.",
            "choices": list(SCORES),
        },
    )
    score_base_weight: float = field(
        default=SCORE_BASE_WEIGHT,
        metadata={"help": "Weight of the model's log-probability in score='influence'; the papers have 1."},
    )
    score_pooling: str | None = field(
        default=None,
        metadata={
            "help": "'token': scores as they are; 'word': the lowest of the word; 'word_sum': the sum over the word; "
            "'span': the lowest from the beginning of the word up to the token; 'row': the mean of the row. Default: "
            "'word_sum' for influence and surprisal, 'word' for probe, else 'token'.",
            "choices": list(POOLINGS),
        },
    )
    score_row_worst: int | None = field(
        default=None,
        metadata={"help": "With score_pooling='row': the mean of so many lowest scores instead of all."},
    )
    score_lookahead: float = field(
        default=0.0,
        metadata={"help": "Weight of the next token's score, added before scores are pooled."},
    )
    noisy_reference_model: str | None = field(
        default=None,
        metadata={"help": "Reference trained on the noisy data, for score='contrast'."},
    )
    probe: str | None = field(
        default=None,
        metadata={"help": "Folder of a saved probe of this model, for score='probe'."},
    )
    judged: str | None = field(
        default=None,
        metadata={
            "help": "For `selsft score`: judged rows, on which the score is measured, a probe is fitted and a "
            "threshold is chosen."
        },
    )
    judged_test: str | None = field(
        default=None, metadata={"help": "For `selsft score`: judged rows that nothing is fitted on."}
    )
    judged_group: str | None = field(
        default=None,
        metadata={
            "help": "For `selsft score`: column of the judged rows whose equal values are kept in one fold of a probe."
        },
    )
    target_precision: float | None = field(
        default=None,
        metadata={"help": "For `selsft score`: precision on judged rows that the threshold is chosen for."},
    )
    probe_clean: str | None = field(
        default=None,
        metadata={
            "help": "For `selsft score`: clean rows, which are damaged by rules to fit the probe on, instead of "
            "judged rows."
        },
    )
    probe_corruptions: str | None = field(
        default=None,
        metadata={
            "help": "Those rules, separated by commas: swap, delete, double, inflect, spell, function, replace, "
            "insert, case (default: all), or answer by itself."
        },
    )
    go_on: bool = field(
        default=False,
        metadata={"help": "Whether to select by a score that judged rows do not show to be better than chance."},
    )
    precompute_scores: bool = field(
        default=True,
        metadata={
            "help": "Whether to score the whole train dataset before training, with a cache on disk. If False, and "
            "always for streamed data, every batch is scored in the step that trains on it."
        },
    )
    scoring_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per device and forward pass while scoring, padding included. Default: "
            "per_device_eval_batch_size times max_length."
        },
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per device and forward pass while scoring, instead of a number of tokens."},
    )
    scoring_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the cached log-probabilities. Default: the folder `selsft` beside the cache of "
            "`datasets`."
        },
    )

    # Parameters that control the selection
    negative_threshold: float | None = field(
        default=None,
        metadata={
            "help": "A token is negative when its score is below minus this value (score='probe': when it is wrong "
            "with a probability above it). Default, unless positive_fraction is set: what target_precision has "
            "chosen for a scored folder, else 1.0 (probe: 0.5; influence and surprisal: none)."
        },
    )
    positive_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the tokens that is positive, best scores first; the rest is negative. Mutually "
            "exclusive with negative_threshold. Default for influence and surprisal, where no threshold is set or "
            "chosen: 0.95."
        },
    )
    selection_scope: str = field(
        default="global",
        metadata={
            "help": "Tokens that are ranked together under positive_fraction: the whole dataset, each row, or the "
            "optimizer step (score='excess').",
            "choices": list(SCOPES),
        },
    )
    neutral_band: float = field(
        default=0.0,
        metadata={
            "help": "Tokens whose score is within this distance of the boundary, in nats, are neither learnt nor "
            "forgotten."
        },
    )
    protect_special_tokens: bool = field(
        default=True,
        metadata={"help": "Whether EOS and all other special tokens are never negative."},
    )
    gate_reference_prob: float | None = field(
        default=None,
        metadata={"help": "A token stays positive when its probability under the reference is at least this value."},
    )
    max_negative_share: float | None = field(
        default=None,
        metadata={"help": "Largest share of a sequence's tokens that may be negative; the others become neutral."},
    )
    excess_passes: int = field(
        default=2,
        metadata={
            "help": "With score='excess': 2 scores the step before it trains, 1 selects within the training forward "
            "against a moving average of the batch quantile.",
            "choices": [1, 2],
        },
    )
    excess_decay: float = field(
        default=0.9,
        metadata={"help": "Weight of the old value in the moving average of excess_passes=1."},
    )

    # Parameters that control the loss
    forget_objective: str = field(
        default="unlikelihood",
        metadata={
            "help": f"Term of a negative token with probability p: {_FORGET_HELP}.",
            "choices": list(FORGET_OBJECTIVES),
        },
    )
    forget_weight: float = field(
        default=0.25,
        metadata={"help": "Final weight lambda of the forgetting term. With 0 negative tokens are ignored."},
    )
    forget_schedule: str = field(
        default="linear",
        metadata={
            "help": "How lambda grows with the optimizer step: 'linear' or 'cosine' from 0, or 'constant'.",
            "choices": list(FORGET_SCHEDULES),
        },
    )
    forget_normalization: str = field(
        default="joint",
        metadata={
            "help": "'joint' divides both terms by the number of positive and negative tokens of the optimizer step, "
            "'separate' (the paper) each term by its own number.",
            "choices": ["joint", "separate"],
        },
    )
    forget_beta: float = field(
        default=1.0,
        metadata={"help": "beta of 'npo' and exponent of 'wga'."},
    )
    forget_floor: float | None = field(
        default=None,
        metadata={"help": "Log-probability below which a negative token is no longer forgotten, for example -20."},
    )
    entropy_gate: float | None = field(
        default=None,
        metadata={"help": "Entropy in nats below which a positive token counts less, for example 3."},
    )
    anchor_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of a term that keeps tokens close to their probability at the start, for example 0.1."
        },
    )
    z_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the squared log-sum-exp of the logits, which keeps them small; for example 1e-4."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._validate_selection()

    @property
    def effective_threshold(self) -> float | None:
        """The threshold in force, in the unit of the score: `negative_threshold`, or the score's own where no rule is
        set; `None` where a share is in force."""
        if not self.rule_is_default or self.score == "oracle" or self.effective_fraction is not None:
            return self.negative_threshold
        return NEGATIVE_THRESHOLDS.get(self.score, NEGATIVE_THRESHOLD)

    @property
    def effective_fraction(self) -> float | None:
        """The share of positive tokens in force: `positive_fraction`, or the score's own where no rule is set."""
        return POSITIVE_FRACTIONS.get(self.score) if self.rule_is_default else self.positive_fraction

    @property
    def rule_is_default(self) -> bool:
        """Whether neither `negative_threshold` nor `positive_fraction` is set."""
        return self.negative_threshold is None and self.positive_fraction is None

    def without_selection(self) -> SelectiveSFTConfig:
        """A copy in which nothing is selected, for preparing rows: what this class adds is at its defaults, but for
        the settings of scoring."""
        made = copy.copy(self)
        for name, default in SELECTION_DEFAULTS.items():
            setattr(made, name, default)
        return made

    def changed(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the named fields that are not at their default, with their values."""
        defaults = {item.name: item.default for item in fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    @property
    def pooling(self) -> str:
        """`score_pooling`, or what it is by default."""
        return self.score_pooling or DEFAULT_POOLINGS.get(self.score, "token")

    @property
    def pools_words(self) -> bool:
        """Whether pooling needs to know which tokens make a word."""
        return self.pooling in WORD_POOLINGS

    @property
    def needs_start_logps(self) -> bool:
        """Whether the loss compares with the model at the start of training."""
        return FORGET[self.forget_objective].needs_reference or self.anchor_weight is not None

    def _validate_selection(self) -> None:
        """Check the fields of this class; also called for a config that was made from an `SFTConfig`."""
        self._validate_types()
        if self.negative_threshold is not None and self.positive_fraction is not None:
            raise ValueError(
                f"negative_threshold={self.negative_threshold} and positive_fraction={self.positive_fraction} exclude "
                "each other: set only one"
            )
        for name, choices in (
            ("score", SCORES),
            ("selection_scope", SCOPES),
            ("score_pooling", (None, *POOLINGS)),
            ("excess_passes", (1, 2)),
            ("forget_objective", FORGET_OBJECTIVES),
            ("forget_schedule", FORGET_SCHEDULES),
            ("forget_normalization", ("joint", "separate")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name}={value!r} is unknown: use one of {', '.join(str(each) for each in choices if each)}"
                )
        self._validate_scheme()
        _check_number("negative_threshold", self.negative_threshold, low=-math.inf)
        _check_number("positive_fraction", self.positive_fraction, low=0.0, high=1.0)
        _check_number("score_base_weight", self.score_base_weight, low=0.0)
        _check_number("score_lookahead", self.score_lookahead, low=0.0)
        _check_number("target_precision", self.target_precision, low=0.0, high=1.0, open_low=True)
        _check_number("neutral_band", self.neutral_band, low=0.0)
        _check_number("gate_reference_prob", self.gate_reference_prob, low=0.0, high=1.0, open_low=True)
        _check_number("max_negative_share", self.max_negative_share, low=0.0, high=1.0)
        _check_number("excess_decay", self.excess_decay, low=0.0, high=1.0, open_high=True)
        _check_number("forget_weight", self.forget_weight, low=0.0)
        _check_number("forget_beta", self.forget_beta, low=0.0, open_low=True)
        _check_number("forget_floor", self.forget_floor, low=-math.inf, high=0.0, open_high=True)
        _check_number("entropy_gate", self.entropy_gate, low=0.0, open_low=True)
        _check_number("z_loss_weight", self.z_loss_weight, low=0.0, open_low=True)
        _check_number("anchor_weight", self.anchor_weight, low=0.0, open_low=True)
        for name in ("scoring_batch_size", "scoring_batch_tokens", "score_row_worst"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"{name}={given} must be at least 1")
        if not FORGET[self.forget_objective].bounded and self.forget_floor is None and self.forget_weight > 0:
            warnings.warn(
                f"forget_objective={self.forget_objective!r} has no bound: the loss of a forgotten token runs to "
                "minus infinity and its gradient is largest where nothing is left to forget. Use 'unlikelihood', or "
                "set forget_floor (for example -10).",
                UserWarning,
                stacklevel=4,
            )

    def _validate_types(self) -> None:
        """Paths become strings; any other value of a wrong type raises, naming the field."""
        for name, kind in _DECLARED.items():
            value = getattr(self, name)
            if isinstance(value, Path):
                setattr(self, name, value := str(value))
            if name in _INHERITED:
                continue
            wanted = next((each for each in _TYPES if kind.startswith(each)), None)
            if (value is None and "None" in kind) or wanted is None or "dict" in kind:
                continue
            types, words = _TYPES[wanted]
            if not isinstance(value, types) or (isinstance(value, bool) and wanted != "bool"):
                raise ValueError(f"{name}={value!r} is of the type {type(value).__name__}: it needs {words}")

    def _validate_scheme(self) -> None:
        """Raise for the first setting that the score contradicts."""
        score, scope = self.score, self.selection_scope
        excess, rule = score == "excess", self.negative_threshold is not None or self.positive_fraction is not None
        own = score in ("random", "oracle", "given")
        refused = [
            (excess and scope != "batch", f"selection_scope={scope!r} with score='excess', which changes with every "
             "step and cannot be ranked beyond it: set selection_scope='batch'"),
            (not excess and scope == "batch", f"selection_scope='batch' with score={score!r}: only score='excess' is "
             "ranked within a step, use 'global' or 'sequence'"),
            (not excess and self.excess_passes == 1, f"excess_passes=1 with score={score!r}, which is known before "
             "training: leave it out"),
            (own and self.reference_model is not None, f"reference_model={self.reference_model!r} with "
             f"score={score!r}, which needs no reference: remove one of them"),
            ((own or score in ("surprisal", "probe")) and self.gate_reference_prob is not None,
             f"gate_reference_prob={self.gate_reference_prob} with score={score!r}, which has no reference: remove "
             "it"),
            (score == "contrast" and self.reference_model is not None
             and self.noisy_reference_model == self.reference_model, "reference_model and noisy_reference_model are "
             f"both {self.reference_model!r}, so all scores would be 0: score='contrast' compares two references"),
            (score != "contrast" and self.noisy_reference_model is not None,
             f"noisy_reference_model={self.noisy_reference_model!r} with score={score!r}: only score='contrast' "
             "compares with it"),
            (score != "probe" and self.probe is not None, f"probe={self.probe!r} with score={score!r}: set "
             "score='probe' to use it"),
            (score != "probe" and self.probe_clean is not None, f"probe_clean={self.probe_clean!r} with "
             f"score={score!r}: set score='probe' to fit one"),
            (self.probe is not None and self.probe_clean is not None, f"probe={self.probe!r} and "
             f"probe_clean={self.probe_clean!r} exclude each other: the one is fitted, the other asks for a new one"),
            (self.score_row_worst is not None and self.pooling != "row", f"score_row_worst={self.score_row_worst} "
             f"with score_pooling={self.pooling!r}: only 'row' looks at a number of scores"),
            (self.score_lookahead and (excess or own), f"score_lookahead={self.score_lookahead} with "
             f"score={score!r}: leave it out"),
            (self.pooling != "token" and score in ("excess", "random", "oracle"),
             f"score_pooling={self.pooling!r} with score={score!r}: leave it out"),
            (score == "random" and self.positive_fraction is None, "positive_fraction is not set, which "
             "score='random' needs: a random ranking has no unit for a negative_threshold"),
            (score == "oracle" and (rule or self.neutral_band > 0), "score='oracle' takes the labels of negative_mask "
             "as they are: remove negative_threshold, positive_fraction and neutral_band"),
            (score == "oracle" and self.max_negative_share is not None, "max_negative_share="
             f"{self.max_negative_share} with score='oracle', which knows no worst ones among the negatives: remove "
             "it"),
        ]  # fmt: skip
        if excess and self.excess_passes == 1:
            ignores = self.forget_weight == 0
            late = "with excess_passes=1: how many tokens count is known only after the forward pass, and the loss is "
            late += "divided by it before. Use excess_passes=2"
            refused += [
                (self.neutral_band > 0, f"neutral_band={self.neutral_band} {late}"),
                (self.max_negative_share is not None, f"max_negative_share={self.max_negative_share} {late}"),
                (self.forget_normalization == "separate" and not ignores, f"forget_normalization='separate' {late}"),
                (ignores and self.positive_fraction is None, f"forget_weight=0 and negative_threshold {late}"),
                (ignores and self.gate_reference_prob is not None, f"forget_weight=0 and gate_reference_prob {late}"),
            ]  # fmt: skip
        for holds, reason in refused:
            if holds:
                raise ValueError(reason)

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> SelectiveSFTConfig:
        """A config with the values of `args` and the defaults of this class for what `args` does not have.

        An `SFTConfig` is copied field by field, since running `__post_init__` twice would repeat warnings and undo
        changes made after construction. Plain `TrainingArguments` are converted as TRL converts them.
        """
        if isinstance(args, cls):
            return args
        if not isinstance(args, SFTConfig):
            values = args.to_dict()
            values["hub_token"] = args.hub_token  # `to_dict` hides the token
            return cls(**values)
        config = object.__new__(cls)
        for item in fields(cls):
            if item.name not in args.__dict__:
                setattr(config, item.name, item.default)
        config.__dict__.update(args.__dict__)
        config._validate_selection()
        return config


# Types that a field may declare -> what it takes, and that in words. NumPy's scalars are registered as numbers
_TYPES: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"),
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "str": (str, "a text"),
}
_INHERITED = {item.name for item in fields(SFTConfig)}
# As written in the class: a parser of arguments replaces the types of its fields by objects
_DECLARED = {item.name: str(item.type) for item in fields(SelectiveSFTConfig)}
# What decides about tokens and their loss: field -> default
SELECTION_DEFAULTS: dict[str, Any] = {
    item.name: item.default
    for item in fields(SelectiveSFTConfig)
    if item.name not in _INHERITED and not item.name.startswith("scoring_")
}


def _check_number(
    name: str,
    value: float | None,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    if value is None:
        return
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not math.isfinite(value) or not inside:
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{name}={value} is outside of {left}{low}, {high}{right}")
