"""What the trainer must give, worked out token by token from ordinary logits in float64."""

import math

import numpy as np
import torch

from selsft.selection.quantile import kept
from selsft.selection.rules import check_finite, classes_at


def plain_logps(model, ids: list[int]) -> np.ndarray:
    """Log-probability of each token of one unpadded document, from the model's ordinary logits in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0, :-1]
    logps = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return np.concatenate([[0.0], logps.numpy()])


def assert_scored(dataset, base, reference) -> int:
    """The one checker of alignment: every score and weight of final rows belongs to its token, in its own document.

    Returns:
        the number of tokens with a weight, for the caller to see that something was checked.
    """
    checked = 0
    for row in dataset:
        ends = np.cumsum(row["seq_lengths"]) if row.get("seq_lengths") else [len(row["input_ids"])]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            labels = np.array(row["labels"][start:end])
            labels[0] = -100  # no past to be predicted from
            for column, model in (("base_logps", base), ("ref_logps", reference)):
                expected = np.where(labels == -100, 0.0, plain_logps(model, row["input_ids"][start:end]))
                np.testing.assert_allclose(row[column][start:end], expected, atol=2e-5, err_msg=column)
            weights = np.array(row["token_weights"][start:end])
            assert ((weights == 0) == (labels == -100)).all()
            checked += int((weights != 0).sum())
    return checked


def expected_loss(model, rows, objective, normalization, forget_weight, beta=1.0, dtype=torch.float64):
    """The formulas of the documentation on ordinary logits in float64, token by token."""
    positive, negative, n_positive, n_negative = 0.0, 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logps = torch.log_softmax(model.to(dtype)(ids).logits[0, :-1].double(), -1)
        for position in range(1, len(row["input_ids"])):
            weight = row["token_weights"][position] if row["labels"][position] != -100 else 0.0
            logp = float(logps[position - 1, row["input_ids"][position]])
            p = math.exp(logp)
            if weight > 0:
                positive += weight * -logp
                n_positive += 1
            elif weight < 0:
                start = row["base_logps"][position] if objective == "npo" else 0.0
                negative += (
                    -weight
                    * {
                        "unlikelihood": -math.log1p(-p),
                        "probability": p,
                        "npo": 2 / beta * math.log1p(math.exp(beta * (logp - start))),
                        "wga": p**beta / beta,
                        "gradient_ascent": logp,
                    }[objective]
                )
                n_negative += 1
    if normalization == "joint":
        return (positive + forget_weight * negative) / (n_positive + n_negative)
    return positive / n_positive + forget_weight * negative / n_negative


def label_tokens(
    scores: np.ndarray,
    *,
    negative_threshold: float | None = None,
    positive_fraction: float | None = None,
    neutral_band: float = 0.0,
    protected: np.ndarray | None = None,
) -> np.ndarray:
    """Label the scored tokens of one scope (a whole data set, or one sequence).

    Args:
        scores: `(n,)` float, nats, high = useful.
        negative_threshold: a token is negative when its score is below minus this value.
        positive_fraction: share of the tokens that is positive, best scores first; the rest is negative. Tokens that
            tie with the last positive one are positive too. Exactly one of the two rules must be given.
        neutral_band: tokens whose score lies within this distance of the boundary get label 0, in nats.
        protected: `(n,)` bool, tokens that are never negative (they stay positive).

    Returns:
        `(n,)` int8 of -1, 0, 1.
    """
    if (negative_threshold is None) == (positive_fraction is None):
        raise ValueError(
            f"exactly one of negative_threshold ({negative_threshold}) and positive_fraction ({positive_fraction}) "
            "must be set"
        )
    n = scores.size
    if n == 0:
        return np.zeros(0, dtype=np.int8)
    check_finite(scores)
    if negative_threshold is not None:
        boundary = -float(negative_threshold)
    else:
        assert positive_fraction is not None
        keep = int(kept(positive_fraction, n))
        boundary = np.inf if keep == 0 else float(np.partition(scores, n - keep)[n - keep])
    return classes_at(scores, boundary, neutral_band=neutral_band, protected=protected)
