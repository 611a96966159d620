"""Time and memory of one step, on a GPU or a CPU.

On a GPU, CUDA events between steps that the host enqueues without waiting, as it does in training, and the allocator's
peak. On a CPU, the processor time of one thread, which other programs on the machine hardly change (with several
threads, the time by the clock), and the allocations that the profiler sees. Rejected: `torch.utils.benchmark`, which
gives no memory and no quantiles of single steps; waiting for the device before every step, which adds the host's
prologue to whoever has one.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

Step = Callable[[], object]

# The profiler announces itself on stderr at every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_WARMUP = 2
_LEAST, _MOST = 7, 50
_ENQUEUED = 4


class Measurement(NamedTuple):
    ms_median: float
    ms_p20: float
    ms_p80: float
    peak_mib: float  # above what was allocated before the step, returned gradients included


def measure(step: Step, device: torch.device, seconds: float = 1.0) -> Measurement:
    """Runs `step` a few times to warm up, then for about `seconds`, at least 7 and at most 50 times."""
    for _ in range(_WARMUP):
        step()
    times: list[float] = []
    while len(times) < _LEAST or (sum(times) < 1000 * seconds and len(times) < _MOST):
        times += _gpu_ms(step) if device.type == "cuda" else [_cpu_ms(step)]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    peak = _gpu_peak(step) if device.type == "cuda" else _cpu_peak(step)
    return Measurement(statistics.median(times), cuts[1], cuts[7], peak / 2**20)


def _gpu_ms(step: Step) -> list[float]:
    """Of some steps, enqueued one after the other; the first one, for which the device waits, is not among them."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_ENQUEUED + 1)]
    for event in events:
        step()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def _cpu_ms(step: Step) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return 1000 * (clock() - start)


def _gpu_peak(step: Step) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(step: Step) -> int:
    """Largest sum of the allocations minus the frees, in the order of their times."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        total += change
        peak = max(peak, total)
    return peak


def copy_bandwidth(device: torch.device, mib: int = 1024) -> float:
    """Bytes per second of a large copy, reads and writes counted; the memory roof of the roofline."""
    source = torch.empty(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = measure(lambda: target.copy_(source), device, seconds=0.3).ms_median
    return 2 * source.numel() / (ms / 1000)
