"""The token columns: their names, and how a column lines up with the positions that predict its tokens.

A column has one value per token; index t belongs to token t, whatever computes, pads or packs it. Rejected:
columns that are shifted already, which every packing and padding rule would have to know about.
"""

from __future__ import annotations

import torch
from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

WEIGHTS, BASE_LOGPS, REF_LOGPS = "token_weights", "base_logps", "ref_logps"
# Log-probabilities under the second reference of `contrast`; minus a probe's probability of being wrong
NOISY_LOGPS, PROBE_SCORES = "noisy_logps", "probe_scores"
TOKEN_COLUMNS = (WEIGHTS, BASE_LOGPS, REF_LOGPS, NOISY_LOGPS, PROBE_SCORES)
# Columns of a data set that a score is read from; they become weights before a batch is made
NEGATIVE_MASK, TOKEN_SCORES = "negative_mask", "token_scores"
SCORE_COLUMNS = {"oracle": NEGATIVE_MASK, "given": TOKEN_SCORES}
# score -> the columns that it is read from
READ_COLUMNS = {
    "influence": (BASE_LOGPS, REF_LOGPS),
    "excess": (REF_LOGPS,),
    "surprisal": (BASE_LOGPS,),
    "probe": (PROBE_SCORES,),
    "contrast": (REF_LOGPS, NOISY_LOGPS),
    "random": (),
    "oracle": (NEGATIVE_MASK,),
    "given": (TOKEN_SCORES,),
}
ACTIVE_ROWS = "active_rows"


def token_columns(dataset: Dataset | IterableDataset, score: str = "influence") -> list[str]:
    """Names of the token columns that `dataset` has and that mean something under `score`."""
    names = get_dataset_column_names(dataset)
    return [name for name in (*TOKEN_COLUMNS, SCORE_COLUMNS.get(score)) if name in names]


def shift(column: torch.Tensor, width: int) -> torch.Tensor:
    """Align a token column with the positions that predict its tokens: the one place where columns are shifted.

    Index t of a column belongs to token t, which position t - 1 predicts, so the first column is dropped. Prompt
    learning (PEFT) puts virtual tokens in front, which have no column: the left is filled with zeros.

    Args:
        column: `(batch, seq_len)`.
        width: number of predicting positions, `seq_len - 1` plus the number of virtual tokens.

    Returns:
        `(batch, width)`.
    """
    return torch.nn.functional.pad(column[:, 1:], (width - column.size(1) + 1, 0))


def active_rows(token_weights: torch.Tensor) -> torch.Tensor:
    """Flat indices of the predicting positions whose token has a weight: `(batch, seq_len)` -> `(m,)` int64."""
    return token_weights[:, 1:].flatten().nonzero().flatten()
