"""Clients that get environments of their own, unchanged, against the server with the demo model:
langchain-openai, litellm, instructor, llm; openai for Node and Vercel's AI SDK."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from bootstrap import HERE
from client_environments import make_node, make_python
from live_server import LiveServer, serve_model

from localmistral.engine import EngineSettings

CLIENTS = Path(__file__).parent / "clients"
PYTHON_CLIENTS = {"langchain": 4, "litellm": 4, "instructor": 6, "llm": 3}
"""How many checks each script passes."""
NODE_CHECKS = 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=2)) as live:
        yield live


@pytest.fixture(scope="module")
def python() -> Path:
    return make_python(HERE.venv / "clients" / "python")


def run_client(command: Sequence[str], folder: Path) -> list[str]:
    """The checks that a script passed; it fails with the first that it doesn't."""
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8", "LLM_USER_PATH": str(folder)}
    environ.pop("OPENAI_BASE_URL", None)
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("PASS ")]


@pytest.mark.parametrize("name", PYTHON_CLIENTS)
def test_a_client_of_python_finds_what_it_expects(
    server: LiveServer, python: Path, tmp_path: Path, name: str
) -> None:
    passed = run_client([str(python), str(CLIENTS / f"{name}_client.py"), server.base], tmp_path)
    assert len(passed) == PYTHON_CLIENTS[name], passed


def test_clients_of_node_find_what_they_expect(server: LiveServer) -> None:
    folder = HERE.venv / "clients" / "node"
    node = make_node(folder)
    script = folder / "node_clients.mjs"
    shutil.copyfile(CLIENTS / script.name, script)
    passed = run_client([node, script.name, server.base], folder)
    assert len(passed) == NODE_CHECKS, passed
