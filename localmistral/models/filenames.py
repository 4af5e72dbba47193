"""What the name of a GGUF file says: the model's base name, the quant, the shard, whether it's a
model at all; and files grouped into models.

Pure text and paths: opens no file, so it can't know whether a file is what its name claims.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Image encoders come in several precisions; the files publishers ship by default come first.
_ENCODER_ORDER = ("F16", "BF16", "Q8_0", "F32")

Role = Literal["model", "mmproj", "other"]

# llama.cpp's own naming of split files: NAME-00001-of-00003.gguf.
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})", re.DOTALL)
_QUANT = r"""(?:UD-)?(?:
    I?Q[1-9]_[A-Z0-9]+(?:_[A-Z0-9]+)* | TQ[12]_0 | MXFP4(?:_[A-Z]+)? | NVFP4 | BF16 | F16 | F32
)"""
# `i1-` marks an importance matrix in some publishers' names and belongs to neither part.
_TAIL = re.compile(rf"(.*?)[-._]?(?:i1-)?(?<![A-Za-z0-9])({_QUANT})", re.I | re.X | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileName:
    """A GGUF's name taken apart; `base` keeps the publisher's spelling, `quant` is upper case."""

    base: str
    quant: str | None
    role: Role
    shard: int = 1
    shards: int = 1

    @property
    def full(self) -> str:
        """What tells a quant from the same one of another model in a repository."""
        return f"{self.base}-{self.quant}" if self.quant else self.base


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSet:
    """One model or image encoder: a single file, or all shards of one name in one folder."""

    name: FileName
    first: Path  # where shard 1 is or should be
    paths: tuple[Path, ...]  # the shards there are, in order

    @property
    def missing(self) -> tuple[int, ...]:
        """Numbers of the shards that aren't there, from 1."""
        there = {parse_file_name(path.name).shard for path in self.paths}
        return tuple(n for n in range(1, self.name.shards + 1) if n not in there)


def parse_file_name(file_name: str) -> FileName:
    """Take a GGUF file's name (no folders) apart; never fails, the least it finds is a base."""
    stem = file_name[:-5] if file_name.lower().endswith(".gguf") else file_name
    shard, shards = 1, 1
    split = _SHARD.fullmatch(stem)
    if split and 1 <= int(split[2]) <= int(split[3]):
        stem, shard, shards = split[1], int(split[2]), int(split[3])
    role = _role_of(stem)
    if role == "mmproj":
        stem = re.sub(r"[-._]?mmproj[-._]?", "-", stem, flags=re.I).strip("-")
    tail = _TAIL.fullmatch(stem)
    base, quant = (tail[1], tail[2].upper()) if tail else (stem, None)
    return FileName(base=base, quant=quant, role=role, shard=shard, shards=shards)


def shard_paths(path: str, shards: int) -> tuple[str, ...]:
    """`Q8_0/x.gguf`, 2 -> `Q8_0/x-00001-of-00002.gguf`, ...; the path itself when there's one."""
    if shards == 1:
        return (path,)
    stem = path.removesuffix(".gguf")
    return tuple(f"{stem}-{n:05}-of-{shards:05}.gguf" for n in range(1, shards + 1))


def shard_siblings(path: Path) -> tuple[Path, ...]:
    """All files that must lie together for the model that `path` is one shard of, in order."""
    name = parse_file_name(path.name)
    split = _SHARD.fullmatch(path.name[:-5])
    if name.shards == 1 or split is None:
        return (path,)
    rest = f"-of-{split[3]}{path.suffix}"
    return tuple(path.with_name(f"{split[1]}-{n:05}{rest}") for n in range(1, name.shards + 1))


def group_files(paths: Iterable[Path]) -> tuple[FileSet, ...]:
    """Models and image encoders among GGUF paths, sorted by path; other GGUFs are left out."""
    sets: dict[Path, list[Path]] = {}
    for path in sorted(paths):
        if path.suffix.lower() == ".gguf" and parse_file_name(path.name).role != "other":
            sets.setdefault(shard_siblings(path)[0], []).append(path)
    return tuple(
        FileSet(name=parse_file_name(first.name), first=first, paths=tuple(members))
        for first, members in sets.items()
    )


def find_encoder(
    files: FileSet,
    sets: Iterable[FileSet],
    *,
    anywhere: bool = False,
    is_there: Callable[[Path], bool] = lambda _: True,
) -> Path | None:
    """The image encoder that belongs to a model: one of the same name, else one without a name of
    its own among no other model; beside it, or a folder above shards, as publishers lay them."""
    base, folder = fold_base(files.name.base), files.first.parent
    near = (folder, folder.parent) if files.name.shards > 1 else (folder,)
    sets = tuple(sets)
    models = [other for other in sets if other.name.role == "model"]
    fits = []
    for encoder in sets:
        where = encoder.first.parent
        if encoder.name.role != "mmproj" or not (anywhere or where in near):
            continue
        own = fold_base(encoder.name.base)
        around = {fold_base(m.name.base) for m in models if where in m.first.parents}
        if (own == base or (not own and around <= {base})) and is_there(encoder.first):
            fits.append(encoder)
    best = min(fits, key=lambda encoder: _preference(encoder.name.quant), default=None)
    return None if best is None else best.first


def _preference(quant: str | None) -> int:
    return _ENCODER_ORDER.index(quant) if quant in _ENCODER_ORDER else len(_ENCODER_ORDER)


def fold_name(name: str) -> str:
    """The form in which names are compared: `Mistral_Small 4` -> `mistral-small-4`."""
    return re.sub(r"[\s_]+", "-", name.strip().casefold())


def fold_base(base: str) -> str:
    """`fold_name` of a file's base name, without the organisation some publishers put in front."""
    return fold_name(base).removeprefix("mistralai-")


def match_quant(asked: str, available: Sequence[str]) -> str | None:
    """The available quant that is meant: case and separators don't matter, and a leading `UD-`
    may be added or left out where that leaves one candidate."""
    wanted = _quant_key(asked)
    exact = {quant for quant in available if _quant_key(quant) == wanted}
    loose = {q for q in available if _plain(_quant_key(q)) == _plain(wanted)}
    for found in (exact, loose):
        if len(found) == 1:
            return found.pop()
    return None


def _quant_key(quant: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", quant.upper())


def _plain(key: str) -> str:
    return key.removeprefix("UD")


def _role_of(stem: str) -> Role:
    if "mmproj" in stem.lower():
        return "mmproj"
    # Importance matrices are stored as GGUF beside the models made with them.
    return "other" if "imatrix" in stem.lower() else "model"
