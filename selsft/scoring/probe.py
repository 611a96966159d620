"""The probe: a linear map of hidden states that gives the probability that a token, or an answer, is wrong.

For each of five layers about the middle third of the depth, an L2-regularised logistic regression on standardised
features: the state of token t, the state of token t + 1 (which has seen what follows), log p of both. The logits of
the layers are averaged, which is again one linear map, so no layer has to be chosen and applying it costs a product of
`(hidden, 2)` a layer. A word is as wrong as its worst token, which selection takes care of (`score_pooling`). Logits
become probabilities by Platt's calibration (1999) on out-of-fold rows. Judgements of whole rows train a map of the
mean state and of the last one.

`Probe.state_columns` runs inside the forward pass that scores: states live as long as a batch. Only for fitting are
the states of judged tokens held in memory. Figures are in docs/scores.md. Rejected, each measured: MLP heads, PCA,
layers concatenated (dearer, no better), the state of t - 1 (worse), a tuned token classifier (minutes, no better).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from ..data.chunks import TokenChunk
from ..data.columns import BASE_LOGPS, PROBE_SCORES
from ..data.judged import JudgedRows
from ..errors import InputError, first_line
from ..records import file_sha256, read_json, replaced, unsealed, write_sealed
from ..training.model import base_model
from .frozen import FrozenModels, StateColumns

DEPTHS = (0.40, 0.47, 0.53, 0.60, 0.67)  # of the number of layers
STRENGTHS = (3e-4, 1e-3, 3e-3)  # scikit-learn's C: the inverse of the regularisation
FOLDS = 5
TOKEN, ROW = "token", "row"
FORMAT = 2
_WEIGHTS, _FACTS, _HELD_OUT = "probe.safetensors", "probe.json", "out_of_fold.safetensors"
_LOSS_FEATURES = {TOKEN: 2, ROW: 3}


@dataclass
class Probe:
    """
    Attributes:
        kind: `token`, or `row`: every token of a row has the row's probability.
        weights: layer -> `(hidden, 2)` float32: for the state of the token and of the next one; for those of a row,
            the mean over the answer and its last token.
        loss: `(2,)` for log p of the token and of the next one; `(3,)` for mean and minimum of log p and the logarithm
            of the number of tokens of a row.
        bias: of the calibrated logit.
        facts: what it was fitted on and with, JSON values.
    """

    kind: str
    weights: dict[int, np.ndarray]
    loss: np.ndarray
    bias: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of all that decides its output."""
        return hashlib.sha256(self.tensors + self.kind.encode()).hexdigest()

    @property
    def tensors(self) -> bytes:
        """The file of its tensors."""
        named = {f"layer.{layer}": weight for layer, weight in self.weights.items()}
        return save(named | {"loss": self.loss, "bias": np.array([self.bias], np.float64)})

    def state_columns(self, special_ids: np.ndarray) -> StateColumns:
        """The column `probe_scores` for the forward pass that scores: minus the probability of being wrong.

        Args:
            special_ids: `(k,)` ids that are not part of an answer.
        """
        maps = {layer: torch.from_numpy(weight) for layer, weight in self.weights.items()}
        loss, special = torch.from_numpy(self.loss), torch.from_numpy(np.asarray(special_ids, np.int64))

        def columns(
            states: dict[int, torch.Tensor], logps: torch.Tensor, inputs: dict[str, Any]
        ) -> dict[str, torch.Tensor]:
            device, width = logps.device, logps.size(1)
            # Virtual tokens of prompt learning come first
            parts = [states[layer][:, -width:].to(device).float() @ w.to(device) for layer, w in maps.items()]
            this, following = torch.stack(parts).sum(0).unbind(-1)  # (batch, seq_len) each
            documents, valid = documents_of(inputs)
            predicted = valid & (inputs["labels"] != -100)
            predicted[:, 0] = False
            predicted[:, 1:] &= documents[:, 1:] == documents[:, :-1]
            if self.kind == TOKEN:
                logit = token_values(this, following, logps, documents, valid, loss.to(device))
            else:
                answer = predicted & ~torch.isin(inputs["input_ids"], special.to(device))
                logit = row_values(this, following, logps, documents, answer, loss.to(device))
            return {PROBE_SCORES: torch.where(predicted, -torch.sigmoid(logit + self.bias), 0.0)}

        return StateColumns([PROBE_SCORES], list(maps), columns)


def probe_layers(depth: int) -> list[int]:
    """Layers for a model of `depth` layers, as `output_hidden_states` counts: 12, 14, 16, 18, 20 of 30."""
    return sorted({min(max(round(share * depth), 1), depth) for share in DEPTHS})


def documents_of(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of each token's document, and whether it is a token and not padding; `(batch, seq_len)` each."""
    ids = inputs["input_ids"]
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    if inputs.get("attention_mask") is not None:
        return rows, inputs["attention_mask"].bool()
    valid = torch.ones_like(ids, dtype=torch.bool)
    if inputs.get("position_ids") is None:
        return rows, valid
    starts = (inputs["position_ids"] == 0).flatten()  # of concatenated documents
    return torch.cumsum(starts, 0).view_as(ids) - 1, valid


def _next(values: torch.Tensor, otherwise: torch.Tensor, documents: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """What the next token of the same document has, and `otherwise` where there is none."""
    follows = (documents[:, 1:] == documents[:, :-1]) & valid[:, 1:]
    return torch.cat([torch.where(follows, values[:, 1:], otherwise[:, :-1]), otherwise[:, -1:]], 1)


def token_values(this, following, logps, documents, valid, loss: torch.Tensor) -> torch.Tensor:
    """Logit of each token without the bias; all `(batch, seq_len)`. A document's last token stands for its next."""
    later = _next(following, following, documents, valid)
    return this + later + loss[0] * logps + loss[1] * _next(logps, torch.zeros_like(logps), documents, valid)


def row_values(this, following, logps, documents, answer, loss: torch.Tensor) -> torch.Tensor:
    """Logit of each token's row without the bias; all `(batch, seq_len)`."""
    at, counted = documents.flatten(), answer.flatten()
    size = int(at.max()) + 1
    zeros = torch.zeros(size, device=this.device)
    number = zeros.index_add(0, at, counted.float())
    many = number.clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return zeros.index_add(0, at, values.flatten().float() * counted) / many

    place = torch.arange(at.numel(), device=at.device)
    last = torch.zeros(size, dtype=torch.long, device=at.device).scatter_reduce(0, at, place * counted, "amax")
    lowest = zeros.scatter_reduce(0, at, logps.flatten().float() * counted, "amin")
    features = torch.stack([mean(logps), lowest, many.log()], 1)
    return (mean(this) + following.flatten()[last] + features @ loss)[at].view_as(this)


# ---------------------------------------------------------------- fitting


@dataclass
class Design:
    """The data that a probe is fitted on: n tokens, or n rows.

    Attributes:
        kind: `token` or `row`.
        positions: `(n,)` the tokens' places in the sample, or the numbers of the rows.
        wrong: `(n,)` bool.
        groups: `(n,)` int; equal numbers are in one fold.
        loss: `(n, 2)` or `(n, 3)` float32.
        states: layer -> `(m, hidden)`, in the model's dtype; `(rows, 2 hidden)` for rows.
        pairs: `(n, 2)` which states are those of the token and the next one.
    """

    kind: str
    positions: np.ndarray
    wrong: np.ndarray
    groups: np.ndarray
    loss: np.ndarray
    states: dict[int, torch.Tensor]
    pairs: np.ndarray

    def features(self, layer: int) -> np.ndarray:
        """`(n, 2 hidden + loss features)` float32."""
        states = self.states[layer]
        if self.kind == ROW:
            return np.hstack([states.float().numpy(), self.loss])
        this, following = (states[torch.from_numpy(side)].float().numpy() for side in self.pairs.T)
        return np.hstack([this, following, self.loss])


def kind_of(rows: JudgedRows) -> str:
    """`row` where all judgements are of whole rows; else `token`, and rows judged as a whole are not fitted on."""
    judged = rows.row_wrong >= 0
    return ROW if rows.whole[judged].all() else TOKEN


def design_of(
    models: FrozenModels, rows: JudgedRows, special_ids: np.ndarray, groups: np.ndarray | None = None
) -> Design:
    """Run the policy over the judged rows, one at a time, and keep what a probe is fitted on. Inside `models.ready`.

    Args:
        groups: `(rows,)` int: rows with one number are in one fold; by default each alone.
    """
    kind = kind_of(rows)
    layers = probe_layers(base_model(models.policy).config.get_text_config().num_hidden_layers)
    known = (rows.wrong >= 0) & ~rows.whole[rows.row] if kind == TOKEN else np.zeros(rows.row.size, bool)
    answer = (rows.labels != -100) & ~np.isin(rows.input_ids, special_ids)
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    logps = np.zeros(rows.row.size, np.float32)
    pairs: list[np.ndarray] = []
    loss: list[np.ndarray] = []
    chosen: list[np.ndarray] = []
    kept = 0
    former, places = models.state_columns, np.zeros(0, np.int64)

    def keep(found: dict[int, torch.Tensor], values: torch.Tensor, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        for layer in layers:
            own = found[layer][0, -values.size(1) :]
            index = torch.from_numpy(places).to(own.device)
            if kind == ROW:
                states[layer].append(torch.cat([own[index].float().mean(0), own[index[-1]].float()])[None].cpu())
            else:
                states[layer].append(own[index].cpu())
        return {}

    models.state_columns = StateColumns([], layers, keep)
    ends = np.cumsum(rows.lengths)
    try:
        for row, (start, end) in enumerate(zip(ends - rows.lengths, ends, strict=True)):
            wanted = np.flatnonzero(known[start:end])
            last = end - start - 1
            later = np.minimum(wanted + 1, last)
            places = np.unique(np.concatenate([wanted, later]))
            if kind == ROW:
                places = np.flatnonzero(answer[start:end])
                places = places[places > 0]
                if rows.row_wrong[row] < 0:
                    continue
            if not places.size:
                continue
            columns = {"input_ids": rows.input_ids[start:end], "labels": rows.labels[start:end]}
            chunk = TokenChunk(row, rows.lengths[row : row + 1], columns, None)
            own = models.score(chunk, [BASE_LOGPS])[BASE_LOGPS]
            logps[start:end] = own
            if kind == ROW:
                loss.append(np.array([[own[places].mean(), own[places].min(), np.log(places.size)]]))
                chosen.append(np.array([row]))
            else:
                pairs.append(kept + np.searchsorted(places, np.stack([wanted, later], 1)))
                loss.append(np.stack([own[wanted], np.where(wanted < last, own[later], 0)], 1))
                chosen.append(start + wanted)
                kept += places.size
    finally:
        models.state_columns = former
    positions = np.concatenate(chosen)
    own_rows = positions if kind == ROW else rows.row[positions]
    wrong = (rows.row_wrong if kind == ROW else rows.wrong)[positions] == 1
    return Design(
        kind, positions, wrong, own_rows if groups is None else groups[own_rows],
        np.concatenate(loss).astype(np.float32), {layer: torch.cat(found) for layer, found in states.items()},
        np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64),
    )  # fmt: skip


@dataclass
class Fit:
    """
    Attributes:
        probe: fitted on all of the design.
        logits: `(n,)` calibrated, each by a probe that was not fitted on its group.
        partial: share of the training folds -> logits (not calibrated) of probes that were fitted on so much of them.
        positions: of the design.
    """

    probe: Probe
    logits: np.ndarray
    partial: dict[float, np.ndarray]
    positions: np.ndarray


def fit_probe(
    design: Design,
    pool: Callable[[np.ndarray], np.ndarray] = lambda logits: logits,
    shares: Sequence[float] = (),
    seed: int = 0,
) -> Fit:
    """Cross-fit a probe.

    Args:
        pool: how selection pools the logits, `(n,)` -> `(n,)`; calibration looks at pooled ones.
        shares: of the groups of the training folds, for a learning curve.

    Raises:
        `InputError` where there are too few judgements to fit on.
    """
    wrong, groups = design.wrong, design.groups
    with_wrong, with_right = (np.unique(groups[side]).size for side in (wrong, ~wrong))
    if with_wrong < 2 or with_right < 2:
        what = "rows" if design.kind == ROW else "tokens"
        raise InputError(
            f"the judged sample has wrong {what} in {with_wrong} group(s) of rows and right ones in {with_right}: a "
            "probe needs both in at least 2; judge more rows (100 to 400 are a good start)"
        )
    fold = _folds(groups, wrong, FOLDS, seed)
    layers = list(design.states)
    middle = design.features(layers[len(layers) // 2])
    everything = np.ones(wrong.size, bool)
    strengths = {k: _choose(middle, wrong, groups, fold != k, seed) for k in np.unique(fold)}
    strength = _choose(middle, wrong, groups, everything, seed)
    del middle
    logits = np.zeros(wrong.size)
    partial = {share: np.zeros(wrong.size) for share in shares}
    weights, loss, bias = {}, np.zeros(_LOSS_FEATURES[design.kind]), 0.0
    hidden = 0
    for layer in layers:
        features = design.features(layer)
        hidden = (features.shape[1] - loss.size) // 2
        for k, own in strengths.items():
            train, held = fold != k, fold == k
            for share, into in ((1.0, logits), *partial.items()):
                part = train if share == 1 else train & _share_of(groups, wrong, train, share, seed)
                slope, offset = _regress(features, wrong, part, own)
                into[held] += (features[held] @ slope + offset) / len(layers)
        slope, offset = _regress(features, wrong, everything, strength)
        weights[layer] = slope[: 2 * hidden].reshape(2, hidden).T / len(layers)
        loss, bias = loss + slope[2 * hidden :] / len(layers), bias + offset / len(layers)
    scale, shift = _platt(pool(logits), wrong)
    probe = Probe(
        design.kind,
        {layer: np.ascontiguousarray(scale * weight, np.float32) for layer, weight in weights.items()},
        (scale * loss).astype(np.float32),
        float(scale * bias + shift),
        {"strength": strength, "folds": len(strengths), "judged": int(wrong.size), "wrong": int(wrong.sum())},
    )
    return Fit(probe, scale * logits + shift, partial, design.positions)


def _folds(groups: np.ndarray, wrong: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Fold of each example: groups are assigned in random order, those with a wrong example first, so that every
    fold has some of both."""
    names, at = np.unique(groups, return_inverse=True)
    bad = np.bincount(at, wrong) > 0
    order = np.lexsort((np.random.default_rng(seed).random(names.size), ~bad))
    fold = np.empty(names.size, np.int64)
    fold[order] = np.arange(names.size) % max(2, min(count, int(bad.sum()), int((np.bincount(at, ~wrong) > 0).sum())))
    return fold[at]


def _share_of(groups: np.ndarray, wrong: np.ndarray, train: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A share of the groups of the training folds, with wrong and right ones among them."""
    names, at = np.unique(groups[train], return_inverse=True)
    bad = np.bincount(at, wrong[train]) > 0
    rank = np.empty(names.size, np.int64)
    drawn = np.random.default_rng([seed, 1]).random(names.size)
    for side in (bad, ~bad):
        rank[side] = np.argsort(np.argsort(drawn[side]))
    size = np.where(bad, bad.sum(), (~bad).sum())
    return np.isin(groups, names[rank < np.ceil(share * size)])


def _choose(features: np.ndarray, wrong: np.ndarray, groups: np.ndarray, train: np.ndarray, seed: int) -> float:
    """The strength with the lowest log loss within the training rows alone."""
    own, kind = groups[train], wrong[train]
    bad, good = (np.unique(own[side]).size for side in (kind, ~kind))
    if min(bad, good) < 4:
        return STRENGTHS[1]
    inner = _folds(own, kind, 3, seed + 1)
    features = features[train]
    losses = []
    for strength in STRENGTHS:
        probability = np.empty(kind.size)
        for k in np.unique(inner):
            slope, offset = _regress(features, kind, inner != k, strength)
            probability[inner == k] = 1 / (1 + np.exp(-(features[inner == k] @ slope + offset)))
        losses.append(log_loss(kind, probability.clip(1e-7, 1 - 1e-7)))
    return STRENGTHS[int(np.argmin(losses))]


def _regress(features: np.ndarray, wrong: np.ndarray, train: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Slopes `(features,)` and offset in units of the features, fitted on standardised ones."""
    own, kind = features[train], wrong[train]
    if kind.all() or not kind.any():
        return np.zeros(features.shape[1]), 0.0
    mean, deviation = own.mean(0), own.std(0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=400, tol=1e-4).fit((own - mean) / deviation, kind)
    slope = model.coef_[0].astype(np.float64) / deviation
    return slope, float(model.intercept_[0] - slope @ mean)


def _platt(logits: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the calibrated logit. A probe that knows nothing keeps its order at a slope near 0."""
    spread = float(logits.std()) or 1.0
    model = LogisticRegression(C=1e6).fit(logits[:, None] / spread, wrong)
    return max(float(model.coef_[0, 0]) / spread, 1e-3), float(model.intercept_[0])


# ---------------------------------------------------------------- files


def row_hashes(rows: JudgedRows) -> list[str]:
    """A hash of each row's tokens, by which rows that a probe was fitted on are recognised."""
    return [hashlib.sha256(ids.astype(np.int32).tobytes()).hexdigest()[:16] for ids in _rows_of(rows)]


def _rows_of(rows: JudgedRows) -> Iterator[np.ndarray]:
    return iter(np.split(rows.input_ids, np.cumsum(rows.lengths)[:-1]))


def save_probe(probe: Probe, folder: Path, **hashes: str) -> None:
    """Write `probe.safetensors` and `probe.json` with `hashes`; the latter appears when both are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / _WEIGHTS) as handle:
        handle.write(probe.tensors)
    hashes["sha256"] = file_sha256(folder / _WEIGHTS)
    write_sealed(folder / _FACTS, {"format": FORMAT, "kind": probe.kind, **hashes, **probe.facts})


def save_fit(fit: Fit, folder: Path) -> None:
    """Write the probe and its out-of-fold logits, so that a run that is resumed need not fit again."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"partial.{share}": logits for share, logits in fit.partial.items()}
    with replaced(folder / _HELD_OUT) as handle:
        handle.write(save(tensors | {"logits": fit.logits, "positions": fit.positions}))
    save_probe(fit.probe, folder, out_of_fold_sha256=file_sha256(folder / _HELD_OUT))


def load_fit(probe: Probe, folder: Path) -> Fit:
    """The fit that `probe`, which was read from the folder, comes from.

    Raises:
        `InputError` where its out-of-fold logits are not those that were written.
    """
    file = folder / _HELD_OUT
    if not file.is_file() or file_sha256(file) != read_json(folder / _FACTS).get("out_of_fold_sha256"):
        raise InputError(
            f"{str(file)!r} is {'damaged' if file.is_file() else 'missing'}: remove the folder and run the same "
            "command again, which fits the probe anew"
        )
    tensors = load_file(file)
    partial = {float(name[8:]): logits for name, logits in tensors.items() if name.startswith("partial.")}
    return Fit(probe, tensors["logits"], partial, tensors["positions"])


def saved_key(folder: Path) -> str | None:
    """The fact `key` of a probe that may be there: what it was fitted on and with."""
    return read_json(folder / _FACTS).get("key")


def load_probe(folder: str | Path, model_sha256: str, tokenizer_sha256: str) -> Probe:
    """A saved probe, for the model and the tokenizer that it was fitted with.

    Raises:
        `InputError` for a folder without a complete probe, and for another model or tokenizer.
    """
    path = Path(folder)
    try:
        facts = unsealed(json.loads((path / _FACTS).read_text(encoding="utf-8")))
        tensors = load_file(path / _WEIGHTS)
        sha256 = file_sha256(path / _WEIGHTS)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise InputError(
            f"probe={str(folder)!r} holds no probe that can be read ({_FACTS} or {_WEIGHTS}: {first_line(error)}): "
            "give the folder 'probe' that `selsft score --score probe --judged FILE` has written, or fit it again"
        ) from error
    if facts.get("format") != FORMAT or facts.get("kind") not in _LOSS_FEATURES:
        raise InputError(
            f"probe={str(folder)!r} has the format {facts.get('format')!r}, and this version of selsft reads "
            f"{FORMAT}: fit it again"
        )
    if facts.get("sha256") != sha256:
        raise InputError(f"probe={str(folder)!r}: {_WEIGHTS} is not the file that {_FACTS} names: fit it again")
    for what, name, now in (
        ("a model with other weights (or of another dtype)", "model_sha256", model_sha256),
        ("another tokenizer", "tokenizer_sha256", tokenizer_sha256),
    ):
        if facts.get(name) != now:
            raise InputError(
                f"probe={str(folder)!r} was fitted on {what} ({name} {str(facts.get(name))[:12]}, this run has "
                f"{now[:12]}): fit it again with --judged"
            )
    weights = {int(name.split(".")[1]): tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    kind = facts["kind"]
    own = ("format", "kind", "sha256", "out_of_fold_sha256")  # of the files in this folder
    facts = {key: value for key, value in facts.items() if key not in own}
    return Probe(kind, weights, tensors["loss"], float(tensors["bias"][0]), facts)
