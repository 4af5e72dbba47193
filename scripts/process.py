"""Runs other programs for these scripts: with a log, under a lock, or in this script's own place.

Standard library only, on Linux, macOS and Windows. Does not know what the programs are for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

from llama_build import SetupError, failure_hint, progress_note

LOG_TAIL_LINES = 25
INTERRUPT_GRACE_S = 5
LOCK_POLL_S = 0.3


def say(text: str) -> None:
    """Tell the user, on stderr: stdout belongs to what is run later."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system frees by itself when its holder dies."""
    with path.open("a+b") as handle:
        if not try_lock(handle):
            say("Another run is setting up .venv: waiting for it.")
            while not try_lock(handle):
                time.sleep(LOCK_POLL_S)
        yield


def try_lock(handle: IO[bytes]) -> bool:
    """Take the lock on an open file until it is closed; False when another process has it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    doing: str,
    environ: Mapping[str, str] | None = None,
    kind: str = "cpu",
) -> str:
    """Run a command with its output appended to `log`, and a word to the user where it takes long.

    Returns the output. Raises SetupError, after showing the output's tail, when the command fails.
    `kind` is the kind of llama.cpp's build, should the command start one.
    """
    started_s = time.monotonic()
    lines = []
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        cwd=cwd,
        env=environ,
    )
    assert child.stdout is not None
    with log.open("a", encoding="utf-8") as file, child:
        file.write(f"$ {' '.join(command)}\n")
        try:
            for line in child.stdout:
                file.write(line)
                lines.append(line)
                if note := progress_note(line, kind, time.monotonic() - started_s):
                    say(note)
                    file.flush()
        except KeyboardInterrupt:
            stop(child)
            raise
    if child.returncode:
        fail(doing, "".join(lines), log)
    return "".join(lines)


def stop(child: subprocess.Popen[str]) -> None:
    """End a child that the terminal has interrupted too; it may clean up for a few seconds."""
    try:
        child.wait(INTERRUPT_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def fail(doing: str, output: str, log: Path) -> NoReturn:
    """Show how a command's output ends and raise SetupError with what to do about it."""
    say("\n".join(output.splitlines()[-LOG_TAIL_LINES:]))
    hint = failure_hint(output, platform=sys.platform, python=sys.version_info[:2])
    raise SetupError(f"{doing} failed; the whole log is {log}", hint)


def hand_over(command: Sequence[str], *, environ: Mapping[str, str]) -> int:
    """Let a command take this script's place: its terminal, its signals, its exit code."""
    if os.name != "nt":
        os.execve(command[0], list(command), dict(environ))
    # Windows has no such thing. Ctrl-C reaches the child by itself; the script must outlive it.
    signal.signal(signal.SIGINT, lambda *_: None)
    return subprocess.Popen(command, env=environ).wait()
