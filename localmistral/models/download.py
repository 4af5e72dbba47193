"""Files of Hub repositories: listed, downloaded so that nothing is lost or fetched twice, checked.

Asks the Hub's library for listings, credentials and locks. Reads HF_ENDPOINT, HF_HOME,
HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE at each call. Prints nothing: progress is a callback,
called in the caller's thread. Knows nothing of models, quants or shards.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx2
from filelock import Timeout
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not in __all__
    WeakFileLock,
    build_hf_headers,
    validate_repo_id,
)

from localmistral import __version__
from localmistral.errors import DownloadError
from localmistral.models import delivery, web
from localmistral.models.blobs import (
    Place,
    has_size,
    list_places,
    place_of,
    write_ref,
)
from localmistral.models.cache import hub_cache
from localmistral.models.hub import (
    FileCheck,
    HubFile,
    Listing,
    OnProgress,
    Progress,
    SweptFiles,
    check_commit,
    check_file,
    check_revision,
)
from localmistral.models.journal import partial_keys, remove_partial, say_disk_errors
from localmistral.models.names import quote_name
from localmistral.models.snapshot import check_snapshot, list_snapshot
from localmistral.models.transfer import Patience, Trouble, read_bytes

_TRUE = ("1", "ON", "YES", "TRUE")  # as the Hub's library reads its switches
_LOCK_WAIT_S = 0.3  # how long to wait for a lock before progress is reported again
_LOCK_GLANCE_S = 0.05
_LISTING_TIMEOUT_S = 20.0
# For listings and headers, which people wait for: less than for a download.
_SHORT_PATIENCE = Patience(tries=4, longest_asked_s=60.0)


def hub_endpoint() -> str:
    """Where the Hub is, without a trailing slash: HF_ENDPOINT, or the public one."""
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if not endpoint.lower().startswith(("http://", "https://")):
        raise DownloadError(
            f"HF_ENDPOINT is {quote_name(endpoint)}, which is no address of a Hub.",
            "Write it like HF_ENDPOINT=https://huggingface.co, or unset it",
        )
    return endpoint


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    named = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return named.upper() in _TRUE or constants.is_offline_mode()


def list_repository(repository: str, revision: str | None = None) -> Listing:
    """Files, sizes and hashes of a repository at one commit: that of `revision`, or of main.

    DownloadError where the Hub can't be reached, refuses, or knows no such repository.
    """
    _check_repository(repository)
    if revision is not None:
        check_revision(revision)
    _refuse_offline(f"The files of {repository} can't be listed")
    return _fetch_listing(repository, revision)


def local_listing(repository: str, commit: str) -> Listing:
    """The files of a snapshot on this disk, hashes by the names of their blobs; no network.

    Files without a link to a blob have no hash. Broken links count, with 0 bytes.
    """
    _check_repository(repository)
    files = list_snapshot(place_of(hub_cache(), repository), commit)
    return Listing(repository=repository, commit=commit, files=files)


def download_files(
    repository: str,
    commit: str,
    files: Sequence[HubFile],
    *,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
    connections: int = 4,
    patience: Patience | None = None,
) -> tuple[Path, ...]:
    """Bring files of a commit into the Hub's cache; their paths in its snapshot, in order.

    Nothing is fetched that is there by its hash, and an unfinished file is continued. `revision`
    is the branch or tag by which other programs are to find the commit (`Listing.revision`).
    Raises DownloadError, with what has come kept, except for a file whose hash is wrong.
    """
    _check_repository(repository)
    check_commit(commit)
    place = place_of(hub_cache(), repository)

    def open_source(file: HubFile) -> web.Source:
        _refuse_offline(f"{quote_name(file.path)} isn't on this disk")
        return _open_source(repository, commit, file, patience or Patience())

    paths = delivery.Delivery(
        place=place,
        commit=commit,
        files=tuple(_with_key(repository, commit, check_file(file)) for file in files),
        lock=_hold_lock,
        open_source=open_source,
        on_progress=on_progress or _ignore,
        connections=connections,
        patience=patience or Patience(),
    ).run()
    if revision is not None and revision != commit:
        with suppress(OSError):  # a cache that can only be read serves as well without
            write_ref(place, revision, commit)
    return paths


def missing_bytes(repository: str, files: Sequence[HubFile], *, commit: str | None = None) -> int:
    """What a download would still move: without blobs that are there and ranges that are done.

    `commit` matters only on systems without links, where a snapshot holds the files themselves.
    """
    _check_repository(repository)
    known = [check_file(file) for file in files]
    return delivery.missing_bytes(place_of(hub_cache(), repository), commit, known)


def sweep_partials(repository: str | None = None, *, keep: Sequence[HubFile] = ()) -> SweptFiles:
    """Remove unfinished downloads of one or of all repositories.

    Left alone is what belongs to a file of `keep` that isn't there, and what a process is working
    on at the moment.
    """
    cache = hub_cache()
    if repository is None:
        places = list_places(cache)
    else:
        _check_repository(repository)
        places = (place_of(cache, repository),)
    sizes = {file.key: file.bytes for file in keep}
    freed = [
        _sweep_partial(place, key)
        for place in places
        for key in partial_keys(place.blobs)
        if key not in sizes or has_size(place.blobs / key, sizes[key])
    ]
    swept = [count for count in freed if count is not None]
    return SweptFiles(count=len(swept), bytes=sum(swept))


def check_files(
    repository: str,
    commit: str,
    files: Sequence[HubFile],
    *,
    on_progress: OnProgress | None = None,
) -> tuple[FileCheck, ...]:
    """Hash files of a snapshot on disk; a corrupt one is removed with all that links to it."""
    _check_repository(repository)
    place = place_of(hub_cache(), repository)
    return check_snapshot(place, commit, files, lock=_hold_lock, on_progress=on_progress or _ignore)


def read_range(
    repository: str,
    commit: str,
    file: HubFile,
    start: int,
    end: int,
    *,
    patience: Patience | None = None,
) -> tuple[bytes, str]:
    """Bytes [start, end) of a file on the Hub (cut at its end), and the etag the Hub names for it.

    Several threads may call this at once. DownloadError as for `download_files`.
    """
    _check_repository(repository)
    check_commit(commit)
    _refuse_offline(f"{quote_name(file.path)} can't be read")
    patience = patience or _SHORT_PATIENCE
    source = _open_source(repository, commit, check_file(file), patience)
    return read_bytes(source, start, end, patience), source.identity


def _ignore(progress: Progress) -> None:
    """For callers that don't want to know."""


def _check_repository(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise DownloadError(
            f"{quote_name(repository)} can't be the name of a Hub repository.",
            "Name it like hf:org/repo",
        ) from error


def _refuse_offline(what: str) -> None:
    if is_offline():
        raise DownloadError(
            f"{what}, and HF_HUB_OFFLINE forbids to ask the Hub.",
            "See what is on this disk: localmistral list",
        )


def _fetch_listing(repository: str, revision: str | None) -> Listing:
    """The Hub's description of a repository; tried again where that may help."""
    _headers()  # for its check
    api = HfApi(endpoint=hub_endpoint(), library_name="localmistral", library_version=__version__)
    trouble = Trouble(repository, _SHORT_PATIENCE)
    while True:
        try:
            with _say_listing_errors(repository, revision):
                info = api.model_info(
                    repository, revision=revision, files_metadata=True, timeout=_LISTING_TIMEOUT_S
                )
                return Listing(
                    repository=repository,
                    commit=check_commit(info.sha or ""),
                    files=tuple(_describe(s) for s in info.siblings or () if s.size is not None),
                    revision=constants.DEFAULT_REVISION if revision is None else revision,
                )
        except web.InterruptedTransferError as error:
            time.sleep(trouble.wait_s(error, 0))


def _describe(sibling: RepoSibling) -> HubFile:
    """TypeError for JSON of other types than the Hub's."""
    sha256 = None if sibling.lfs is None else sibling.lfs.sha256
    texts = (sibling.rfilename, sha256 or "", sibling.blob_id or "")
    if type(sibling.size) is not int or not all(isinstance(text, str) for text in texts):
        raise TypeError("no file")
    return HubFile(
        path=sibling.rfilename, bytes=sibling.size, sha256=sha256, blob_id=sibling.blob_id
    )


@contextmanager
def _say_listing_errors(repository: str, revision: str | None) -> Iterator[None]:
    host = web.host_of(hub_endpoint())
    try:
        yield
    except GatedRepoError as error:
        raise web.refusal(repository, host, 403, "GatedRepo") from error
    except RepositoryNotFoundError as error:
        raise web.refusal(repository, host, error.response.status_code) from error
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"{repository} has no revision {quote_name(revision or '')}."
        ) from error
    except HfHubHTTPError as error:
        response = error.response
        web.raise_if_temporary(response.status_code, host, response.headers)
        raise web.refusal(repository, host, response.status_code) from error
    except OfflineModeIsEnabled:
        _refuse_offline(f"The files of {repository} can't be listed")
        raise
    except httpx2.HTTPError as error:
        raise web.unreachable(host, error) from error
    except ImportError as error:  # of what a SOCKS proxy would need
        raise web.unusable_proxy() from error
    except (ValueError, TypeError, KeyError) as error:  # JSON that isn't, or isn't a listing
        raise web.portal(repository, host) from error


def _open_source(repository: str, commit: str, file: HubFile, patience: Patience) -> web.Source:
    endpoint = hub_endpoint()
    remote = web.RemoteFile(
        name=file.path,
        url=hf_hub_url(repository, file.path, revision=commit, endpoint=endpoint),
        bytes=file.bytes,
        key=file.key,
        headers=_headers(),
    )
    return web.Source(remote, stall_s=patience.stall_s, connect_s=patience.connect_s)


def _headers() -> dict[str, str]:
    """What identifies the program and its user to the Hub."""
    headers: dict[str, str] = build_hf_headers(
        library_name="localmistral", library_version=__version__
    )
    # Checked here, since errors of the libraries below would quote the token.
    token = headers.get("authorization", "")
    if not (token.isascii() and token.isprintable()):
        raise DownloadError(
            "The Hub's token has characters that no token has.",
            "Set HF_TOKEN anew, or log in again: hf auth login",
        )
    return headers


def _with_key(repository: str, commit: str, file: HubFile) -> HubFile:
    """The file with a hash: its own, or what the Hub says now."""
    if file.key is not None:
        return file
    _, key = read_range(repository, commit, file, 0, 1)
    if len(key) == 64:
        return replace(file, sha256=key)
    return replace(file, blob_id=key or None)


@contextmanager
def _hold_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """The Hub's lock for a blob; whoever is killed while holding it lets go of it."""
    with ExitStack() as stack:
        while not _try_lock(path, stack, _LOCK_WAIT_S):
            on_wait()
        yield


def _try_lock(path: Path, stack: ExitStack, timeout_s: float) -> bool:
    """Whether the lock could be had, which the stack then releases."""
    with say_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(WeakFileLock(path, timeout=timeout_s))
        except Timeout:
            return False
    return True


def _sweep_partial(place: Place, key: str) -> int | None:
    """Bytes freed by removing a partial; None where a process is working on it."""
    with ExitStack() as stack, say_disk_errors(place.blobs):
        if _try_lock(place.lock_path(key), stack, _LOCK_GLANCE_S):
            return remove_partial(place.blobs, key)
    return None
