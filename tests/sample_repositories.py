"""Repositories of tiny models that llama.cpp loads, laid out and named as publishers do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import Gguf, Typed, tiny_llama, tiny_mistral4
from hub import Stored

from localmistral.models.header import ValueType

SMALL_4 = "unsloth/Mistral-Small-4-119B-2603-GGUF"
STEM = "Mistral-Small-4-119B-2603"
NEMO = "someone/Nemo-GGUF"


def weights(file: Gguf, mark: int = 0) -> bytes:
    """A file whose weights are nearly zero, so that marks make other files of the same size."""
    return file.data()[:-1] + bytes([mark])


def shards(mark: int = 0, count: int = 3) -> list[bytes]:
    """Small 4 in miniature: metadata alone, then its tensors; the mark is in the second shard."""
    whole = tiny_mistral4()
    tensors = list(whole.tensors)
    assert isinstance(whole.metadata, dict)
    per_shard = -(-len(tensors) // (count - 1))
    parts = [[], *(tensors[n * per_shard : (n + 1) * per_shard] for n in range(count - 1))]
    files = [
        Gguf(
            metadata={
                **(whole.metadata if number == 0 else {}),
                "split.no": Typed(ValueType.UINT16, number),
                "split.count": Typed(ValueType.UINT16, count),
                "split.tensors.count": Typed(ValueType.INT32, len(tensors)),
            },
            tensors=part,
        )
        for number, part in enumerate(parts)
    ]
    return [
        weights(f, mark if n == 1 else 0) if f.tensors else f.data() for n, f in enumerate(files)
    ]


def shard_path(quant: str, number: int, count: int = 3) -> str:
    return f"{quant}/{STEM}-{quant}-{number:05}-of-{count:05}.gguf"


def sharded(quant: str, mark: int) -> dict[str, Stored]:
    return {shard_path(quant, n): Stored(content=data) for n, data in enumerate(shards(mark), 1)}


def small_4() -> dict[str, Stored]:
    """Two sharded quants that share shards 1 and 3, two single ones, an encoder, a readme."""
    return {
        "README.md": Stored(content=b"# Small 4\n", lfs=False),
        f"{STEM}-UD-IQ3_S.gguf": Stored(content=weights(tiny_mistral4(), 1)),
        f"{STEM}-UD-IQ1_M.gguf": Stored(content=weights(tiny_mistral4(), 2)),
        "mmproj-F16.gguf": Stored(content=b"GGUF of an image encoder" * 50),
        "mmproj-F32.gguf": Stored(content=b"GGUF of a larger encoder" * 99),
        **sharded("UD-Q4_K_M", 3),
        **sharded("UD-Q4_K_XL", 4),
    }


def nemo() -> dict[str, Stored]:
    """Two quants of one model that isn't in the catalogue."""
    return {
        "Nemo-Q4_K_M.gguf": Stored(content=weights(tiny_llama(), 1)),
        "Nemo-Q8_0.gguf": Stored(content=weights(tiny_llama(), 2)),
    }


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path, endpoint: str) -> None:
    """This process and its children see an empty disk below `folder`, and that Hub."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "LOCALMISTRAL_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    for name in ("DATA", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(folder / name.lower()))
    monkeypatch.setenv("COLUMNS", "100")


def run_cli(
    *arguments: object, env: dict[str, str] | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "localmistral", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        env=env,
        check=False,
    )


def check_refusal(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One sentence and a hint at the end of stderr, nothing on stdout, no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    last = done.stderr[done.stderr.index("error: ") :]
    assert len(last.splitlines()) <= 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def rows(document: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in document]
