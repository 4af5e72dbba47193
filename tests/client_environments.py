"""Environments of their own for clients that can't share this one: a venv, and a folder for Node.

Both are made once, beside the packages of the repository's own environment, and again when what
they are made from changes. Where a package can't be had, the test that wants it is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

INSTALL_TIMEOUT_S = 240
PYTHON_PACKAGES = ("instructor>=1.10", "langchain-openai>=1", "litellm>=1.80", "llm>=0.27")
"""instructor pins openai and rich to older releases than the rest of the repository has."""
NODE_PACKAGES = {"@ai-sdk/openai-compatible": "^2", "ai": "^6", "openai": "^6", "zod": "^4"}
OLDEST_NODE = 20


def make_python(folder: Path) -> Path:
    """The interpreter of a venv with PYTHON_PACKAGES in `folder`."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not is_made(folder, PYTHON_PACKAGES):
        clear(folder)
        install([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
        # most of what is installed is never imported, so it needn't be compiled
        options = ["--quiet", "--no-compile", "--disable-pip-version-check"]
        install([*pip, *options, *PYTHON_PACKAGES], folder)
        mark_made(folder, PYTHON_PACKAGES)
    return python


def make_node(folder: Path) -> str:
    """The path of Node, with NODE_PACKAGES for scripts that lie in `folder`."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Node.js with npm is not on this machine.")
    version = subprocess.run([node, "--version"], capture_output=True, encoding="utf-8").stdout
    if int(version.removeprefix("v").partition(".")[0] or 0) < OLDEST_NODE:
        pytest.skip(f"Node.js is {version.strip()}, the clients need {OLDEST_NODE}.")
    if not is_made(folder, NODE_PACKAGES):
        clear(folder)
        manifest = {"private": True, "type": "module", "dependencies": NODE_PACKAGES}
        (folder / "package.json").write_text(json.dumps(manifest), encoding="utf-8")
        install([npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"], folder)
        mark_made(folder, NODE_PACKAGES)
    return node


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def install(command: Sequence[str], folder: Path) -> None:
    """Run an installer in `folder`; skip the test if it fails, with the last line it said."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"Installing the clients took longer than {INSTALL_TIMEOUT_S} s.")
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no word"])[-1]
        pytest.skip(f"The clients can't be installed: {last[:200]}")


def is_made(folder: Path, packages: Sequence[str] | Mapping[str, str]) -> bool:
    stamp = folder / "made-from.json"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == json.dumps(packages)


def mark_made(folder: Path, packages: Sequence[str] | Mapping[str, str]) -> None:
    (folder / "made-from.json").write_text(json.dumps(packages), encoding="utf-8")
