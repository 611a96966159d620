"""Measures the fused loss against other implementations on this machine; the same as `selsft bench`."""

from selsft.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
