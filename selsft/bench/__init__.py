"""Measures the fused loss against other implementations; `selsft bench` on the command line."""

from .kernels import main

__all__ = ["main"]
