"""What the Hub has of a model: its quantisations with their files, and their shapes from headers
read over the network in a few pieces.

Knows the Hub's answers through models/download.py alone; downloads no model and chooses none.
"""

import difflib
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from localmistral.errors import (
    DownloadError,
    LocalMistralError,
    ModelFileError,
    ModelNotFoundError,
)
from localmistral.models.catalog import Model
from localmistral.models.download import hub_endpoint, is_offline, list_repository, read_range
from localmistral.models.filenames import FileSet, find_encoder, fold_base, group_files, match_quant
from localmistral.models.gguf import check_shard, join_headers
from localmistral.models.header import ValueType
from localmistral.models.hub import HubFile, Listing, check_file
from localmistral.models.metadata import Metadata
from localmistral.models.names import CatalogModel, HubRepository, quote_name
from localmistral.models.parallel import map_parallel
from localmistral.models.remote_header import Lender, make_lender, read_borrowing, read_whole
from localmistral.models.shape import FileKind, ModelShape
from localmistral.models.shape_cache import load_shape, save_shape
from localmistral.models.transfer import GaveUpError, Patience
from localmistral.units import format_bytes

CONNECTIONS = 8
"""Headers read at once: each is two or three short requests, which mostly wait."""
REACH_TIMEOUT_S = 3.0
"""A plan can do without the Hub, so it waits less than a download for a network that swallows
packets."""
_HEADER_PATIENCE = Patience(stall_s=10.0, connect_s=5.0, tries=4)
"""People wait for a plan, and it can be made of estimates."""

OnNote = Callable[[str], None]
OnHub = CatalogModel | HubRepository


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFiles:
    """One quantisation in a repository at one commit: all shards in order, and the encoder."""

    name: str  # the quant, or the file's stem where the repository has several of that quant
    repository: str
    commit: str
    revision: str | None  # the branch that was listed
    files: tuple[HubFile, ...]
    mmproj: HubFile | None

    @property
    def all_files(self) -> tuple[HubFile, ...]:
        """The model's, then the image encoder's."""
        return self.files if self.mmproj is None else (*self.files, self.mmproj)

    @property
    def bytes(self) -> int:
        """Of all files together, the image encoder's included."""
        return sum(file.bytes for file in self.all_files)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteQuant:
    """A quantisation on the Hub with the shape that its headers state."""

    name: str
    repository: str
    commit: str
    revision: str | None
    files: tuple[HubFile, ...]
    mmproj: HubFile | None
    shape: ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """A set of files to read headers of: which, what was moved for it so far, and whose
    vocabulary may be borrowed."""

    source: RemoteFiles
    moved: list[int]
    lender: Lender | None = None


def list_remote(resolved: OnHub, *, on_note: OnNote = lambda _: None) -> tuple[RemoteFiles, ...]:
    """Every complete quantisation the Hub has of a model, from the preferred repository that has
    it; only the one meant where the name says which.

    Raises LocalMistralError when the Hub can't be reached or knows no such repository, and
    ModelNotFoundError when there's no such quantisation.
    """
    if isinstance(resolved, HubRepository):
        found = _list_sets(list_repository(resolved.id), on_note)
        return (_choose(found, resolved.quant),) if resolved.quant else found
    repositories = _repositories_of(resolved.model, resolved.quant)
    found = _list_repositories(resolved.model, repositories, on_note)
    return (_choose(found, resolved.quant),) if resolved.quant else found


def find_remote(resolved: OnHub, *, on_note: OnNote = lambda _: None) -> RemoteFiles | None:
    """The one set of files a name means; None where it leaves the choice among several."""
    found = list_remote(resolved, on_note=on_note)
    return found[0] if len(found) == 1 else None


def remote_candidates(
    resolved: OnHub, *, on_note: OnNote = lambda _: None
) -> tuple[RemoteQuant, ...]:
    """Every quantisation with the shape its headers state, read in parallel and kept on this disk.

    `on_note` gets a sentence about what was left out, and how many bytes were moved. Raises as
    `list_remote`, after seconds where no network is there, and ModelFileError or DownloadError
    where no file can be read.
    """
    _check_reachable()
    sources = list_remote(resolved, on_note=on_note)
    shapes = {source: load_shape(_identities(source)) for source in sources}
    unread = [source for source, shape in shapes.items() if shape is None]
    if unread:
        moved: list[int] = []
        read, failures = _read_shapes(unread, moved)
        shapes |= read
        for source, failure in failures.items():
            on_note(f"{source.name} of {source.repository} is left out: {failure.message}")
        if not any(shapes.values()):
            raise next(iter(failures.values()))
        count = "1 quantisation" if len(unread) == 1 else f"{len(unread)} quantisations"
        on_note(
            f"Read {format_bytes(sum(moved))} of headers to plan {count} of "
            f"{', '.join(dict.fromkeys(source.repository for source in unread))}."
        )
    return tuple(
        _join(source, shape)
        for source, shape in shapes.items()
        if shape is not None and shape.kind is FileKind.MODEL and shape.tensors
    )


def _check_reachable() -> None:
    """Raise DownloadError where nothing answers; through a proxy only asking can tell."""
    url = urlsplit(hub_endpoint())
    if is_offline() or getproxies() or not url.hostname:
        return
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise DownloadError(
            f"{url.hostname} can't be reached: {error.strerror or error}.",
            "Check the network; models on this disk run without it: localmistral list",
        ) from error


def _join(source: RemoteFiles, shape: ModelShape) -> RemoteQuant:
    return RemoteQuant(
        name=source.name,
        repository=source.repository,
        commit=source.commit,
        revision=source.revision,
        files=source.files,
        mmproj=source.mmproj,
        shape=shape,
    )


# What repositories have.


def _repositories_of(model: Model, quant: str | None) -> dict[str, frozenset[str] | None]:
    """Which repositories to ask, the preferred one first, and for which quants; None: for all.

    Another than the preferred one counts for the quants only that the catalogue lists for it:
    25 more files of the same model by another publisher are no better choice.
    """
    first = model.repositories[0].id
    wanted = [listed for listed in model.quants if quant in (None, listed.name)]
    others = {listed.repository for listed in wanted} - {first}
    asked: dict[str, frozenset[str] | None] = {}
    for repository in model.repositories:
        listed_here = frozenset(q.name for q in wanted if q.repository == repository.id)
        if repository.id == first and (quant is None or listed_here):
            asked[first] = None
        elif repository.id in others:
            asked[repository.id] = listed_here
    return asked


def _list_repositories(
    model: Model, asked: dict[str, frozenset[str] | None], on_note: OnNote
) -> tuple[RemoteFiles, ...]:
    answers = map_parallel(_try_listing, list(asked), threads=CONNECTIONS)
    found: dict[str, RemoteFiles] = {}
    failures = [answer for answer in answers if isinstance(answer, LocalMistralError)]
    for answer, quants in zip(answers, asked.values(), strict=True):
        if isinstance(answer, Listing):
            for source in _list_sets(answer, on_note):
                if quants is None or source.name in quants:
                    found.setdefault(source.name, source)
    if not found:
        raise failures[0] if failures else _nothing_of(model, asked)
    for failure in failures:
        on_note(failure.message)
    return tuple(found.values())


def _try_listing(repository: str) -> Listing | LocalMistralError:
    try:
        return list_repository(repository)
    except LocalMistralError as error:
        return error


def _nothing_of(model: Model, repositories: Iterable[str]) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"No repository has the files that are listed for {model.name}: {', '.join(repositories)}.",
        "Name another repository: localmistral pull hf:ORG/REPOSITORY:QUANT",
    )


def _list_sets(listing: Listing, on_note: OnNote) -> tuple[RemoteFiles, ...]:
    """The complete models of a listing, by path; incomplete and unsafe ones are said."""
    by_path = {Path(file.path): file for file in _usable_files(listing, on_note)}
    sets = group_files(by_path)
    models = [files for files in sets if files.name.role == "model"]
    for files in models:
        if files.missing:
            on_note(
                f"{listing.repository} lacks {len(files.missing)} of {files.name.shards} shards "
                f"of {files.first.name}: it is left out."
            )
    # Of one quantisation in one file and again in shards, the first will do.
    complete: dict[tuple[str, str | None], FileSet] = {}
    for files in models:
        if not files.missing:
            complete.setdefault((fold_base(files.name.base), files.name.quant), files)
    if not complete:
        raise ModelNotFoundError(
            f"{listing.repository} has no GGUF model among its {len(listing.files)} files.",
            "Repositories with GGUF files mostly have names that end in -GGUF.",
        )
    counts = Counter(quant for _, quant in complete)
    return tuple(
        RemoteFiles(
            name=_name_of(files, counts),
            repository=listing.repository,
            commit=listing.commit,
            revision=listing.revision,
            files=tuple(by_path[path] for path in files.paths),
            mmproj=_encoder_of(files, sets, by_path),
        )
        for files in complete.values()
    )


def _usable_files(listing: Listing, on_note: OnNote) -> Iterator[HubFile]:
    """The GGUF files whose names, sizes and hashes may be used."""
    for file in listing.files:
        if file.path.lower().endswith(".gguf"):
            try:
                yield check_file(file)
            except DownloadError as error:
                on_note(f"{error.message} It is left out.")


def _encoder_of(
    files: FileSet, sets: Sequence[FileSet], by_path: dict[Path, HubFile]
) -> HubFile | None:
    path = find_encoder(files, sets) or find_encoder(files, sets, anywhere=True)
    return None if path is None else by_path[path]


def _name_of(files: FileSet, counts: Counter[str | None]) -> str:
    quant = files.name.quant
    return quant if quant is not None and counts[quant] == 1 else files.name.full


def _choose(found: Sequence[RemoteFiles], quant: str) -> RemoteFiles:
    names = tuple(source.name for source in found)
    name = quant if quant in names else match_quant(quant, names)
    if name is not None:
        return next(source for source in found if source.name == name)
    near = difflib.get_close_matches(quant.upper(), names, n=1, cutoff=0)[0]
    raise ModelNotFoundError(
        f"{found[0].repository} has no quantisation {quote_name(quant)}; it has "
        f"{', '.join(names)}.",
        f"localmistral pull hf:{found[0].repository}:{near}",
    )


# What their headers say.


def _identities(source: RemoteFiles) -> list[str]:
    """What the shape depends on: each file's name (shards go by it) and content."""
    return [
        f"{file.path} {file.key or f'{source.repository}@{source.commit}'}" for file in source.files
    ]


def _read_shapes(
    sources: Sequence[RemoteFiles], moved: list[int]
) -> tuple[dict[RemoteFiles, ModelShape], dict[RemoteFiles, LocalMistralError]]:
    """Shapes, and what is wrong with the files that have none that can be read. The first header is
    read whole, the others borrow its vocabulary."""
    # one with tensors first: how long its rest is says how much to read of the others
    first, *others = sorted(sources, key=lambda s: (len(s.files) > 1, s.files[0].bytes))
    lender: Lender | None = None
    shapes: dict[RemoteFiles, ModelShape] = {}
    failures: dict[RemoteFiles, LocalMistralError] = {}
    try:
        heads = _read_headers(_Reading(source=first, moved=moved))
        lender = make_lender(heads[0])
        shapes[first] = _shape_of(first, heads, are_texts_checked=False)
    except GaveUpError:
        raise
    except (ModelFileError, DownloadError) as error:
        failures[first] = error
    readings = [_Reading(source=source, moved=moved, lender=lender) for source in others]
    answers = map_parallel(_try_reading, readings, threads=CONNECTIONS)
    for source, answer in zip(others, answers, strict=True):
        if isinstance(answer, ModelShape):
            shapes[source] = answer
        else:
            failures[source] = answer
    for source, shape in shapes.items():
        save_shape(_identities(source), shape)
    return shapes, failures


def _try_reading(reading: _Reading) -> ModelShape | LocalMistralError:
    """The shape, or what is wrong with just these files; a network that is gone is raised."""
    try:
        if reading.lender is None:
            return _shape_of(reading.source, _read_headers(reading), are_texts_checked=False)
        heads, borrowed = _read_borrowing(reading, reading.lender)
        return _shape_of(reading.source, heads, are_texts_checked=borrowed)
    except GaveUpError:
        raise
    except (ModelFileError, DownloadError) as error:
        return error


def _read_headers(reading: _Reading) -> list[Metadata]:
    return [_read_one(reading, file) for file in reading.source.files]


def _read_borrowing(reading: _Reading, lender: Lender) -> tuple[list[Metadata], bool]:
    first, *others = reading.source.files
    head, borrowed = read_borrowing(
        _reader(reading, first), first.bytes, Path(first.path).name, lender
    )
    return [head, *(_read_one(reading, file) for file in others)], borrowed


def _read_one(reading: _Reading, file: HubFile) -> Metadata:
    return read_whole(_reader(reading, file), file.bytes, Path(file.path).name)


def _reader(reading: _Reading, file: HubFile) -> Callable[[int, int], bytes]:
    source = reading.source

    def read(start: int, end: int) -> bytes:
        data, _ = read_range(
            source.repository, source.commit, file, start, end, patience=_HEADER_PATIENCE
        )
        reading.moved.append(len(data))
        return data

    return read


def _shape_of(
    source: RemoteFiles, heads: Sequence[Metadata], *, are_texts_checked: bool
) -> ModelShape:
    first, count = heads[0], len(heads)
    stated = first.count("split.count", default=1, kind=ValueType.UINT16)
    if stated != count:
        first.fail(f"is one of {stated} shards by its header, but is published as {count} files")
    for number, head in enumerate(heads):
        check_shard(head, number, count)
    return join_headers(
        [Path(file.path) for file in source.files],
        [file.bytes for file in source.files],
        [head.header for head in heads],
        first,
        are_texts_checked=are_texts_checked,
    )
