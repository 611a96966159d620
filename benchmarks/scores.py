"""Every score on judged files: AUC by token, in one table.

    python benchmarks/scores.py --model MODEL --reference ADAPTER --output scores.csv jfleg.jsonl wi.jsonl

Files are judged samples in any form of docs/spans.md; a column `group`, where there is one, names the rows that belong
together. One line is written for each file and score, with the 95 % interval over rows. The probe is out of fold: each
row is scored by one that was fitted on other groups. Log-probabilities of both models and hidden states come from one
pass of `selsft score`'s own code. A file that is in the output already is left out, so the same command resumes.

Rejected: `selsft score --judged` once for each score, which runs both models again each time.
"""

from __future__ import annotations

import argparse
import copy
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.data.columns import PROBE_SCORES
from selsft.data.loading import DataSource, load_rows
from selsft.evaluation.judged import examples_of, figures
from selsft.evaluation.judging import columns_of
from selsft.score import ScoringRun, row_settings

UNUSED = Dataset.from_list([{"text": "The rows that a run would score."}])
# name -> score, weight of the policy, pooling
SCORES: dict[str, tuple[str, float, str]] = {
    "influence, beta 1, token (papers)": ("influence", 1.0, "token"),
    "influence, beta 0.5, token": ("influence", 0.5, "token"),
    "influence, beta 1, word_sum": ("influence", 1.0, "word_sum"),
    "influence, beta 0.75, word_sum": ("influence", 0.75, "word_sum"),
    "influence, beta 0.5, word_sum (default)": ("influence", 0.5, "word_sum"),
    "influence, beta 0.25, word_sum": ("influence", 0.25, "word_sum"),
    "reference alone, word_sum": ("influence", 0.0, "word_sum"),
    "surprisal, token": ("surprisal", 0.0, "token"),
    "surprisal, word_sum (default)": ("surprisal", 0.0, "word_sum"),
    "probe, judged rows, word (default)": ("probe", 0.0, "word"),
}


def measure(model: str, reference: str, path: Path) -> list[dict[str, Any]]:
    rows = load_rows(DataSource(str(path)), "text")
    group = "group" if "group" in rows.column_names else None
    args = SelectiveSFTConfig(
        "unused", score="probe", use_cpu=not torch.cuda.is_available(), bf16=True, max_length=512, report_to="none",
        model_init_kwargs={"dtype": "bfloat16"}, judged_group=group,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = SelectiveSFTTrainer(model, row_settings(args, Path(folder)), train_dataset=UNUSED)
        run = ScoringRun(trainer, args, Path(folder), reference, judged=rows)
        judging = run.judging
        fit = judging.fit(Path(folder), True)
        sample = judging.judged
        assert fit is not None and sample is not None
        columns = columns_of(run.models, sample)
    columns[PROBE_SCORES] = judging._out_of_fold(sample, fit, fit.logits)
    words = judging.words.number(sample.input_ids, sample.lengths)
    lines = []
    for name, (score, beta, pooling) in SCORES.items():
        own = copy.copy(args)
        own.score, own.score_base_weight, own.score_pooling = score, beta, pooling
        judging.args = own
        found = figures(examples_of(sample, judging._scores(sample, columns)[score], words, "token"))
        if found is not None:
            lines.append({"set": path.stem, "score": name, **found})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    done: list[dict[str, Any]] = []
    if args.output.exists():
        with args.output.open(newline="") as file:
            done = list(csv.DictReader(file))
    for path in args.files:
        if any(line["set"] == path.stem for line in done):
            continue
        done += [
            {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
            for line in measure(args.model, args.reference, path)
        ]
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(done[0]))
            writer.writeheader()
            writer.writerows(done)
        print(path.stem, "done", flush=True)


if __name__ == "__main__":
    main()
