"""`python -m mambaverse`: the command line, where its script is not on the path or another program starts it."""

import sys

from mambaverse.cli import main

if __name__ == "__main__":
    sys.exit(main())
