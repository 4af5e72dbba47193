"""From a plan, or a name that says which files it means, to those files on this disk.

Shows and asks through callbacks, and downloads through models/download.py. Chooses nothing and
loads nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from localmistral.errors import LocalMistralError, ModelNotFoundError
from localmistral.fit.plan import Plan
from localmistral.models.cache import LocalModel, find_copies, scan_local
from localmistral.models.catalog import load_catalog
from localmistral.models.download import download_files, missing_bytes, sweep_partials
from localmistral.models.filenames import parse_file_name
from localmistral.models.history import (
    BegunDownload,
    begun_downloads,
    forget_download,
    record_download,
)
from localmistral.models.hub import HubFile, OnProgress
from localmistral.models.names import HubRepository, quote_name
from localmistral.models.orphans import sweep_orphans
from localmistral.models.remote import RemoteFiles, find_remote, list_remote
from localmistral.units import format_bytes

OnNote = Callable[[str], None]
ShowTransfer = Callable[[str], AbstractContextManager[OnProgress]]
"""Given a name, what shows the progress of its download while the block lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Files to have on this disk, those that are there already among them."""

    name: str  # what pull takes to fetch just these, and -m to load them
    quant: str
    repository: str
    commit: str
    revision: str | None  # the branch whose newest commit this is; None for an older one
    files: tuple[HubFile, ...]  # the model's shards in order, then the image encoder
    missing_bytes: int

    @property
    def bytes(self) -> int:
        """Of all files, whether they are there or not."""
        return sum(file.bytes for file in self.files)


Confirm = Callable[[Download], None]
"""Shows what would be downloaded and asks; raises where the answer is no or nobody can be asked."""


def ensure_local(
    plan: Plan,
    *,
    confirm: Confirm,
    show_transfer: ShowTransfer,
    on_note: OnNote = lambda _: None,
) -> LocalModel:
    """The files of a plan on this disk: found, or downloaded once `confirm` has agreed.

    `confirm` is asked only when bytes have to be moved. Raises what it raises, DownloadError, and
    ModelNotFoundError for planned files that were on this disk and are no longer.
    """
    if plan.is_local:
        return find_planned(plan)
    download = prepare_plan(plan, on_note=on_note)
    if download.missing_bytes:
        confirm(download)
    return fetch(download, show_transfer)


def prepare_plan(plan: Plan, *, on_note: OnNote = lambda _: None) -> Download:
    """What a plan for files on the Hub needs, as the Hub has it now.

    A plan that was made of estimates gets the files of its quantisation at the newest commit; one
    made of headers on the Hub gets just the content it was made for, even where the repository has
    moved on.
    """
    if plan.repository is None:
        return _refuse_handmade(plan)
    source = find_remote(HubRepository(id=plan.repository, quant=plan.quant), on_note=on_note)
    assert source is not None  # it was asked for by its quant
    planned = {file.path: file.sha256 for file in plan.files}
    found = {file.path: file.sha256 for file in source.all_files}
    is_same = all(found.get(path) == sha256 for path, sha256 in planned.items())
    if plan.is_estimated or is_same or plan.revision is None or None in planned.values():
        has_encoder = any(parse_file_name(Path(path).name).role == "mmproj" for path in planned)
        files = source.all_files if has_encoder else source.files
        return _prepare(source, files)
    on_note(f"{plan.repository} has changed since the plan was made: its older files are used.")
    files = tuple(HubFile(path=f.path, bytes=f.bytes, sha256=f.sha256) for f in plan.files)
    return Download(
        name=name_on_hub(plan.repository, plan.quant),
        quant=plan.quant,
        repository=plan.repository,
        commit=plan.revision,
        revision=None,
        files=files,
        missing_bytes=missing_bytes(plan.repository, files, commit=plan.revision),
    )


def prepare_files(source: RemoteFiles) -> Download:
    """What one quantisation on the Hub needs, its image encoder included."""
    return _prepare(source, source.all_files)


def find_published(plan: Plan) -> RemoteFiles | None:
    """What the Hub has now of the files that are planned from this disk; None where they were
    placed by hand, or are no longer published under their name."""
    if plan.repository is None:
        return None
    path = Path(plan.files[0].path).as_posix()
    for source in list_remote(HubRepository(id=plan.repository)):
        if path.endswith(f"/{source.files[0].path}"):
            return source
    return None


def fetch(download: Download, show_transfer: ShowTransfer) -> LocalModel:
    """Sweep what unfinished downloads of other versions left, then bring the files here.

    Nothing is asked. Raises DownloadError; what was fetched by then is kept for the next try.
    """
    begun = BegunDownload(
        name=download.name,
        repository=download.repository,
        commit=download.commit,
        quant=download.quant,
        files=download.files,
    )
    if download.missing_bytes:
        record_download(begun)
        _sweep(download)
    with show_transfer(download.name) as on_progress:
        paths = download_files(
            download.repository,
            download.commit,
            download.files,
            revision=download.revision,
            on_progress=on_progress,
        )
    forget_download(download.name)
    return _find_files(paths, download.name)


def _sweep(download: Download) -> None:
    """Clear away what a repository's earlier downloads left, but not what may still go on."""
    keep = (*download.files, *_others_begun(download.repository))
    sweep_partials(download.repository, keep=keep)
    with suppress(LocalMistralError):  # what can't be removed now is no reason not to download
        sweep_orphans(download.repository, keep=keep)


def name_on_hub(repository: str, quant: str) -> str:
    """The shortest name that means a repository's quantisation and no other."""
    for model in load_catalog().models:
        for listed in model.quants:
            if (listed.name, listed.repository) == (quant, repository):
                return f"{model.name}:{quant}"
    return f"hf:{repository}:{quant}"


def refuse_absent(name: str, *, is_offline: bool) -> ModelNotFoundError:
    """What to say of a model that isn't here, where the Hub isn't asked about it."""
    if is_offline:
        return ModelNotFoundError(
            f"{say_absent(name)}, and HF_HUB_OFFLINE or --offline forbids its download.",
            "See what is on this disk: localmistral list",
        )
    return ModelNotFoundError(
        f"{say_absent(name)}, and nobody is there to be asked about its download.",
        f"localmistral pull {name} --yes",
    )


def say_absent(name: str) -> str:
    """`'small-4' isn't on this disk`, or which shard of it isn't: how a sentence begins."""
    try:
        problem = find_copies(name)[0].problem
    except ModelNotFoundError:
        problem = ""
    if not problem:
        return f"{quote_name(name)} isn't on this disk"
    return f"{quote_name(name)} is incomplete on this disk ({problem})"


def refuse_to_ask(download: Download) -> LocalMistralError:
    """What to say where a download isn't agreed to and nobody can be asked."""
    return LocalMistralError(
        f"{download.name} isn't on this disk: {format_bytes(download.missing_bytes)} would have "
        "to be downloaded, and nobody is there to be asked.",
        f"localmistral pull {download.name} --yes",
    )


def _prepare(source: RemoteFiles, files: tuple[HubFile, ...]) -> Download:
    return Download(
        name=name_on_hub(source.repository, source.name),
        quant=source.name,
        repository=source.repository,
        commit=source.commit,
        revision=source.revision,
        files=files,
        missing_bytes=missing_bytes(source.repository, files, commit=source.commit),
    )


def _others_begun(repository: str) -> tuple[HubFile, ...]:
    """Files of other downloads of the repository that may want to go on."""
    return tuple(
        file
        for begun in begun_downloads()
        if begun.repository == repository
        for file in begun.files
    )


def find_planned(plan: Plan) -> LocalModel:
    """The files of a plan for what is on this disk; ModelNotFoundError when they have gone."""
    paths = [Path(file.path) for file in plan.files]
    return _find_files(paths, f"{plan.model}:{plan.quant}")


def _find_files(paths: Sequence[Path], name: str) -> LocalModel:
    # All of them: quantisations may share single shards.
    wanted = {path.resolve() for path in paths}
    for local in scan_local().models:
        if local.complete and all(path.resolve() in wanted for path in local.files):
            return local
    raise ModelNotFoundError(
        f"The files of {name} are no longer where they were: {paths[0]}.",
        "See what is on this disk: localmistral list",
    )


def _refuse_handmade(plan: Plan) -> Download:
    raise ModelNotFoundError(
        f"The plan is for {plan.files[0].path}, which isn't on this disk or on the Hub.",
        "Plan anew: localmistral plan",
    )
