"""From nothing to an answer: makes `.venv` if it is missing, then asks a small model a question.

    python3 scripts/demo.py "What is the capital of France?"

Runs with Python 3.11 to 3.13 on Linux, macOS and Windows and needs nothing else installed but a
C++ compiler. The answer alone goes to stdout; exit codes are those of `localmistral run`.
"""

from __future__ import annotations

import argparse
import os
import sys

from bootstrap import HERE, ensure, run_script
from process import hand_over, say

DEFAULT_PROMPT = "What is the capital of France?"
# A model of 135M parameters goes astray when it samples, or with the system prompt that its own
# template brings; and where it falls into a loop it would go on until its context is full.
STEADY = ("--temperature", "0", "--system", "You are a helpful assistant.", "--max-tokens", "256")


def main() -> int:
    """Set up, then let `localmistral run` take over."""
    parser = argparse.ArgumentParser(description="Ask a small model that runs on this machine.")
    parser.add_argument("prompt", nargs="*", help=f"default: {DEFAULT_PROMPT}")
    prompt = " ".join(parser.parse_args().prompt)
    ensure(HERE)
    if len(sys.argv) == 1:
        prompt = DEFAULT_PROMPT
        say(f"No prompt was given, so: {prompt}")
    # The prompt is all there is to ask: a standard input that never ends must not be waited for.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # -P: nothing in the caller's folder may pass for a module of the program.
    command = [str(HERE.python), "-P", "-m", "localmistral", "run", "-m", str(HERE.model)]
    return hand_over([*command, *STEADY, "--", prompt], environ=os.environ)


if __name__ == "__main__":
    sys.exit(run_script(main))
