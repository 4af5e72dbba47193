"""From nothing to an answer: makes `.venv` if it is missing, then asks the model in the box.

    python3 scripts/demo.py                       # one sum, with thinking and without
    python3 scripts/demo.py "What is 58 + 17?"    # any question; a toy answers

Runs with Python 3.11 to 3.13 on Linux, macOS and Windows and needs nothing else installed but a
C++ compiler. The answer alone goes to stdout; exit codes are those of `localmistral run`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from bootstrap import HERE, ensure, run_script
from process import hand_over, say

SUM = "What is 31 + 46?"


def main() -> int:
    """Set up, then ask; a question of the user's own gets the program to itself."""
    parser = argparse.ArgumentParser(description="Ask the toy model that comes with localmistral.")
    parser.add_argument("prompt", nargs="*", help=f"default: {SUM}, in two ways")
    prompt = " ".join(parser.parse_args().prompt)
    ensure(HERE)
    # The prompt is all there is to ask: a standard input that never ends must not be waited for.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if len(sys.argv) > 1:
        return hand_over(ask(prompt, effort="high"), environ=os.environ)
    return show_both()


def ask(prompt: str, *, effort: str) -> list[str]:
    """The command that asks the demo model."""
    # -P: nothing in the caller's folder may pass for a module of the program.
    command = [str(HERE.python), "-P", "-m", "localmistral", "run", "-m", "demo"]
    return [*command, "--effort", effort, "--show-thinking", "--", prompt]


def show_both() -> int:
    """The same sum with effort high and with none; the first exit code that isn't 0."""
    for effort in ("high", "none"):
        say(f"\n> {SUM}   (--effort {effort})")
        code = subprocess.call(ask(SUM, effort=effort))
        if code:
            return code
        sys.stdout.write("" if sys.stdout.isatty() else "\n")
        sys.stdout.flush()
    say(
        "\nWith effort high the toy works the sum out, column by column, before it answers; "
        "with none it answers at once, and guesses."
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
