"""`python -m selsft.cli`, where the console script is not on the path."""

from . import main
from .launch import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()
    raise SystemExit(main())
