"""Bars, tables and a figure from all lines that `gpu_check.py` has measured so far: `gpu_report.py FILE.jsonl`.

Writes `FILE.md` and `FILE.png`. Exits with 3 if a bar is missed. A bar without its measurement is "not measured".
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from pathlib import Path

from selsft.bench import lines, records, report
from selsft.bench.bars import bars, table
from selsft.bench.kernels import save_plot

FIGURES = {"ceiling": "What the device can do", "error": "Errors", "chunks": "Rows of a chunk, ms",
           "profile": "Kernels of a step, ms", "counter": "Counters of Nsight Compute"}  # fmt: skip


def last(found: list[dict], *names: str) -> list[dict]:
    """The last line of each measurement, told apart by these fields and the device."""
    return list({tuple(line.get(name) for name in ("gpu", *names)): line for line in found}.values())


def of_one_device(gpu: str, found: list[dict]) -> tuple[str, bool]:
    """The section of a device, and whether it misses a bar."""
    found = [line for line in found if line.get("gpu") == gpu]
    kernels = records.kernel_records(found)
    errors = {line["name"]: line["value"] for line in found if line["kind"] == "error"}
    steps = last([line for line in found if line["kind"] == "step"], "shape", "tuning", "layout", "arm")
    judged = bars(kernels, errors, step_ratios(steps))
    parts = [f"# {gpu}", table(judged), *outcomes(found)]
    for kind, title in FIGURES.items():
        figures = last([line for line in found if line["kind"] == kind], "name", "step", "n", "h", "v")
        if figures:
            rows = [f"| {line.get('step', '')} {line['name']} | {line['value']:.4g} |" for line in figures]
            parts.append("\n".join([f"## {title}\n", "| | |", "| --- | ---: |", *rows]))
    if steps:
        parts.append("## Training steps\n\n" + step_table(steps))
    if kernels:
        notes = dict.fromkeys(line["name"] for line in found if line["kind"] == "note")
        parts.append(report.markdown(kernels, list(notes)))
    return "\n\n".join(parts) + "\n", any(bar.verdict == "MISS" for bar in judged)


def outcomes(found: list[dict]) -> list[str]:
    """What failed or is missing, tests and jobs."""
    tests = last([line for line in found if line["kind"] == "test"], "name")
    jobs = last([line for line in found if line["kind"] == "job"], "part", "name")
    counts = ", ".join(f"{count} {value}" for value, count in Counter(line["value"] for line in tests).items())
    text = [f"Tests: {counts or 'not run'}. Jobs: {sum(j['status'] == 'done' for j in jobs)} of {len(jobs)} done."]
    text += [f"* {t['name']}: {t['value']}" for t in tests if t["value"] not in ("passed", "skipped")]
    text += [f"* {j['part']}: {j['name']}: {j['status']}" for j in jobs if j["status"] != "done"]
    return ["\n".join(text)]


def step_ratios(steps: list[dict]) -> dict[str, float]:
    """The largest ratio of a step with precomputed weights to one of `SFTTrainer`, of time and of peak memory."""
    arms = {(line["shape"], line["tuning"], line["layout"], line["arm"]): line for line in steps}
    found: dict[str, float] = {}
    for (*case, arm), ours in arms.items():
        plain = arms.get((*case, "sft"))
        for name in ("step_ms", "peak_mib") if arm == "precomputed" and plain else ():
            if plain[name]:
                found[name] = max(found.get(name, 0.0), ours[name] / plain[name])
    return found


def step_table(steps: list[dict]) -> str:
    rows = ["| model | tuning | layout | arm | step, ms | time / sft | peak, MiB | memory / sft | loss, ms |",
            "|---|---|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    plain = {(s["shape"], s["tuning"], s["layout"]): s for s in steps if s["arm"] == "sft"}
    for s in sorted(steps, key=lambda s: (s["shape"], s["tuning"], s["layout"])):
        case = s["shape"], s["tuning"], s["layout"]
        sft = plain.get(case, {})
        ratio = {name: f"{s[name] / sft[name]:.2f}" if sft.get(name) else "" for name in ("step_ms", "peak_mib")}
        rows.append(
            f"| {' | '.join(case)} | {s['arm']} | {s['step_ms']:.1f} | {ratio['step_ms']} | {s['peak_mib'] or ''} | "
            f"{ratio['peak_mib']} | {s['loss_ms'] or ''} |"
        )
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    path = Path(argv[0])
    found = lines.read(path)
    gpus = list(dict.fromkeys(line["gpu"] for line in found))
    sections = [of_one_device(gpu, found) for gpu in gpus]
    text = "\n".join(section for section, _ in sections) or "Nothing was measured.\n"
    path.with_suffix(".md").write_text(text)
    print("\n" + text)
    copies = [line["value"] for line in found if line["kind"] == "ceiling" and line["name"].startswith("copy")]
    kernels = records.kernel_records(found)
    if copies and kernels:
        save_plot(kernels, statistics.median(copies) * 1e12, path.with_suffix(".png"))
    return 3 if any(missed for _, missed in sections) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
