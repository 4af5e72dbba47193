"""Runs the test suite in `.venv`, which it makes or completes first.

    python3 scripts/test.py [pytest's arguments]
    python3 scripts/test.py --lint

The tests run in a process for each core, up to four, a file's tests in one of them; `-n 0` runs
them all in one process, as `-s` needs to show anything (`--pdb` sees to it by itself). With --lint
it runs ruff and mypy instead. Paths among the arguments are relative to the repository, wherever
this is started from. The exit code is that of the tests or the first linter that complains.
"""

from __future__ import annotations

import os
import subprocess
import sys

from bootstrap import HERE, TEST_EXTRA, ensure, run_script
from process import hand_over

LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy", "--explicit-package-bases", "localmistral", "scripts", "tests"),
)

# By file: what the tests of a file share, such as a server, is made once. No more than four: every
# process loads models, and llama.cpp's threads take the cores that are left. A process that dies
# ends the run, as it does with one process: pytest-xdist 3.8 may wait forever for its successor.
PARALLEL = (
    *("-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"),
    *("--max-worker-restart", "0"),
)


def main() -> int:
    """Set up, then let pytest take over, or run every linter."""
    ensure(HERE, extras=[TEST_EXTRA])
    os.chdir(HERE.root)
    if sys.argv[1:] == ["--lint"]:
        return lint()
    # llama.cpp's threads spin while they wait; tests run several engines on few cores.
    environ = {"OMP_WAIT_POLICY": "passive", **os.environ}
    return hand_over([str(HERE.python), "-m", "pytest", *PARALLEL, *sys.argv[1:]], environ=environ)


def lint() -> int:
    """Run all linters; the exit code of the first that complained, or 0."""
    # Scripts import their neighbours by bare names, and so do tests: both folders are roots.
    environ = {**os.environ, "MYPYPATH": os.pathsep.join(("scripts", "tests"))}
    commands = [[str(HERE.python), "-m", *linter] for linter in LINTERS]
    codes = [subprocess.run(command, env=environ).returncode for command in commands]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(run_script(main))
