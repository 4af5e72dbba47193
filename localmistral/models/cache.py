"""Which models are on this disk: in the Hub's cache, in the program's own folder and in the folders
of LOCALMISTRAL_MODELS.

Goes by names and sizes alone: no GGUF is opened here, so a damaged file still counts as present.
Walks the Hub's cache itself instead of calling `scan_cache_dir`, which gives up on a whole
repository at the first broken link, where this must say which shard is missing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs

from localmistral.errors import ModelNotFoundError
from localmistral.models.catalog import Catalog, Model, load_catalog
from localmistral.models.filenames import (
    FileSet,
    find_encoder,
    group_files,
    match_quant,
    parse_file_name,
)
from localmistral.models.names import (
    CatalogModel,
    HubRepository,
    LocalFiles,
    Resolved,
    describe_missing,
    quote_name,
    resolve,
)

_LOCK_GLANCE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model on disk: one file, or the shards of one set; an image encoder is an attachment."""

    name: str  # what -m takes to mean this one
    model: str | None  # its name in the catalogue
    repository: str | None  # None for files placed by hand
    revision: str | None
    quant: str | None  # as its file name says
    bytes: int  # of the shards that are there
    path: Path  # the first shard, which is what loads
    files: tuple[Path, ...]  # the shards that are there, in order
    problem: str  # why it can't be loaded, `shard 2 of 3 is missing`; empty when complete
    mmproj: Path | None

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return not self.problem

    def to_json(self) -> dict[str, Any]:
        """One row of `localmistral list`, in plain types."""
        return {
            "name": self.name,
            "model": self.model,
            "repository": self.repository,
            "revision": self.revision,
            "quant": self.quant,
            "bytes": self.bytes,
            "path": str(self.path),
            "files": [str(path) for path in self.files],
            "complete": self.complete,
            "problem": self.problem,
            "mmproj": None if self.mmproj is None else str(self.mmproj),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalScan:
    """What a look at the disk found; each warning is a sentence about what couldn't be read."""

    models: tuple[LocalModel, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """The GGUF files under one snapshot of a repository, or under one folder."""

    sets: tuple[FileSet, ...]
    repository: str | None = None
    revision: str | None = None


def models_folder() -> Path:
    """The program's own folder for GGUF files put there by hand; it may not exist."""
    return platformdirs.user_data_path("localmistral", appauthor=False) / "models"


def scan_local(catalog: Catalog | None = None) -> LocalScan:
    """Every model on disk, by name; copies that are the same files on disk are listed once."""
    known = catalog or load_catalog()
    warnings: list[str] = []
    places = [*_hub_places(warnings), *_folder_places(warnings)]
    found: dict[frozenset[str], LocalModel] = {}
    for place in places:
        for files in place.sets:
            if files.name.role == "model":
                local = _local_model(files, place, places, known)
                found.setdefault(_identity(local), local)
    models = sorted(found.values(), key=lambda local: local.name.casefold())
    return LocalScan(models=tuple(models), warnings=tuple(dict.fromkeys(warnings)))


def list_local() -> tuple[LocalModel, ...]:
    """`scan_local` without its warnings."""
    return scan_local().models


def find_local(resolved: Resolved, catalog: Catalog | None = None) -> LocalModel | None:
    """The complete local copy of a resolved name, the largest where no quant was asked for.

    None when there's none; incomplete copies don't count.
    """
    known = catalog or load_catalog()
    if isinstance(resolved, LocalFiles):
        return _named_by_path(resolved, known)
    models = select_local(resolved, (local for local in scan_local(known).models if local.complete))
    named = _listed_name(resolved)
    return max(models, key=lambda local: (local.name == named, local.bytes), default=None)


def find_copies(name: str) -> list[LocalModel]:
    """Every copy on this disk, complete or not, of what a name means; ModelNotFoundError if none.

    A name without a quant means all of them; of several publishers' copies of one quant, a name
    that one of them is listed by means that one.
    """
    resolved = resolve(name)
    models = scan_local().models
    if not isinstance(resolved, LocalFiles):
        found = select_local(resolved, models)
        named = _listed_name(resolved)
        found = [local for local in found if local.name == named] or found
    else:
        given = _named_by_path(resolved, load_catalog())
        found = [local for local in models if _identity(local) == _identity(given)] or [given]
    if not found:
        raise ModelNotFoundError(
            f"No file of {quote_name(name)} is on this disk.", "See localmistral list"
        )
    return found


def _listed_name(resolved: CatalogModel | HubRepository) -> str:
    """The name by which just one publisher's copy of a quant is listed."""
    return f"{resolved.model.name}:{resolved.quant}" if isinstance(resolved, CatalogModel) else ""


def select_local(
    resolved: CatalogModel | HubRepository, models: Iterable[LocalModel]
) -> list[LocalModel]:
    """Those of `models` that a name means: every quantisation where it names none."""
    if isinstance(resolved, CatalogModel):
        found = [local for local in models if local.model == resolved.model.name]
        # The catalogue's own spelling: its `Q4_K_M` and `UD-Q4_K_M` are different files.
        quant = resolved.quant
    else:
        wanted = resolved.id.casefold()
        found = [local for local in models if (local.repository or "").casefold() == wanted]
        quants = tuple({local.quant for local in found if local.quant})
        quant = resolved.quant and (match_quant(resolved.quant, quants) or resolved.quant)
    if not quant:
        return found
    return [m for m in found if quant in (m.quant, parse_file_name(m.path.name).full)]


def hub_cache() -> Path:
    """The Hub's cache folder, by HF_HUB_CACHE or HF_HOME at each call; it may not exist."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not named and (home := os.environ.get("HF_HOME")):
        named = str(Path(home) / "hub")
    if not named:
        from huggingface_hub import constants  # slow to import, and not needed by every command

        named = constants.HF_HUB_CACHE
    return Path(os.path.expandvars(named)).expanduser().absolute()


def repository_folder(repository: str) -> Path:
    """Where the Hub's cache keeps a repository; it may not exist."""
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def repository_folders() -> list[Path]:
    """The folders of all model repositories in the Hub's cache."""
    return [folder for folder in _folders(hub_cache(), []) if folder.name.startswith("models--")]


@contextmanager
def hold_blob(blob: Path) -> Iterator[bool]:
    """The Hub's lock for a blob while the block lasts; False where another process has it."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    folder = blob.parents[1]
    lock = folder.parent / ".locks" / folder.name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=_LOCK_GLANCE_S))
        except Timeout:
            yield False
        else:
            yield True


def delete_blob(blob: Path) -> None:
    """Delete a blob that no snapshot needs. OSError where the system refuses.

    A link leads into the store that the Hub's library shares among repositories: it knows whether
    anything else still needs what lies there.
    """
    from huggingface_hub import DeleteCacheStrategy

    if not blob.is_symlink():
        blob.unlink(missing_ok=True)
        return
    nothing: frozenset[Path] = frozenset()
    DeleteCacheStrategy(
        expected_freed_size=0,
        blobs=frozenset([blob]),
        refs=nothing,
        repos=nothing,
        snapshots=nothing,
        cache_dir=hub_cache(),
    ).execute()


def _hub_places(warnings: list[str]) -> list[_Place]:
    """Each repository's snapshots, the one `main` points to first, then the newest first."""
    places = []
    for folder in _folders(hub_cache(), warnings):
        if folder.name.startswith("models--"):
            repository = folder.name.removeprefix("models--").replace("--", "/")
            main = _main_revision(folder)
            snapshots = _folders(folder / "snapshots", warnings)
            snapshots.sort(key=lambda s: (s.name == main, _modified(s)), reverse=True)
            for snapshot in snapshots:
                sets = group_files(_gguf_files(snapshot, warnings))
                places.append(_Place(sets=sets, repository=repository, revision=snapshot.name))
    return places


def _main_revision(repository_folder: Path) -> str | None:
    try:
        return (repository_folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None  # a repository fetched by commit has no such ref


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # gone since it was listed


def _folder_places(warnings: list[str]) -> list[_Place]:
    folders = [models_folder()] if _is_folder(models_folder()) else []
    for text in os.environ.get("LOCALMISTRAL_MODELS", "").split(os.pathsep):
        if not text.strip():
            continue
        folder = _expanded(text.strip())
        if _is_folder(folder):
            folders.append(folder)
        else:
            shown = quote_name(text.strip())
            warnings.append(f"LOCALMISTRAL_MODELS names {shown}, which is no readable folder.")
    return [_Place(sets=group_files(_gguf_files(folder, warnings))) for folder in folders]


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~name` of nobody
        return Path(text)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _folders(parent: Path, warnings: list[str]) -> list[Path]:
    """The folders in `parent`, none when it doesn't exist."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        warnings.append(_unreadable(error))
        return []


def _gguf_files(folder: Path, warnings: list[str]) -> list[Path]:
    """All GGUF paths under a folder, broken links among them; links to folders aren't followed."""
    walk = os.walk(folder, onerror=lambda error: warnings.append(_unreadable(error)))
    return [
        Path(parent, name)
        for parent, _, names in walk
        for name in names
        if name.lower().endswith(".gguf")
    ]


def _unreadable(error: OSError) -> str:
    return f"{quote_name(str(error.filename))} can't be read: {error.strerror}."


def _local_model(
    files: FileSet, place: _Place, places: Iterable[_Place], catalog: Catalog
) -> LocalModel:
    sizes = {path: size for path in files.paths if (size := _size_of(path)) is not None}
    there = FileSet(name=files.name, first=files.first, paths=tuple(sizes))
    problem = describe_missing(there)
    if files.name.shards == 1 and problem:
        problem = "its file is a broken link or unreadable"
    model = catalog.model_of(place.repository, files.name.base)
    same_repository = [p for p in places if p.repository and p.repository == place.repository]
    mmproj = _encoder_for(files, place.sets) or next(
        (
            encoder
            for other in same_repository
            if (encoder := _encoder_for(files, other.sets, anywhere=True))
        ),
        None,
    )
    return LocalModel(
        name=_name_of(files, place.repository, model),
        model=None if model is None else model.name,
        repository=place.repository,
        revision=place.revision,
        quant=files.name.quant,
        bytes=sum(sizes.values()),
        path=files.first,
        files=there.paths,
        problem=problem,
        mmproj=mmproj,
    )


def _name_of(files: FileSet, repository: str | None, model: Model | None) -> str:
    """Short where the catalogue means just this repository's file, else exact."""
    quant = files.name.quant
    for listed in model.quants if model else ():
        if model and (listed.name, listed.repository) == (quant, repository):
            return f"{model.name}:{quant}"
    if repository and "/" in repository:
        return f"hf:{repository}:{quant}" if quant else f"hf:{repository}"
    return str(files.first)


def _encoder_for(files: FileSet, sets: Iterable[FileSet], *, anywhere: bool = False) -> Path | None:
    return find_encoder(
        files, sets, anywhere=anywhere, is_there=lambda path: _size_of(path) is not None
    )


def _size_of(path: Path) -> int | None:
    """Bytes of a file, through links; None for a broken link or anything that's no file."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _identity(local: LocalModel) -> frozenset[str]:
    """The same for two listings of the same files, such as two snapshots linking to one blob."""
    return frozenset(os.path.realpath(path) for path in local.files or (local.path,))


def _named_by_path(resolved: LocalFiles, catalog: Catalog) -> LocalModel:
    """The files of a path that was given, with the image encoder that lies beside them."""
    folder = resolved.path.parent
    beside = [*folder.glob("*"), *folder.parent.glob("*mmproj*")]
    sets = group_files(path for path in beside if path.suffix.lower() == ".gguf")
    place = _Place(sets=sets)
    name = parse_file_name(resolved.path.name)
    files = FileSet(name=name, first=resolved.path, paths=resolved.files)
    local = _local_model(files, place, (), catalog)
    return replace(local, name=resolved.name) if resolved.name else local
