"""The results as a Markdown table."""

from itertools import groupby

from .cases import SYNTHETIC
from .peers import NLL_ONLY
from .records import Record

HEADER = (
    "| implementation | ms (p20 to p80) | x gemm | TFLOP/s | peak extra MiB |\n| --- | ---: | ---: | ---: | ---: |"
)


def markdown(found: list[Record], notes: list[str]) -> str:
    """One section per device, in it one table per case, fastest first."""
    parts = [
        "# Kernel benchmark",
        "`gemm` is the bare matrix products of the same pass on the rows that count: the floor. TFLOP/s count those "
        "products' arithmetic for everybody, whatever is recomputed. Peak extra memory includes the returned "
        "gradients. `*`: times plain mean NLL, because it cannot express the forgetting loss on its fast path.",
    ]
    for gpu, on_it in groupby(sorted(found, key=lambda r: (r.gpu, r.case)), key=lambda r: r.gpu):
        records = list(on_it)
        first = records[0]
        parts.append(
            f"## {gpu}\n\ntorch {first.torch}, triton {first.triton or 'none'}, driver {first.driver or 'none'}, "
            f"commit {first.sha or 'unknown'}, {first.date}."
        )
        if gpu.startswith("CPU"):
            parts.append(
                "**Measured on a CPU, in fp32: processor time with one thread, time by the clock with more. These "
                "figures say nothing about a GPU.**"
            )
        for case, group in groupby(records, key=lambda r: r.case):
            data, pass_, head, n, h, v, ignored = case
            title = "scoring" if pass_ == "forward" else f"{pass_}, {head} head"
            where = "" if data == SYNTHETIC else f", hidden states of {data}"
            parts.append(f"### N={n}, H={h}, V={v}, {ignored} % ignored{where}: {title}")
            parts.append("\n".join([HEADER, *(_line(r) for r in sorted(group, key=lambda r: r.ms_median))]))
    if notes:
        parts.append("## Not measured\n\n" + "\n".join(f"* {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _line(r: Record) -> str:
    name = f"{r.implementation}*" if r.implementation in NLL_ONLY and r.pass_ != "forward" else r.implementation
    return (
        f"| {name} | {r.ms_median:.4g} ({r.ms_p20:.4g} to {r.ms_p80:.4g}) | {r.ratio_to_gemm:.2f} | "
        f"{r.tflops:.3g} | {r.peak_mib:.4g} |"
    )
