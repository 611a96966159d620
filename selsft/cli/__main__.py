"""`python -m selsft.cli`, where the console script is not on the path."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
