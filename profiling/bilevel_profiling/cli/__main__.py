"""`python -m bilevel_profiling.cli` is `bilevel`."""

import sys

from bilevel_profiling.cli import main

if __name__ == "__main__":
    sys.exit(main())
