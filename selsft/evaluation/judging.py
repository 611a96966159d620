"""From judged rows to a verdict on a score: fit what needs fitting, score the rows, measure, choose a threshold.

`selsft score` runs it before the data are scored, so that a score that is no better than chance shows at once. A row
that a probe was fitted on is judged out of fold; a row of the test sample that a probe or the threshold has seen is
left out. Rejected: a command of its own, which would load and hash the models a second time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.chunks import TokenChunk, data_fingerprint
from ..data.columns import BASE_LOGPS, PROBE_SCORES, REF_LOGPS
from ..data.corrupt import KINDS, corrupt_rows
from ..data.judged import JudgedRows, judged_rows
from ..data.tokenizers import special_ids, tokenizer_sha256
from ..data.words import Words
from ..errors import InputError
from ..records import file_sha256, json_sha256, read_sealed, replaced, write_sealed
from ..scoring.frozen import FrozenModels
from ..scoring.probe import (
    ROW,
    TOKEN,
    Fit,
    Probe,
    design_of,
    fit_probe,
    kind_of,
    load_fit,
    load_probe,
    row_hashes,
    save_fit,
    save_probe,
    saved_key,
)
from ..selection.pooling import pool_scores
from ..selection.weights import pooled_scores, raw_scores
from .judged import (
    Examples,
    Threshold,
    by_threshold,
    examples_of,
    judge_scores,
    learning_curve,
    threshold_for,
)

JUDGED, EXAMPLES, PROBE = "judged.json", "judged_examples.parquet", "probe"
SHARES = (0.25, 0.5)
Other = tuple[FrozenModels, str]  # models with another reference, and the column for it
RULES = "clean rows corrupted by rules"


@dataclass
class Verdict:
    """
    Attributes:
        record: content of `judged.json`.
        threshold: for `target_precision`; `None` where it was not asked for.
        refusal: why nothing should be selected by the score; `None` where the judged rows do not speak against it.
    """

    record: dict[str, Any]
    threshold: Threshold | None
    refusal: str | None


def read_verdict(folder: Path) -> dict[str, Any]:
    """Content of the `judged.json` of a scored folder; empty without judged rows.

    Raises:
        `InputError` when the file is damaged.
    """
    return read_sealed(folder / JUDGED, "run the same `selsft score` command again")


class Judging:
    """Judged rows, and all that is computed from them.

    Args:
        models: the frozen models, without a probe yet.
        args: settings of the score and of the rows.
        judged, test: judged rows in the forms of docs/spans.md.
        clean: rows for a probe without judgements.

    Raises:
        `InputError` for rows that cannot be used, and settings that they contradict.
    """

    def __init__(
        self,
        models: FrozenModels,
        tokenizer: PreTrainedTokenizerBase,
        args: SelectiveSFTConfig,
        chat_template: str | None,
        judged: Dataset | None = None,
        test: Dataset | None = None,
        clean: Dataset | None = None,
    ):
        self.models, self.args = models, args
        self.words, self.special = Words(tokenizer), special_ids(tokenizer)
        self.tokenizer_sha256 = tokenizer_sha256(tokenizer, chat_template)
        read = functools.partial(judged_rows, tokenizer=tokenizer, args=args, chat_template=chat_template)
        self.judged = None if judged is None else read(judged)
        self.test = None if test is None else read(test)
        self.kinds = [kind.strip() for kind in (args.probe_corruptions or ",".join(KINDS)).split(",")]
        self.clean = None
        if clean is not None:
            self.clean = read(corrupt_rows(clean, self.kinds, args.seed, args.dataset_text_field))
        self.groups = (
            None if self.judged is None or judged is None else _groups(judged, self.judged, args.judged_group)
        )
        self.test_groups = None
        if self.test is not None and test is not None and args.judged_group in test.column_names:
            self.test_groups = _groups(test, self.test, args.judged_group)
        self.probe: Probe | None = None
        if args.score == "probe" and args.probe is not None:
            self.probe = load_probe(args.probe, models.policy_sha256, self.tokenizer_sha256)

    @property
    def probe_key(self) -> str | None:
        """Hash of all that decides the probe; `None` without one."""
        if self.args.score != "probe":
            return None
        if self.probe is not None:
            return self.probe.sha256
        rows = self.clean if self.clean is not None else self.judged
        assert rows is not None
        names = ("input_ids", "labels", "wrong", "row", "whole")
        made = [getattr(rows, name).tolist() for name in names]
        groups = None if self.clean is not None or self.groups is None else self.groups.tolist()
        return json_sha256([made, groups, self.args.pooling, self.args.seed])

    def fit(self, folder: Path, computing: bool) -> Fit | None:
        """The probe of a run: the loaded one, else one that is fitted and saved in `folder / "probe"`.

        Args:
            computing: whether this process runs the models; the others wait for it.
        """
        if self.args.score != "probe":
            return None
        accelerator, fit, key = self.models.accelerator, None, self.probe_key
        resumed = self.probe is None and saved_key(folder / PROBE) == key
        accelerator.wait_for_everyone()
        if self.probe is None and not resumed and computing:
            with self.models.ready():
                rows, groups = (self.clean, None) if self.clean is not None else (self.judged, self.groups)
                assert rows is not None
                design = design_of(self.models, rows, self.special, groups)
            if accelerator.is_main_process:
                shares = SHARES if self.clean is None else ()
                fit = fit_probe(design, functools.partial(self._pool, rows, design), shares, self.args.seed)
                fit.probe.facts |= self._provenance(rows) | {"key": key}
                save_fit(fit, folder / PROBE)
        accelerator.wait_for_everyone()
        if self.probe is None:
            self.probe = load_probe(folder / PROBE, self.models.policy_sha256, self.tokenizer_sha256)
            fit = load_fit(self.probe, folder / PROBE) if resumed else fit
        elif accelerator.is_main_process and Path(str(self.args.probe)).resolve() != (folder / PROBE).resolve():
            save_probe(self.probe, folder / PROBE)
        self.models.state_columns = self.probe.state_columns(self.special)
        return fit

    def _pool(self, rows: JudgedRows, design: Any, logits: np.ndarray) -> np.ndarray:
        """Logits as selection pools them, over judged tokens only."""
        if design.kind == ROW:
            return logits
        flat, mask = np.zeros(rows.row.size), np.zeros(rows.row.size, bool)
        flat[design.positions], mask[design.positions] = -logits, True
        words = self.words.number(rows.input_ids, rows.lengths)
        args = self.args
        return -pool_scores(flat, mask, rows.row, words, args.pooling, 0.0, args.score_row_worst)[design.positions]

    def _provenance(self, rows: JudgedRows) -> dict[str, Any]:
        fitted = np.flatnonzero(rows.row_wrong >= 0)
        hashes = row_hashes(rows)
        labels = "judged rows" if self.clean is None else f"{RULES}: {', '.join(self.kinds)}"
        return {
            "labels": labels,
            "model_sha256": self.models.policy_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "rows_sha256": data_fingerprint(rows.dataset),
            "rows": int(fitted.size),
            "fitted_rows": sorted({hashes[row] for row in fitted}),
            "pooling": self.args.pooling,
            "seed": self.args.seed,
        }

    def verdict(self, folder: Path, fit: Fit | None, computing: bool, more: Sequence[Other] = ()) -> Verdict | None:
        """Score the judged rows, measure, and write `judged.json`; `None` without judged rows, and in processes that
        do not compute.

        Args:
            more: see `columns_of`.
        """
        if self.judged is None or not computing:
            return None
        columns = {
            name: columns_of(self.models, rows, more)
            for name, rows in (("judged", self.judged), ("test", self.test))
            if rows is not None
        }
        if not self.models.accelerator.is_main_process:
            return None
        return self._measure(folder, fit, columns)

    def _measure(self, folder: Path, fit: Fit | None, columns: dict[str, dict[str, np.ndarray]]) -> Verdict:
        judged, args = self.judged, self.args
        assert judged is not None
        keep = np.ones(judged.lengths.size, bool)
        fitted = set(self.probe.facts.get("fitted_rows", ())) if self.probe is not None else set()
        hashes = row_hashes(judged)
        fit = fit if self.clean is None else None  # out of fold for judged rows only
        if fit is not None:
            columns["judged"][PROBE_SCORES] = self._out_of_fold(judged, fit, fit.logits)
            keep = np.isin(np.arange(keep.size), np.unique(self._rows_of(judged, fit)))
        elif fitted:
            keep = np.array([digest not in fitted for digest in hashes])
            if not keep.any():
                raise InputError(
                    "the probe was fitted on every one of the judged rows, so they say nothing about it: judge others"
                )
        words = self.words.number(judged.input_ids, judged.lengths)
        scores = self._scores(judged, columns["judged"])
        record: dict[str, Any] = {"judged": judge_scores(judged, scores, words, keep, groups=self.groups)}
        level = ROW if kind_of(judged) == ROW else TOKEN
        examples = examples_of(judged, scores[args.score], words, level, keep)
        if not examples.both:
            raise InputError(
                f"the judged sample has {int(examples.wrong.sum())} wrong and {int((~examples.wrong).sum())} right "
                f"{level}s: a score is measured by telling them apart, so both are needed"
            )
        per_row = args.pooling == ROW or (self.probe is not None and self.probe.kind == ROW)
        told = {"judged": examples}
        record |= {
            "selects": level == TOKEN or per_row,
            "score": args.score,
            "level": level,
            "rows": int(keep.sum()),
            "by_threshold": by_threshold(examples),
        }
        if self.probe is not None:
            record["probe"] = {
                name: self.probe.facts.get(name)
                for name in ("labels", "kind", "rows", "judged", "wrong", "strength")
                if name in self.probe.facts
            }
        if fit is not None:
            partial = {share: self._out_of_fold(judged, fit, logits) for share, logits in fit.partial.items()}
            flat = {
                share: self._pooled(judged, values)
                for share, values in {**partial, 1.0: columns["judged"][PROBE_SCORES]}.items()
            }
            record["learning_curve"] = learning_curve(judged, flat, words, level)
        if self.test is not None:
            found, told["test"] = self._test(columns["test"], fitted | set(hashes), level)
            record |= found
        numbers = record["judged"][args.score][level]
        refusal = None
        if not numbers["auc_low"] > 0.5:
            refusal = (
                f"score={args.score!r} is not shown to be better than chance: AUC {numbers['auc']:.2f} "
                f"[{numbers['auc_low']:.2f}, {numbers['auc_high']:.2f}] on {numbers['n_rows']} judged rows"
            )
        _write_examples(told, folder)
        record["examples_sha256"] = file_sha256(folder / EXAMPLES)
        write_sealed(folder / JUDGED, record)
        threshold = None
        if args.target_precision is not None:
            chosen, threshold = choose_threshold(folder, args.target_precision)
            record |= chosen
            write_sealed(folder / JUDGED, record)
        return Verdict(record, threshold, refusal)

    def _test(self, columns: dict[str, np.ndarray], seen: set[str], level: str) -> tuple[dict[str, Any], Examples]:
        """Figures on rows that nothing was fitted on, and what they tell apart."""
        test, args = self.test, self.args
        assert test is not None
        keep = np.array([digest not in seen for digest in row_hashes(test)])
        if not keep.any():
            raise InputError("every row of judged_test is among the judged rows too: give it rows of its own")
        words = self.words.number(test.input_ids, test.lengths)
        scores = self._scores(test, columns)
        record: dict[str, Any] = {
            "test": judge_scores(test, scores, words, keep, self.test_groups),
            "test_rows_left_out": int((~keep).sum()),
        }
        return record, examples_of(test, scores[args.score], words, level, keep)

    def _rows_of(self, rows: JudgedRows, fit: Fit) -> np.ndarray:
        assert self.probe is not None
        return fit.positions if self.probe.kind == ROW else rows.row[fit.positions]

    def _out_of_fold(self, rows: JudgedRows, fit: Fit, logits: np.ndarray) -> np.ndarray:
        """`probe_scores` of the rows, `(tokens,)`; 0 where nothing was judged, which pools to nothing."""
        assert self.probe is not None
        score = -1 / (1 + np.exp(-logits))
        if self.probe.kind == ROW:
            by_row = np.zeros(rows.lengths.size)
            by_row[fit.positions] = score
            return by_row[rows.row].astype(np.float32)
        flat = np.zeros(rows.row.size, np.float32)
        flat[fit.positions] = score
        return flat

    def _scores(self, rows: JudgedRows, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The score and its baselines, `(tokens,)` each; all pooled alike but `random`, which pooling would turn into
        a measure of word length."""
        scores = {self.args.score: self._pooled(rows, raw_scores(columns, self.args))}
        if BASE_LOGPS in columns:
            scores.setdefault("surprisal", self._pooled(rows, columns[BASE_LOGPS]))
        if REF_LOGPS in columns:
            scores["reference"] = self._pooled(rows, columns[REF_LOGPS])
        drawn = np.random.default_rng(self.args.seed).random(rows.row.size).astype(np.float32)
        return scores | {"random": drawn}

    def _pooled(self, rows: JudgedRows, scores: np.ndarray) -> np.ndarray:
        args = copy.copy(self.args)
        args.score_pooling, args.score = self.args.pooling, "given"
        mask = rows.labels != -100
        mask[np.cumsum(rows.lengths) - rows.lengths] = False
        return pooled_scores(scores, rows.input_ids, rows.lengths, mask, args, self.words)


def _write_examples(told: dict[str, Examples], folder: Path) -> None:
    """What the score of a folder was measured on: `sample` (judged or test), `badness`, `wrong` and `row`."""
    columns = {
        "sample": np.repeat(list(told), [each.wrong.size for each in told.values()]),
        "badness": np.concatenate([each.badness for each in told.values()]).astype(np.float64),
        "wrong": np.concatenate([each.wrong for each in told.values()]).astype(bool),
        "row": np.concatenate([each.rows for each in told.values()]).astype(np.int64),
    }
    with replaced(folder / EXAMPLES) as file:
        pq.write_table(pa.table(columns), file)


def choose_threshold(folder: Path, precision: float) -> tuple[dict[str, Any], Threshold]:
    """The threshold of a scored folder for a precision, from its judged rows; no model is needed.

    Returns:
        `threshold` and, where a test sample has what to tell apart, `test_threshold`, as in `judged.json`; and the
        threshold itself.

    Raises:
        `InputError` for a folder without judged rows, and for judgements of whole rows with a score of tokens.
    """
    if not (folder / EXAMPLES).is_file():
        raise InputError(f"target_precision={precision}: {str(folder)!r} has no judged rows, score it with --judged")
    verdict = read_verdict(folder)
    if verdict.get("examples_sha256") != file_sha256(folder / EXAMPLES):
        raise InputError(
            f"{str(folder / EXAMPLES)!r} is not the file that {JUDGED} names: run the same `selsft score` command "
            "again"
        )
    if not verdict["selects"]:
        raise InputError(
            f"target_precision={precision} with judgements of whole rows, which say nothing about single tokens: set "
            "score_pooling='row'"
        )
    stored = pq.read_table(folder / EXAMPLES)
    table = {name: stored[name].to_numpy() for name in stored.column_names}
    judged, test = (
        Examples(*(table[name][table["sample"] == sample] for name in ("badness", "wrong", "row")))
        for sample in ("judged", "test")
    )
    threshold = threshold_for(judged, precision)
    record: dict[str, Any] = {"threshold": asdict(threshold)}
    if threshold.negative_threshold is not None and test.both:
        flagged = test.badness > threshold.negative_threshold
        record["test_threshold"] = {
            "precision": float(test.wrong[flagged].mean()) if flagged.any() else None,
            "recall": float(flagged[test.wrong].mean()),
            "flagged": int(flagged.sum()),
        }
    return record, threshold


def _groups(dataset: Dataset, rows: JudgedRows, column: str | None) -> np.ndarray | None:
    if column is None:
        return None
    if column not in dataset.column_names:
        raise InputError(
            f"judged_group={column!r} is not a column of the judged rows, which have {', '.join(dataset.column_names)}"
        )
    values = [str(value) for value in dataset[column]]
    return np.unique([values[index] for index in rows.index], return_inverse=True)[1]


def columns_of(models: FrozenModels, rows: JudgedRows, more: Sequence[Other] = ()) -> dict[str, np.ndarray]:
    """All columns of judged rows, `(tokens,)` each.

    Args:
        more: models with other references.
    """
    chunk = TokenChunk(0, rows.lengths, {"input_ids": rows.input_ids, "labels": rows.labels}, None)
    columns: dict[str, np.ndarray] = {}
    with models.ready():
        columns |= models.score(chunk, models.columns)
    for other, name in more:
        with other.ready():
            columns[name] = other.score(chunk, [REF_LOGPS])[REF_LOGPS]
    return columns
