"""Measures the fused loss against other implementations on this machine; the same as `selsft bench`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder on the path, where transformers would take this file for the package `kernels`.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    from selsft.bench import main

    raise SystemExit(main())
