"""`python -m selsft.demo`, the same as `selsft demo`."""

import sys

from selsft.demo.run import main

if __name__ == "__main__":
    sys.exit(main())
