"""`python -m localmistral`, and the console script."""

import sys

from localmistral.cli import main as run


def main() -> None:
    """Run the program and exit with its code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
