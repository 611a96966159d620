"""The bars that the kernels were designed for, next to what was measured.

All are about one H100 at H=4096, V=128256 in bf16, N=8192 unless said, with entropy and arg-max of every row. A bar
without its measurement is "not measured", never "pass".
"""

from collections.abc import Callable
from typing import NamedTuple

from .cases import MAIN_ROWS, MAIN_SHAPE, SYNTHETIC
from .peers import FORWARD, TRAINING
from .records import Record

OURS = "selsft-statistics"  # what the trainer asks for


class Bar(NamedTuple):
    what: str
    at_most: bool  # else at least
    limit: float
    figure: float | None

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        return "pass" if (self.figure <= self.limit if self.at_most else self.figure >= self.limit) else "MISS"


def bars(found: list[Record], accuracy: dict[str, float], steps: dict[str, float]) -> list[Bar]:
    """The bars for records of one device. `accuracy` is what `accuracy.measure_errors` returns, or empty; `steps` are
    the largest ratios of `step_ms` and `peak_mib` to those of `SFTTrainer`, or empty.
    """

    def get(name: str, where: tuple[str, str], n: int = MAIN_ROWS, ignored: int = 0) -> Record | None:
        key = (name, SYNTHETIC, *where, n, *MAIN_SHAPE, ignored)
        hits = [r for r in found if (r.implementation, *r.case) == key]
        return hits[0] if hits else None

    def value(
        of: Callable[[Record], float], where: tuple[str, str], n: int = MAIN_ROWS, name: str = OURS
    ) -> float | None:
        record = get(name, where, n)
        return None if record is None else of(record)

    def faster_than(peer: str, where: tuple[str, str], ignored: int = 0) -> float | None:
        ours, theirs = get(OURS, where, ignored=ignored), get(peer, where, ignored=ignored)
        return None if ours is None or theirs is None else theirs.ms_median / ours.ms_median

    def on_real_states(peer: str) -> float | None:
        """Whatever the model was: cut-cross-entropy skips most of the work on synthetic hidden states."""
        found_by_case: dict[tuple, dict[str, float]] = {}
        for r in found:
            if r.data != SYNTHETIC and (r.pass_, r.head, r.ignored) == (*frozen, 0):
                found_by_case.setdefault(r.case, {})[r.implementation] = r.ms_median
        ratios = [times[peer] / times[OURS] for times in found_by_case.values() if {peer, OURS} <= times.keys()]
        return min(ratios, default=None)

    frozen, trained, scoring = (TRAINING, "frozen"), (TRAINING, "trained"), (FORWARD, "frozen")

    def to_gemm(r: Record) -> float:
        return r.ratio_to_gemm

    def gigabytes(r: Record) -> float:
        return r.peak_mib * 2**20 / 1e9

    return [
        Bar("frozen head, forward+backward: time over two bare GEMMs", True, 1.08, value(to_gemm, frozen)),
        Bar("frozen head: times faster than TRL", False, 1.4, faster_than("trl", frozen)),
        Bar("frozen head, real hidden states: times faster than CCE", False, 1.5, on_real_states("cce")),
        Bar("frozen head: times faster than Liger", False, 1.3, faster_than("liger", frozen)),
        Bar(
            "frozen head: times faster than Liger with a large chunk budget (plain NLL)",
            False,
            1.0,
            faster_than("liger-large-chunk", frozen),
        ),
        Bar(
            "frozen head, 50 % ignored: times faster than Liger", False, 2.0, faster_than("liger", frozen, ignored=50)
        ),
        Bar("trained head, forward+backward: time over three bare GEMMs", True, 1.05, value(to_gemm, trained)),
        Bar("trained head: times faster than TRL", False, 1.3, faster_than("trl", trained)),
        # No statistics are asked for when a data set is scored.
        Bar("scoring: time over one bare GEMM", True, 1.06, value(to_gemm, scoring, name="selsft")),
        Bar("extra memory, frozen head, N=8192: GB", True, 0.36, value(gigabytes, frozen)),
        Bar("extra memory, frozen head, N=32768: GB", True, 0.56, value(gigabytes, frozen, n=32768)),
        Bar("error of the gradients over that of naive bf16 PyTorch", True, 1.5, accuracy.get("gradient_ratio")),
        Bar("rms error of log p over TRL's", True, 0.2, accuracy.get("logprob_ratio")),
        Bar("training step: time over plain SFTTrainer's", True, 1.0, steps.get("step_ms")),
        Bar("training step: peak memory over plain SFTTrainer's", True, 1.0, steps.get("peak_mib")),
    ]


def table(all_bars: list[Bar]) -> str:
    lines = ["| bar | limit | measured | |", "| --- | ---: | ---: | --- |"]
    for bar in all_bars:
        sign = "<=" if bar.at_most else ">="
        figure = "not measured" if bar.figure is None else f"{bar.figure:.3g}"
        lines.append(f"| {bar.what} | {sign} {bar.limit:g} | {figure} | {'' if bar.figure is None else bar.verdict} |")
    return "\n".join(lines)
