"""`selsft demo`: the whole method on a toy, offline, on two CPU cores, in a few minutes.

Trains the same small model three ways on the same noisy data (plain, ignoring the negative tokens, forgetting them),
prints what each of them answers, and keeps the run in a folder. docs/demo.md says how to read it.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..data.cards import write_card
from ..records import exclusive, replaced, resumable, versions, write_json

THREADS = 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selsft demo", description=__doc__.partition("\n")[0].partition(": ")[2])
    parser.add_argument("--seed", type=int, default=0, help="first seed: facts, noise, weights and order (default: 0)")
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="how many seeds to run (default: 1)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="new folder for models, results and the report, or that of an interrupted demo (default: runs/demo/ "
        "and the time)",
    )
    parser.add_argument(
        "--forget-weight", type=float, metavar="W", help="weight of the forgetting term at the end of training"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    output = args.output or Path("runs", "demo", time.strftime("%Y%m%d-%H%M%S"))
    interrupted = (output / "config.json").is_file() and not (output / "results.json").exists()
    if output.exists() and not interrupted and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output {output} exists already: choose a new folder, the demo overwrites no run")
    if args.forget_weight is not None and not args.forget_weight >= 0:
        parser.error(f"--forget-weight {args.forget_weight} must not be negative")
    # The demo needs no network: no library may look for updates or report usage. Set before they are imported.
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")

    from dataclasses import replace

    import torch
    from rich.console import Console

    from selsft.demo.experiment import DemoConfig

    # More threads only wait for each other on a model of this size, and would change the last digits
    torch.set_num_threads(min(torch.get_num_threads(), THREADS))
    config = DemoConfig()
    if args.forget_weight is not None:
        config = replace(config, forget_weight=args.forget_weight)
    kept = f"finished models are kept in it, `selsft demo --output {output}` with the same flags resumes from there"
    with resumable(output, "--output", kept), exclusive(output, "--output"):
        run(config, range(args.seed, args.seed + args.seeds), output, Console())
    return 0


def run(config, seeds: Sequence[int], output: Path, console) -> list:
    """Run `seeds` in `output`, print the report and write it there."""
    import torch

    from selsft.demo.experiment import run_seed
    from selsft.demo.report import as_rows, render, write_report

    about: dict[str, object] = {"config": asdict(config), "seeds": list(seeds), "threads": torch.get_num_threads()}
    about |= {"python": platform.python_version(), "versions": versions()}
    write_json(output / "config.json", about)

    def echo(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    results = []
    for seed in seeds:
        echo(f"Seed {seed}")
        results.append(run_seed(seed, config, output / f"seed-{seed}", echo))
    rows = as_rows(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with replaced(output / "results.csv") as file:
        file.write(text.getvalue().encode())
    write_card(output, "What `selsft demo` measured.")
    render(console, results)
    write_report(output / "report.html", results)
    # The last file: with it, the demo is finished
    write_json(output / "results.json", {**about, "results": [asdict(result) for result in results]})
    echo(f"Written to {output}: config.json, results.json, results.csv, report.html")
    return results
