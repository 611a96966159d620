"""`selsft bench`: measures the loss on this machine."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from selsft.bench.kernels import main as bench

    return bench(argv)
