"""Makes docs/images/{objectives,schedules,classes}.png. Run in the repository's root, with selsft[bench] installed:
`python -m docs.images.concepts`. Curves come from the functions that train; `classes.png` is made up, to explain."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from selsft.config import FORGET_SCHEDULES
from selsft.training.schedules import forget_weight_at
from selsft_kernels.objectives import FORGET, POSITIVE

HERE = Path(__file__).parent
START = -2.0  # log-probability at the start of training, for objectives that compare with it


def objectives() -> None:
    p = torch.linspace(1e-4, 1 - 1e-4, 999)
    m = torch.log(p) - torch.log1p(-p)
    reference = torch.full_like(m, START)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for column, table in zip(axes.T, (POSITIVE, FORGET), strict=True):
        for name, formula in table.items():
            beta = 2.0 if name == "wga" else 1.0  # with 1 it is `probability`
            value, slope = formula.loss(m, reference if formula.needs_reference else None, beta)
            label = f"{name}, beta {beta:.0f}" if formula.needs_beta else name
            column[0].plot(p, value, label=label)
            column[1].plot(p, slope.abs(), label=label)
        column[0].set_ylim(-4, 4)
        column[1].set_ylim(0, 1.05)
        column[1].set_xlabel("probability of the token")
        column[0].legend()
    axes[0, 0].set_title("positive tokens")
    axes[0, 1].set_title(f"negative tokens (npo: p at the start {np.exp(START):.2f})")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("size of the gradient, |dL/dm|")
    figure.savefig(HERE / "objectives.png", dpi=110)


def schedules() -> None:
    steps = np.arange(0, 101)
    figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
    for name in FORGET_SCHEDULES:
        axis.plot(steps, [forget_weight_at(int(step), 100, 0.25, name) for step in steps], label=name)
    axis.set(xlabel="step of 100", ylabel="lambda, forget_weight 0.25")
    axis.legend()
    figure.savefig(HERE / "schedules.png", dpi=110)


def classes() -> None:
    x = np.linspace(-5, 4, 500)
    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for name, centre, width, share, color in (("right", 0.4, 0.9, 0.85, "C0"), ("wrong", -1.7, 1.1, 0.15, "C3")):
        density = share * np.exp(-(((x - centre) / width) ** 2) / 2) / width
        axis.plot(x, density, color=color, label=f"{name} tokens")
        axis.fill_between(x, density, where=x <= -1, color=color, alpha=0.35)
    axis.axvline(-1, color="black", linewidth=1)
    axis.annotate("negative", (-1.1, 0.75), ha="right")
    axis.annotate("positive", (-0.9, 0.75))
    axis.set(xlabel="score, nats", yticks=[])
    axis.legend()
    figure.savefig(HERE / "classes.png", dpi=110)


if __name__ == "__main__":
    objectives()
    schedules()
    classes()
