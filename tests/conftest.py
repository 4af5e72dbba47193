"""What every test shares: how llama.cpp's threads wait, and a small real model."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before anything loads llama.cpp: threads that spin while they wait starve each other when
# several engines share a few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Nor may a server that somebody has running answer in place of what is tested.
os.environ.setdefault("LOCALMISTRAL_NO_SERVER", "1")

# What bench has learnt of this machine would change plans, and loads would overwrite what doctor is
# to say of the last real one.
STATE = tempfile.TemporaryDirectory(prefix="localmistral-state-")
os.environ["XDG_STATE_HOME"] = STATE.name

# At the end, since scripts/test.py would otherwise hide the standard library's `test`.
sys.path.append(str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF: LOCALMISTRAL_TEST_MODEL, or what scripts/test.py fetched."""
    from bootstrap import HERE

    named = os.environ.get("LOCALMISTRAL_TEST_MODEL")
    path = Path(named) if named else HERE.model
    if not path.is_file():
        pytest.fail(f"The test model is not at {path}; run: python3 scripts/test.py")
    return path


def pytest_unconfigure() -> None:
    """Close what llama-cpp-python leaves open, which Python would complain of at its very end."""
    utilities = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        file = getattr(utilities, name, None)
        if file is not None:
            file.close()
    STATE.cleanup()
