"""`python -m localmistral`, and the console script."""

import sys


def main() -> None:
    """Run the program and exit with its code."""
    try:
        from localmistral.cli import main as run

        sys.exit(run())
    except KeyboardInterrupt:  # before the program could look out for it
        sys.exit(130)


if __name__ == "__main__":
    main()
