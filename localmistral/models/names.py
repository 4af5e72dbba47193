"""What a user's model name means: a model of the catalogue (`small-4`, `ministral-3-8b:Q4_K_M`), a
Hub repository (`hf:org/repo:QUANT`) or a file or folder on disk.

Looks at the disk only for names that are paths; knows nothing of the network, so whether a
repository exists isn't checked here.
"""

import difflib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeAlias

from localmistral.errors import ModelFileError, ModelNotFoundError, UsageError
from localmistral.models.catalog import Catalog, Model, load_catalog
from localmistral.models.filenames import (
    FileSet,
    fold_name,
    group_files,
    match_quant,
    parse_file_name,
    shard_siblings,
)

_HUB = re.compile(
    r"(?:hf:(?://)?|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)(.*)", re.I | re.S
)
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"({_PART}/{_PART})(?:/tree/main)?/?(?::([A-Za-z0-9][A-Za-z0-9_.-]*))?")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_SHOWN_LENGTH = 120
DEMO = "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogModel:
    """A model of the catalogue; `quant` as the catalogue spells it, None to leave the choice."""

    model: Model
    quant: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRepository:
    """A Hub repository `org/name`; `quant` as typed, None to leave the choice."""

    id: str
    quant: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
    """A model on disk: all its shards in order, absolute paths; `path` (shard 1) is what loads.

    `name` is set where it has one that -m takes; else the path is its name.
    """

    path: Path
    files: tuple[Path, ...]
    name: str = ""


Resolved: TypeAlias = CatalogModel | HubRepository | LocalFiles


def resolve(name: str, catalog: Catalog | None = None) -> Resolved:
    """What `name` stands for.

    A bare Ministral name is the instruct model (`ministral-3-8b-reasoning` is the other). Raises
    UsageError for a malformed name, ModelNotFoundError for an unknown model, quant or file, and
    ModelFileError for a file that's there but can't be used as a model.
    """
    if not name.strip():
        raise UsageError("The model's name is empty.", "See `localmistral models`.")
    if fold_name(name) == DEMO:
        return _find_demo()
    hub = _HUB.fullmatch(name.strip())
    if hub:
        return _resolve_hub(name, hub[1])
    if _is_path(name):
        return _resolve_path(name)
    try:
        return _resolve_catalog(name, catalog or load_catalog())
    except ModelNotFoundError:
        # A bare file name without .gguf; the catalogue's names go first.
        if len(name) < _SHOWN_LENGTH and Path(name).exists():
            return _resolve_path(name)
        raise


def _find_demo() -> LocalFiles:
    """The toy model in the package: it shows what the program does, and knows next to nothing."""
    path = Path(str(resources.files("localmistral"))) / "data" / "demo.gguf"
    if not path.is_file():
        raise ModelNotFoundError(
            "The demo model is missing from this installation.", "Install localmistral again."
        )
    return LocalFiles(path=path, files=(path,), name=DEMO)


def quote_name(text: str) -> str:
    """`text` in quotes for a message: control characters spelled out, and of bounded length."""
    if len(text) > _SHOWN_LENGTH:
        text = f"{text[: _SHOWN_LENGTH // 2]}...{text[-_SHOWN_LENGTH // 2 :]}"
    return "'" + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + "'"


def _resolve_hub(name: str, rest: str) -> HubRepository:
    match = _REPOSITORY.fullmatch(rest)
    # The Hub itself refuses these two in names; `..` must never become part of a path.
    if match is None or ".." in match[1] or "--" in match[1]:
        raise UsageError(
            f"{quote_name(name)} is not a Hub repository.",
            "Write hf:ORG/REPOSITORY or hf:ORG/REPOSITORY:QUANT.",
        )
    return HubRepository(id=match[1], quant=match[2])


def _is_path(name: str) -> bool:
    if name.lower().endswith(".gguf") or _DRIVE.match(name) or name.startswith("~"):
        return True
    return name in (".", "..") or "/" in name or "\\" in name


def _resolve_catalog(name: str, catalog: Catalog) -> CatalogModel:
    wanted, colon, quant = name.partition(":")
    model = catalog.find(wanted)
    if model is None:
        near = _nearest_names(wanted, catalog)
        raise ModelNotFoundError(
            f"No model is called {quote_name(wanted)}; the nearest names are {_listed(near)}.",
            "See `localmistral models`; -m also takes hf:ORG/REPOSITORY or a file.",
        )
    if not colon:
        return CatalogModel(model=model)
    names = tuple(listed.name for listed in model.quants)
    found = match_quant(quant, names)
    if found is None:
        near = difflib.get_close_matches(quant.upper(), names, n=3, cutoff=0)
        raise ModelNotFoundError(
            f"{model.name} has no quant {quote_name(quant)}; the nearest are {_listed(near)}.",
            f"It has {', '.join(names)}; any other file: -m hf:{model.repositories[0].id}:QUANT.",
        )
    return CatalogModel(model=model, quant=found)


def _nearest_names(wanted: str, catalog: Catalog) -> list[str]:
    """The three nearest models, each by the name or alias that is nearest."""
    folded = fold_name(wanted)[:_SHOWN_LENGTH]

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, folded, name).ratio()

    best = [DEMO, *(max((m.name, *m.aliases), key=likeness) for m in catalog.models)]
    return sorted(best, key=likeness, reverse=True)[:3]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def _resolve_path(name: str) -> LocalFiles:
    try:
        path = Path(name).expanduser().absolute()
        if path.is_dir():
            return _only_model(path, name)
        there = path.is_file() and [p for p in shard_siblings(path) if p.is_file()]
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL byte, unknown ~user
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.rstrip(".")
        raise ModelNotFoundError(f"{quote_name(name)} can't be read: {reason}.") from error
    if not there:
        raise _no_such_path(name)
    if path.suffix.lower() != ".gguf":  # a blob of some cache, say: its content will tell
        return LocalFiles(path=path, files=(path,))
    role = parse_file_name(path.name).role
    if role != "model":
        kind = "an image encoder" if role == "mmproj" else "an importance matrix"
        raise ModelFileError(f"{quote_name(name)} is {kind}, not a model.", "Name the model.")
    return _complete(group_files(there)[0], name)


def _no_such_path(name: str) -> ModelNotFoundError:
    repository = _REPOSITORY.fullmatch(name)
    hint = f"For a Hub repository write hf:{name}" if repository else "See `localmistral list`."
    return ModelNotFoundError(f"There is no file or folder {quote_name(name)}.", hint)


def _only_model(folder: Path, name: str) -> LocalFiles:
    """The one model of a folder; a level of subfolders counts, where publishers put shards."""
    paths = [p for pattern in ("*", "*/*") for p in folder.glob(pattern)]
    sets = [s for s in group_files(p for p in paths if p.is_file()) if s.name.role == "model"]
    if not sets:
        raise ModelNotFoundError(f"The folder {quote_name(name)} has no .gguf model in it.")
    if len(sets) > 1:
        names = [quote_name(str(s.first.relative_to(folder))) for s in sets]
        more = [f"{len(names) - 5} more"] if len(names) > 6 else names[5:]
        raise ModelNotFoundError(
            f"The folder {quote_name(name)} has {len(sets)} models: {_listed(names[:5] + more)}.",
            "Name one of the files.",
        )
    return _complete(sets[0], name)


def _complete(files: FileSet, name: str) -> LocalFiles:
    if files.missing:
        raise ModelFileError(
            f"{quote_name(name)} is incomplete: {describe_missing(files)}.",
            "Put all shards of one revision into one folder.",
        )
    return LocalFiles(path=files.first, files=files.paths)


def describe_missing(files: FileSet) -> str:
    """`shard 2 of 3 is missing`; empty when nothing is."""
    missing = files.missing
    if len(missing) > 3:
        return f"{len(missing)} of {files.name.shards} shards are missing"
    numbers = _listed([str(n) for n in missing]) if missing else ""
    verb = ("shard", "is") if len(missing) == 1 else ("shards", "are")
    total = files.name.shards
    return f"{verb[0]} {numbers} of {total} {verb[1]} missing" if missing else ""
