"""The quantisations that a plan may choose from: on this disk, on the Hub, in the catalogue.

Reads headers and never weights. Knows no machine, and prefers none of what it finds.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmistral.errors import LocalMistralError, ModelFileError, ModelNotFoundError
from localmistral.fit.plan import Candidate, Plan, PlannedFile
from localmistral.models.cache import LocalModel, find_local, scan_local
from localmistral.models.catalog import Model, Quant, Repository, load_catalog
from localmistral.models.estimate import estimate_bytes, estimate_mmproj_bytes, estimate_shape
from localmistral.models.filenames import match_quant
from localmistral.models.gguf import read_shape
from localmistral.models.names import (
    CatalogModel,
    HubRepository,
    LocalFiles,
    Resolved,
    quote_name,
    resolve,
)
from localmistral.models.shape import ModelShape, require_runnable

if TYPE_CHECKING:
    from localmistral.models.hub import HubFile
    from localmistral.models.remote import RemoteQuant

_SHA256 = re.compile(r"[0-9a-f]{64}")
UNNAMED_QUANT = "unnamed"
"""The quant of a file that says neither by its name nor by its header which one it is."""

_Known = CatalogModel | HubRepository


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a plan may choose from: the quantisations of the wanted model, and those of smaller
    models for the same use, the largest model first. `quant` is the one that was asked for, as
    its candidate spells it. Notes are sentences about what was passed over."""

    candidates: tuple[Candidate, ...]
    siblings: tuple[tuple[Candidate, ...], ...] = ()
    quant: str | None = None
    notes: tuple[str, ...] = ()

    def candidate_of(self, chosen: Plan) -> Candidate:
        """The candidate that a plan made from these was made for."""
        everything = (self.candidates, *self.siblings)
        return next(
            candidate
            for candidates in everything
            for candidate in candidates
            if (candidate.model, candidate.quant) == (chosen.model, chosen.quant)
        )


def gather_candidates(name: str, *, prefers_local: bool = False, uses_hub: bool = False) -> Choices:
    """Every quantisation of the model that `name` means, exact where its header can be read.

    Complete files on this disk come first; then what the Hub has, by `uses_hub`, if it can be
    reached; else the catalogue's figures. `prefers_local`: where some are on the disk, only those.
    A path is that one file alone. Raises what `resolve` does, ModelNotFoundError for a model or
    quant of which nothing is known, ModelFileError for a damaged file that was asked for.
    """
    resolved = _resolve(name)
    if isinstance(resolved, LocalFiles):
        found = find_local(resolved)
        assert found is not None  # a path that resolves is there
        return Choices(candidates=(_local_candidate(found),))
    on_disk, notes = _read_copies(resolved)
    is_settled = prefers_local and bool(on_disk)
    others: Sequence[Candidate] = ()
    if uses_hub and not is_settled:
        others, more = _read_hub(resolved, is_needed=not on_disk)
        notes += more
    elif not is_settled:
        others = _estimate_candidates(resolved)
    candidates = _merge(on_disk, others)
    wanted = _find_quant(resolved, candidates)
    if not candidates or (resolved.quant and wanted is None):
        resolve(name)  # has its own words for a quant that the catalogue doesn't list
        raise _nothing_known(name, resolved, candidates)
    siblings = () if is_settled else _gather_siblings(resolved)
    return Choices(candidates=candidates, siblings=siblings, quant=wanted, notes=notes)


def _resolve(name: str) -> Resolved:
    """As `resolve`, but a quant that the catalogue doesn't list may be here or on the Hub."""
    try:
        return resolve(name)
    except ModelNotFoundError:
        wanted, _, quant = name.partition(":")
        model = load_catalog().find(wanted)
        if model is None or not quant:
            raise
        return CatalogModel(model=model, quant=quant)


def _is_listed(resolved: CatalogModel) -> bool:
    return any(listed.name == resolved.quant for listed in resolved.model.quants)


def _read_hub(resolved: _Known, *, is_needed: bool) -> tuple[list[Candidate], tuple[str, ...]]:
    """What the Hub has, by the headers of its files; the catalogue's figures while it's out of
    reach, with a note that says so. What the Hub says stands where nothing else is known."""
    from localmistral.models.remote import remote_candidates  # slow to import

    if isinstance(resolved, CatalogModel) and not _is_listed(resolved):
        resolved = CatalogModel(model=resolved.model)  # look through all there are
    notes: list[str] = []
    try:
        found = remote_candidates(resolved, on_note=notes.append)
    except LocalMistralError as error:
        estimates = _estimate_candidates(resolved)
        is_final = isinstance(error, ModelNotFoundError) and isinstance(resolved, HubRepository)
        if is_needed and (is_final or not estimates):
            raise
        return estimates, (*notes, error.message)
    return [_remote_candidate(quant) for quant in found], tuple(notes)


def _remote_candidate(quant: "RemoteQuant") -> Candidate:
    known = load_catalog().model_of(quant.repository, "")
    model = known.name if known else None
    return Candidate(
        model=model or f"hf:{quant.repository}",
        quant=quant.name,
        shape=quant.shape,
        context_limit=limit_context(quant.shape, model),
        files=tuple(_remote_file(file) for file in quant.files),
        mmproj=None if quant.mmproj is None else _remote_file(quant.mmproj),
        repository=quant.repository,
        revision=quant.commit,
    )


def _remote_file(file: "HubFile") -> PlannedFile:
    return PlannedFile(path=file.path, bytes=file.bytes, sha256=file.sha256)


def _gather_siblings(resolved: Resolved) -> tuple[tuple[Candidate, ...], ...]:
    """Candidates of each smaller model for the same use; offline figures will do for these."""
    if not isinstance(resolved, CatalogModel):
        return ()
    models = [load_catalog().find(name) for name in resolved.model.siblings]
    wanted = [CatalogModel(model=model) for model in models if model is not None]
    gathered = [_merge(_read_copies(one)[0], _estimate_candidates(one)) for one in wanted]
    return tuple(candidates for candidates in gathered if candidates)


def _merge(first: Iterable[Candidate], then: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """One candidate a quant: what is on the disk hides what would be fetched."""
    merged: dict[str, Candidate] = {}
    for candidate in (*first, *then):
        merged.setdefault(candidate.quant, candidate)
    return tuple(merged.values())


def _find_quant(resolved: _Known, candidates: Sequence[Candidate]) -> str | None:
    if resolved.quant is None:
        return None
    names = [candidate.quant for candidate in candidates]
    if isinstance(resolved, CatalogModel) and _is_listed(resolved):
        # Spelled by the catalogue, whose `Q4_K_M` and `UD-Q4_K_M` are different files.
        return resolved.quant if resolved.quant in names else None
    return match_quant(resolved.quant, names)


def _nothing_known(
    name: str, resolved: _Known, candidates: Sequence[Candidate]
) -> ModelNotFoundError:
    known = ", ".join(candidate.quant for candidate in candidates)
    if resolved.quant is None:
        what = f"Nothing of {quote_name(name)} is on this disk, and its sizes are unknown offline."
    elif isinstance(resolved, CatalogModel):
        what = f"The size of {resolved.model.name}:{resolved.quant} is unknown offline."
    else:
        what = f"No quant {quote_name(resolved.quant)} of {resolved.id} is known offline."
    if known:
        return ModelNotFoundError(what, f"Known are {known}.")
    return ModelNotFoundError(what, "See localmistral models, or name a file: -m FILE.gguf")


def _read_copies(
    resolved: _Known,
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Candidates for the complete copies on this disk; a damaged one counts only if it's meant."""
    candidates, notes = [], []
    for local in find_copies(resolved):
        try:
            candidates.append(_local_candidate(local))
        except ModelFileError as error:
            if resolved.quant is not None and local.quant == resolved.quant:
                raise
            notes.append(error.message)
    return candidates, tuple(notes)


def find_copies(resolved: _Known) -> list[LocalModel]:
    """Complete copies, the one that the catalogue's short name means before others of its quant."""
    complete = [local for local in scan_local().models if local.complete]
    if isinstance(resolved, HubRepository):
        wanted = resolved.id.casefold()
        return [local for local in complete if (local.repository or "").casefold() == wanted]
    model = resolved.model
    copies = [local for local in complete if local.model == model.name]
    return sorted(copies, key=lambda copy: (copy.name != f"{model.name}:{copy.quant}", -copy.bytes))


def _local_candidate(local: LocalModel) -> Candidate:
    shape = read_shape(local.path)
    require_runnable(shape)
    return Candidate(
        model=local.model or _unlisted_name(local),
        quant=local.quant or shape.file_type_name or UNNAMED_QUANT,
        shape=shape,
        context_limit=limit_context(shape, local.model),
        files=tuple(local_file(path) for path in shape.files),
        mmproj=None if local.mmproj is None else local_file(local.mmproj),
        repository=local.repository,
        revision=local.revision,
        is_local=True,
    )


def _unlisted_name(local: LocalModel) -> str:
    """A name without the quant, for files that the catalogue doesn't list."""
    return f"hf:{local.repository}" if local.repository else local.name


def local_file(path: Path) -> PlannedFile:
    # The Hub's cache keeps a file under its own hash and links to it.
    blob = Path(os.path.realpath(path)).name
    is_hash = _SHA256.fullmatch(blob) is not None
    return PlannedFile(
        path=str(path.absolute()), bytes=path.stat().st_size, sha256=blob if is_hash else None
    )


def limit_context(shape: ModelShape, model: str | None) -> int:
    """Tokens the model is meant to be served with: the catalogue's figure where it knows better
    than the file, which may claim positions that nobody trained."""
    known = load_catalog().find(model) if model else None
    limits = [known.context if known else 0, shape.context_length]
    return min(limit for limit in limits if limit > 0)


def _estimate_candidates(resolved: _Known) -> list[Candidate]:
    """What the catalogue knows: of a model every quant, of a repository those in it."""
    if isinstance(resolved, CatalogModel):
        quants = ((resolved.model, quant) for quant in resolved.model.quants)
    else:
        wanted = resolved.id.casefold()
        quants = (
            (model, quant)
            for model in load_catalog().models
            for repository in model.repositories
            for quant in repository.quants
            if repository.id.casefold() == wanted
        )
    return [
        _estimated_candidate(model, quant)
        for model, quant in quants
        if estimate_bytes(model, quant) is not None
    ]


def _estimated_candidate(model: Model, quant: Quant) -> Candidate:
    shape = estimate_shape(model, quant)
    repository = next(r for r in model.repositories if r.id == quant.repository)
    hashes = [file.sha256 for file in quant.files] or [None]
    files = zip(shape.files, shape.file_bytes, hashes, strict=True)
    return Candidate(
        model=model.name,
        quant=quant.name,
        shape=shape,
        context_limit=model.context,
        files=tuple(PlannedFile(path=f.as_posix(), bytes=n, sha256=h) for f, n, h in files),
        mmproj=_estimated_mmproj(model, repository),
        repository=repository.id,
        revision=repository.revision,
        is_estimated=True,
    )


def _estimated_mmproj(model: Model, repository: Repository) -> PlannedFile | None:
    """The image encoder of the quant's own repository; where the catalogue lists none there, its
    size is that of another publisher's."""
    own = repository.mmproj
    mmproj = own or (model.mmproj[1] if model.mmproj else None)
    if mmproj is None:
        return None
    return PlannedFile(
        path=mmproj.file.path,
        bytes=estimate_mmproj_bytes(mmproj),
        sha256=own.file.sha256 if own else None,
    )
