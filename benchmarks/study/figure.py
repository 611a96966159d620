"""The figure of the README: what ignoring and forgetting change against plain fine-tuning, corpus by corpus.

    python benchmarks/study/figure.py benchmarks/results/study/*.csv --output docs/images/study.png

Margin of the correction over the text as written, nats, with 95 % intervals over rows and draws. Rejected: bars of the
arms' means, whose intervals are wide because rows differ, and overlap where paired differences are clear.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from tables import difference, read

TITLES = {
    "jfleg": "JFLEG", "wi": "W&I+LOCNESS", "cweb": "CWEB", "medquad20": "MedQuAD, 20 % damaged",
    "truthful": "TruthfulQA answers", "gsm8k": "GSM8K solutions",
}  # fmt: skip
PAIRS = (
    ("random", "plain", "forget random tokens", "C7"),
    ("ignore", "plain", "ignore what the probe finds", "C0"),
    ("forget", "plain", "forget what the probe finds", "C3"),
    ("ignore_oracle", "plain", "ignore what people marked", "C9"),
    ("forget_oracle", "plain", "forget what people marked", "C1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    tables = {path.stem: read(str(path)) for path in given.tables if path.stem in TITLES}
    corpora = [name for name in TITLES if name in tables]
    figure, axes = plt.subplots(
        1, len(corpora), figsize=(2.6 * len(corpora) + 2, 2.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, corpus in zip(axes[0], corpora, strict=True):
        for place, (arm, other, _, color) in enumerate(PAIRS):
            if arm in tables[corpus] and other in tables[corpus]:
                (value, low, high), draws = difference(tables[corpus], arm, other, "margin")
                axis.errorbar(value, -place, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3)
                axis.annotate(f"n={draws}", (high, -place), (4, -3), textcoords="offset points", fontsize=7)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(TITLES[corpus], fontsize=10)
        axis.margins(x=0.2)
        axis.set_ylim(0.5 - len(PAIRS), 0.5)
    axes[0][0].set_yticks([-place for place in range(len(PAIRS))], [label for _, _, label, _ in PAIRS])
    figure.supxlabel("margin against plain fine-tuning, nats (n: draws)", fontsize=9)
    figure.savefig(given.output, dpi=110)


if __name__ == "__main__":
    main()
