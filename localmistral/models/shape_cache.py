"""Shapes of files on the Hub, kept on this disk so that planning again moves no byte.

Keyed by what identifies the files' content; knows neither the Hub nor headers.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, fields
from math import prod
from pathlib import Path
from typing import Any

import platformdirs

from localmistral.models.shape import (
    FileKind,
    ModelShape,
    Rope,
    SpecialTokens,
    Tensor,
    Tokenizer,
    layer_of,
    role_of,
)

FORMAT = 2
"""Raised whenever what a shape holds changes: older files are then read from the Hub again."""
KEPT_FILES = 400
"""Some 60 KB each."""


def shapes_folder() -> Path:
    """Where the shapes are kept; it may not exist."""
    return platformdirs.user_cache_path("localmistral", appauthor=False) / "shapes"


def load_shape(identities: Iterable[str]) -> ModelShape | None:
    """The shape of the files of these identities (hashes, in order); None where it isn't kept."""
    try:
        text = _path_of(identities).read_text(encoding="utf-8")
        return parse_shape(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, cut short or of another version: it's read from the Hub again


def save_shape(identities: Iterable[str], shape: ModelShape) -> None:
    """Keep a shape; a disk that refuses only makes the next plan slower."""
    path = _path_of(identities)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(shape_json(shape)), encoding="utf-8")
        unfinished.replace(path)
        kept = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in kept[KEPT_FILES:]:
            file.unlink(missing_ok=True)


def shape_json(shape: ModelShape) -> dict[str, Any]:
    """A shape in plain types; of tensors what the rest doesn't follow from."""
    simple = {
        field.name: getattr(shape, field.name)
        for field in fields(shape)
        if field.name not in ("files", "tensors", "rope", "tokenizer")
    }
    return {
        **simple,
        "format": FORMAT,
        "files": [path.as_posix() for path in shape.files],
        "rope": asdict(shape.rope),
        "tokenizer": asdict(shape.tokenizer),
        "tensors": [[t.name, t.dims, t.type, t.bytes, t.file_index] for t in shape.tensors],
    }


def parse_shape(document: Any) -> ModelShape:
    """The inverse of `shape_json`. ValueError, KeyError or TypeError for anything else."""
    if not isinstance(document, dict):
        raise TypeError("no object")
    values = {name: _frozen(value) for name, value in document.items()}
    if values.pop("format") != FORMAT:
        raise ValueError("another version's")
    tokenizer = dict(document["tokenizer"])
    tokenizer["special"] = SpecialTokens(**tokenizer["special"])
    tokenizer["named_chat_templates"] = _frozen(tokenizer["named_chat_templates"])
    kind = FileKind(values["kind"])
    is_model = kind is FileKind.MODEL
    values |= {
        "files": tuple(Path(path) for path in values["files"]),
        "kind": kind,
        "rope": Rope(**document["rope"]),
        "tokenizer": Tokenizer(**tokenizer),
        "tensors": tuple(_tensor(row, is_model) for row in values["tensors"]),
    }
    return ModelShape(**values)


def _tensor(row: tuple[Any, ...], is_model: bool) -> Tensor:
    name, dims, kind, size, file_index = row
    return Tensor(
        name=name,
        dims=dims,
        type=kind,
        elements=prod(dims),
        bytes=size,
        file_index=file_index,
        layer=layer_of(name) if is_model else None,
        role=role_of(name),
    )


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _path_of(identities: Iterable[str]) -> Path:
    digest = hashlib.sha256("\n".join(identities).encode()).hexdigest()
    return shapes_folder() / f"{digest}.json"
