"""`selsft demo`: the offline demonstration."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from selsft.demo.run import main as demo

    return demo(argv)
