"""Downloads into the Hub's cache: listings, resumption, processes, disks, names, tokens.

A real Hub on loopback (tests/hub.py) answers; the Hub's own library reads the cache afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub as hub_server
import pytest
from hub import Fault, Hub, Stored, running_hub
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    close_session,
)

from localmistral.errors import DownloadError, LocalMistralError
from localmistral.models import download
from localmistral.models.blobs import place_of
from localmistral.models.download import (
    check_files,
    download_files,
    list_repository,
    local_listing,
    missing_bytes,
    read_range,
    sweep_partials,
)
from localmistral.models.hub import HubFile, Progress, check_path
from localmistral.models.journal import Partial
from localmistral.models.transfer import Patience

REPOSITORY = "org/model"
TOKEN = "hf_" + "s3cret" * 5
QUICK = Patience(stall_s=1.0, tries=4, first_wait_s=0.01, longest_wait_s=0.05)
CONTENTS = {
    "m-00001-of-00002.gguf": Stored(content=random.Random(1).randbytes(9 << 20)),
    "m-00002-of-00002.gguf": Stored(content=random.Random(2).randbytes(5 << 20)),
    "sub/mmproj.gguf": Stored(content=random.Random(3).randbytes(1 << 20)),
    "config.json": Stored(content=b'{"a": 1}', lfs=False),
    "empty.txt": Stored(content=b"", lfs=False),
}
TOTAL = sum(len(stored.content) for stored in CONTENTS.values())


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.publish(REPOSITORY, dict(CONTENTS))
        yield hub


@pytest.fixture(autouse=True)
def environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


def pull(on_progress: Callable[[Progress], None] | None = None, **options: Any) -> list[Path]:
    """All files of the repository as `localmistral pull` would."""
    listing = list_repository(REPOSITORY)
    paths = download_files(
        REPOSITORY,
        listing.commit,
        listing.files,
        revision=listing.revision,
        on_progress=on_progress,
        patience=QUICK,
        **options,
    )
    return [*paths]


def assert_complete(cache: Path) -> None:
    """The newest snapshot holds every file, whole, as the Hub's own library sees it."""
    for path, stored in CONTENTS.items():
        found = try_to_load_from_cache(REPOSITORY, path, cache_dir=cache)
        assert isinstance(found, str), path
        assert Path(found).read_bytes() == stored.content
    info = scan_cache_dir(cache)
    assert info.warnings == []
    assert not [*cache.rglob("*.part"), *cache.rglob("*.journal*"), *cache.rglob("*.incomplete")]


def interrupt_at(byte: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.phase == "downloading" and progress.done >= byte:
            raise KeyboardInterrupt

    return report


def refusing(status: int, headers: dict[str, str] | None = None) -> Fault:
    return Fault(kind="status", at="api", status=status, headers=headers or {})


# Listings


def test_a_listing_has_every_file_with_its_size_and_hash(hub: Hub) -> None:
    listing = list_repository(REPOSITORY)
    assert listing.commit == hub.repositories[REPOSITORY].commit
    assert listing.revision == "main"
    assert {f.path: (f.bytes, f.key, f.sha256) for f in listing.files} == {
        path: (len(s.content), s.key, s.sha256 if s.lfs else None) for path, s in CONTENTS.items()
    }
    older = listing.commit
    hub.publish(REPOSITORY, {"new.gguf": Stored(content=b"new")})
    assert [f.path for f in list_repository(REPOSITORY).files] == ["new.gguf"]
    assert list_repository(REPOSITORY, older).files == listing.files


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (refusing(503), "answered 503 .*tries"),
        (refusing(401), "status 401.*private"),
        (
            Fault(kind="status", at="api", status=403, headers={"X-Error-Code": "GatedRepo"}),
            "grant",
        ),
        (
            Fault(kind="status", at="api", status=429, headers={"Retry-After": "9999"}),
            "167 minutes",
        ),
        (Fault(kind="html", at="api"), "captive portal"),
        (refusing(418), "answered 418"),
    ],
    ids=lambda value: f"{value.kind}-{value.status}" if isinstance(value, Fault) else "",
)
def test_a_listing_that_fails_says_why_in_one_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, fault: Fault, said: str
) -> None:
    monkeypatch.setattr(download, "_SHORT_PATIENCE", QUICK)
    hub.order(fault)
    with pytest.raises(DownloadError, match=said) as raised:
        list_repository(REPOSITORY)
    assert "\n" not in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize(
    "changed",
    [
        {"rfilename": 5},
        {"rfilename": None},
        {"size": "12"},
        {"size": 1.5},
        {"blobId": 7},
        {"lfs": {"sha256": 7, "size": 1, "pointerSize": 1}},
        {"lfs": 5},
    ],
    ids=repr,
)
def test_a_listing_of_other_types_than_the_hubs_is_none(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    real = hub_server._sibling
    monkeypatch.setattr("hub._sibling", lambda path, stored: real(path, stored) | changed)
    with pytest.raises(DownloadError, match="instead of 'org/model'"):
        list_repository(REPOSITORY)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HF_ENDPOINT", "hf-mirror.invalid", "HF_ENDPOINT is 'hf-mirror.invalid', which is no"),
        ("http_proxy", "socks5://user:s3cret@127.0.0.1:9", "of SOCKS or another kind"),
    ],
)
def test_an_environment_that_cannot_be_used_is_said_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    commit = list_repository(REPOSITORY).commit
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv(name, value)
    file = HubFile(path="config.json", bytes=8, blob_id="a" * 40)
    asking: list[Callable[[], object]] = [
        lambda: list_repository(REPOSITORY),
        lambda: read_range(REPOSITORY, commit, file, 0, 8),
    ]
    close_session()  # which would go on with the proxies it began with
    for ask in asking:
        with pytest.raises(DownloadError, match=said) as raised:
            ask()
        assert raised.value.hint
        assert "s3cret" not in raised.value.message


def test_a_listing_is_tried_again_where_that_helps(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_SHORT_PATIENCE", QUICK)
    hub.order(Fault(kind="status", at="api", path="/api/models/*", status=500, times=1))
    limit = Fault(kind="status", at="api", path="/api/models/*", status=429, times=1)
    limit.headers["Retry-After"] = "1"
    hub.order(limit)
    assert len(list_repository(REPOSITORY).files) == len(CONTENTS)


def test_what_the_hub_does_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="There is no 'org/other' on"):
        list_repository("org/other")
    with pytest.raises(DownloadError, match="has no revision 'v9'"):
        list_repository(REPOSITORY, "v9")
    for name in ("a/b/c", "..", "org/..", "org/a--b", "org\\b", "/etc", "org/x\n"):
        with pytest.raises(DownloadError, match="can't be the name of a Hub repository"):
            list_repository(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 can't be reached"):
        list_repository(REPOSITORY)


def test_offline_what_is_cached_comes_and_what_is_not_fails_at_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = list_repository(REPOSITORY)
    paths = pull()
    seen = len(hub.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [*download_files(REPOSITORY, listing.commit, listing.files)] == paths
    assert read_names(local_listing(REPOSITORY, listing.commit).files) == {*CONTENTS}
    paths[1].resolve().unlink()
    with pytest.raises(DownloadError, match=r"00002\.gguf' isn't on this disk.*OFFLINE"):
        download_files(REPOSITORY, listing.commit, listing.files)
    with pytest.raises(DownloadError, match="OFFLINE"):
        list_repository(REPOSITORY)
    with pytest.raises(DownloadError, match="OFFLINE"):
        read_range(REPOSITORY, listing.commit, listing.files[0], 0, 9)
    assert len(hub.seen) == seen


def read_names(files: tuple[HubFile, ...]) -> set[str]:
    return {file.path for file in files}


# Downloads


def test_a_download_lands_where_the_hubs_library_finds_it(hub: Hub, cache: Path) -> None:
    listing = list_repository(REPOSITORY)
    assert missing_bytes(REPOSITORY, listing.files) == TOTAL
    paths = pull()
    assert [path.read_bytes() for path in paths] == [s.content for s in CONTENTS.values()]
    assert_complete(cache)
    assert missing_bytes(REPOSITORY, listing.files) == 0
    sent = hub.sent_bytes()
    assert sent == sum(len(s.content) for s in CONTENTS.values() if s.lfs)
    # The library itself, asked for main and for the commit, takes ours without a byte.
    for revision in (None, listing.commit):
        found = hf_hub_download(
            REPOSITORY,
            "m-00001-of-00002.gguf",
            revision=revision,
            cache_dir=cache,
            endpoint=hub.endpoint,
        )
        assert Path(found).samefile(paths[0])
    assert pull() == paths
    assert hub.sent_bytes() == sent


def test_what_the_hubs_library_downloaded_is_not_fetched_again(hub: Hub, cache: Path) -> None:
    hf_hub_download(
        REPOSITORY, "m-00001-of-00002.gguf", cache_dir=cache, endpoint=hub.endpoint, token=TOKEN
    )
    sent = hub.sent_bytes()
    assert missing_bytes(REPOSITORY, list_repository(REPOSITORY).files) == TOTAL - (9 << 20)
    pull()
    assert hub.sent_bytes() - sent == 6 << 20
    assert_complete(cache)


def test_a_new_revision_moves_only_what_differs(hub: Hub, cache: Path) -> None:
    old = pull()
    changed = CONTENTS | {"m-00002-of-00002.gguf": Stored(content=random.Random(9).randbytes(9999))}
    moved = {"renamed.gguf": CONTENTS["m-00001-of-00002.gguf"]}
    hub.publish(REPOSITORY, changed | moved)
    sent = hub.sent_bytes()
    new = pull()
    assert hub.sent_bytes() - sent == 9999
    assert new[-1].samefile(old[0])
    assert scan_cache_dir(cache).warnings == []
    assert (cache / "models--org--model/refs/main").read_text() == new[0].parent.name


def test_ctrl_c_ends_within_a_second_and_the_next_try_continues(hub: Hub, cache: Path) -> None:
    hub.bytes_per_second = 10e6
    with pytest.raises(KeyboardInterrupt):
        pull(interrupt_at(TOTAL // 4))
    listing = list_repository(REPOSITORY)
    left = missing_bytes(REPOSITORY, listing.files)
    assert left <= TOTAL * 3 / 4
    assert not [*cache.rglob("snapshots/*/*.gguf")]
    assert scan_cache_dir(cache).warnings == []
    time.sleep(0.3)  # what is in flight drains
    hub.bytes_per_second = None
    before, progress = hub.sent_bytes(), list[Progress]()
    pull(progress.append)
    small = sum(len(s.content) for s in CONTENTS.values() if not s.lfs)
    assert hub.sent_bytes() - before == left - small
    assert progress[0].resumed == progress[0].done == TOTAL - left
    assert_complete(cache)


def test_ctrl_c_while_the_server_is_silent_ends_within_a_second(hub: Hub) -> None:
    hub.order(Fault(kind="stall", after=3 << 20))
    listing = list_repository(REPOSITORY)
    began = list[float]()

    def press_after_a_while(progress: Progress) -> None:
        began.append(time.monotonic())
        if began[-1] - began[0] > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_files(REPOSITORY, listing.commit, listing.files, on_progress=press_after_a_while)
    assert time.monotonic() - began[-1] < 1
    assert missing_bytes(REPOSITORY, listing.files) < TOTAL


def test_progress_adds_up_over_all_files_and_says_why_it_waits(hub: Hub) -> None:
    progress = list[Progress]()
    hub.bytes_per_second = 30e6
    hub.order(Fault(kind="status", status=503, headers={"Retry-After": "1"}, times=4))
    pull(progress.append)
    done = [p.done for p in progress]
    assert done == sorted(done)
    assert done[-1] == TOTAL
    assert {p.total for p in progress} == {TOTAL}
    assert {p.resumed for p in progress} == {0}
    assert [p.file for p in progress if p.phase == "done"] == [*CONTENTS]
    assert "retrying in 1 s: localhost answered 503" in {p.note for p in progress}


def test_a_flipped_bit_leaves_nothing_that_loads(hub: Hub, cache: Path) -> None:
    hub.order(Fault(kind="flip", path="*00002-of*", after=100))
    with pytest.raises(DownloadError, match=r"00002\.gguf'.*sha256 mismatch.*removed"):
        pull()
    listing = list_repository(REPOSITORY)
    assert not [*cache.rglob(f"*{listing.files[1].sha256}*.part")]
    assert not [p for p in cache.rglob("*") if "00002-of" in p.name]
    assert scan_cache_dir(cache).warnings == []
    hub.faults.clear()
    pull()
    assert_complete(cache)


def test_a_small_file_is_verified_by_gits_own_hash(hub: Hub, cache: Path) -> None:
    hub.order(Fault(kind="flip", at="hub", path="*config.json", after=3))
    with pytest.raises(DownloadError, match=r"'config\.json'.*git sha1 mismatch"):
        pull()
    assert not [*cache.rglob("config.json")]


def test_a_file_of_unknown_hash_takes_the_one_the_hub_names(hub: Hub, cache: Path) -> None:
    commit = hub.repositories[REPOSITORY].commit
    files = [
        HubFile(path=path, bytes=len(stored.content))
        for path, stored in CONTENTS.items()
        if stored.content
    ]
    paths = download_files(REPOSITORY, commit, files, patience=QUICK)
    assert [path.read_bytes() for path in paths] == [
        stored.content for stored in CONTENTS.values() if stored.content
    ]
    hub.order(Fault(kind="flip", path="*mmproj*", after=100))
    shutil.rmtree(cache)
    with pytest.raises(DownloadError, match="sha256 mismatch"):
        download_files(REPOSITORY, commit, files, patience=QUICK)


def test_less_space_than_the_files_need_is_refused_before_the_first_byte(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=TOTAL - 1))
    with pytest.raises(DownloadError, match=rf"needs .*16,7.* bytes.*{TOTAL - 1:,} byt"):
        pull()
    assert hub.sent_bytes() == 0


def test_space_for_what_is_there_already_is_not_asked_for_twice(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.bytes_per_second = 20e6
    with pytest.raises(KeyboardInterrupt):
        pull(interrupt_at(10 << 20))
    hub.bytes_per_second = None
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=7 << 20))
    pull()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB, in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux'")
def test_a_disk_that_fills_midway_is_said_and_what_has_come_is_kept(
    hub: Hub, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(small_disk))
    listing = list_repository(REPOSITORY)
    first = listing.files[:1]
    other = small_disk / "other"

    def fill_up(progress: Progress) -> None:
        if progress.done > 2 << 20 and not other.exists():
            other.write_bytes(bytes(6 << 20))

    hub.bytes_per_second = 20e6
    with pytest.raises(DownloadError, match=r"is full .*; what has been downloaded is kept"):
        download_files(REPOSITORY, listing.commit, first, on_progress=fill_up, patience=QUICK)
    left = missing_bytes(REPOSITORY, first)
    assert left < 7 << 20
    with pytest.raises(DownloadError, match=r"needs .* more, but the disk"):
        download_files(REPOSITORY, listing.commit, first, patience=QUICK)
    other.unlink()
    hub.bytes_per_second = None
    time.sleep(0.3)
    before = hub.sent_bytes()
    (path,) = download_files(REPOSITORY, listing.commit, first, patience=QUICK)
    assert hub.sent_bytes() - before == left
    assert path.read_bytes() == CONTENTS["m-00001-of-00002.gguf"].content


# Names


@pytest.mark.parametrize(
    "path",
    [
        "",
        "..",
        "../x.gguf",
        "a/../../x.gguf",
        "/etc/passwd",
        "a//b",
        "./x",
        "a/",
        "C:/x",
        "C:x.gguf",
        "a\\b",
        "..\\x",
        "x.gguf:stream",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "a\x9bb",
        "CON",
        "nul.gguf",
        "sub/com1.txt",
        "LPT¹",
        "aux .x",
        "x.",
        "x ",
        "a" * 256,
        "é" * 128,
        "\ud800",
        "what?.gguf",
        "a*b",
    ],
)
def test_names_that_are_no_safe_paths_never_reach_the_disk(
    hub: Hub, cache: Path, path: str
) -> None:
    listing = list_repository(REPOSITORY)
    evil = HubFile(path=path, bytes=5, sha256="a" * 64)
    with pytest.raises(DownloadError, match="The Hub names a file"):
        download_files(REPOSITORY, listing.commit, [*listing.files, evil], patience=QUICK)
    assert not cache.exists()
    assert hub.sent_bytes() == 0


@pytest.mark.parametrize("path", ["a.gguf", "Q4/a-00001-of-00002.gguf", ".gitattributes", "é ü.x"])
def test_ordinary_names_are_taken(path: str) -> None:
    assert "/".join(check_path(path)) == path


def test_hashes_commits_and_revisions_that_are_none_are_refused(cache: Path) -> None:
    good = HubFile(path="m.gguf", bytes=1, sha256="a" * 64)
    commit = "b" * 40
    for file in (
        HubFile(path="m.gguf", bytes=1, sha256="../" + "a" * 61),
        HubFile(path="m.gguf", bytes=1, sha256="A" * 64),
        HubFile(path="m.gguf", bytes=1, blob_id="a" * 39),
        HubFile(path="m.gguf", bytes=-1, sha256="a" * 64),
    ):
        with pytest.raises(DownloadError, match="size or hash that is none"):
            download_files(REPOSITORY, commit, [file])
    for bad in ("main", "../" + "b" * 37, "B" * 40, ""):
        with pytest.raises(DownloadError, match="no git hash"):
            download_files(REPOSITORY, bad, [good])
    with pytest.raises(DownloadError, match="can't be the name of a revision"):
        list_repository(REPOSITORY, "../../x")
    assert not cache.exists()


# Tokens


def test_the_token_goes_to_the_hub_alone(
    hub: Hub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.repositories[REPOSITORY].token = TOKEN
    listing = list_repository(REPOSITORY)
    read_range(REPOSITORY, listing.commit, listing.files[0], 0, 100)
    hub.order(Fault(kind="status", status=500, times=1))
    pull()
    sent = {(seen.host, seen.authorization) for seen in hub.seen if "agent" not in seen.path}
    assert sent == {("api", f"Bearer {TOKEN}"), ("hub", f"Bearer {TOKEN}"), ("data", None)}
    out, err = capfd.readouterr()
    assert TOKEN not in caplog.text + out + err


@pytest.mark.parametrize("host", ["data", "back"])
def test_no_redirect_takes_the_token_to_another_host_nor_round_through_one(
    hub: Hub, host: str
) -> None:
    commit = hub.repositories[REPOSITORY].commit
    name = "m-00001-of-00002.gguf"
    away = f"{hub.data_endpoint}/{REPOSITORY}/{commit}/{name}"
    hub.order(Fault(kind="redirect", at="hub", location=away, times=1))
    if host == "back":
        back = f"{hub.endpoint}/{REPOSITORY}/resolve/{commit}/config.json"
        hub.order(Fault(kind="redirect", at="data", location=back, times=1))
        with pytest.raises(DownloadError):
            read_range(REPOSITORY, commit, list_repository(REPOSITORY).files[0], 0, 9)
    else:
        read_range(REPOSITORY, commit, list_repository(REPOSITORY).files[0], 0, 9)
    resolved = [seen for seen in hub.seen if seen.host != "api"]
    assert resolved[0].authorization == f"Bearer {TOKEN}"
    assert len(resolved) >= 2
    assert {seen.authorization for seen in resolved[1:]} == {None}


def test_no_error_shows_the_token(hub: Hub) -> None:
    listing = list_repository(REPOSITORY)
    texts = []
    for fault in (
        Fault(kind="status", at="hub", status=401),
        Fault(kind="status", at="hub", status=403),
        Fault(kind="html", at="hub"),
        Fault(kind="redirect", at="hub", location="bad://x"),
        Fault(kind="cut", at="data"),
    ):
        hub.faults[:] = [fault]
        with pytest.raises(DownloadError) as raised:
            download_files(REPOSITORY, listing.commit, listing.files, patience=QUICK)
        error: BaseException | None = raised.value
        while error is not None:
            texts.append(f"{error} {error!r} {getattr(error, 'hint', '')}")
            error = error.__cause__
    assert TOKEN not in "".join(texts)
    assert "top-secret" not in "".join(texts)


@pytest.mark.parametrize("token", ["hf_bad\x01token", "hf_bäd", "hf_bad\x7f"])
def test_a_token_that_is_none_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    listing = list_repository(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(LocalMistralError) as raised:
        download_files(REPOSITORY, listing.commit, listing.files, patience=QUICK)
    assert "hf_b" not in str(raised.value) + raised.value.hint
    with pytest.raises(LocalMistralError) as raised:
        list_repository(REPOSITORY)
    assert "hf_b" not in str(raised.value) + raised.value.hint


def test_gated_and_private_repositories_say_what_to_do(hub: Hub) -> None:
    listing = list_repository(REPOSITORY)
    hub.repositories[REPOSITORY].gated = True
    with pytest.raises(DownloadError, match="access must be granted") as raised:
        download_files(REPOSITORY, listing.commit, listing.files, patience=QUICK)
    assert "HF_TOKEN" in raised.value.hint
    hub.repositories[REPOSITORY].token = "hf_other"
    with pytest.raises(DownloadError, match="status 401"):
        download_files(REPOSITORY, listing.commit, listing.files, patience=QUICK)


# Sweeping and checking


def leave_partial(cache: Path, key: str, repository: str = REPOSITORY) -> Path:
    partial = Partial(place_of(cache, repository).blobs, key, 1000)
    partial.write(0, b"x" * 500)
    partial.leave()
    return partial.path


def test_partials_of_older_revisions_are_swept_and_those_in_use_are_not(cache: Path) -> None:
    listing = list_repository(REPOSITORY)
    current = listing.files[0].key or ""
    kept, held = leave_partial(cache, current), leave_partial(cache, "b" * 64)
    old, foreign = leave_partial(cache, "c" * 64), leave_partial(cache, "d" * 64, "org/other")
    orphan = old.with_name("e" * 64 + ".journal")
    orphan.write_text("orphaned")
    with WeakFileLock(place_of(cache, REPOSITORY).lock_path("b" * 64)):
        swept = sweep_partials(REPOSITORY, keep=listing.files)
        assert swept.count == 2
        assert swept.bytes >= 500
        assert [path.exists() for path in (kept, held, old, orphan, foreign)] == [
            True,
            True,
            False,
            False,
            True,
        ]
        assert sweep_partials().count == 2
    assert (kept.exists(), held.exists(), foreign.exists()) == (False, True, False)
    assert sweep_partials().count == 1
    assert sweep_partials().count == 0
    shutil.rmtree(foreign.parents[1])
    pull()
    stale = leave_partial(cache, current)  # of a file that is there
    assert sweep_partials(REPOSITORY, keep=listing.files).count == 1
    assert not stale.exists()
    assert_complete(cache)


def test_a_check_finds_what_rotted_and_removes_all_that_leads_to_it(hub: Hub, cache: Path) -> None:
    listing = list_repository(REPOSITORY)
    paths = pull()
    hub.publish(REPOSITORY, dict(CONTENTS))  # another commit with the same files
    again = pull()
    assert {c.state for c in check_files(REPOSITORY, listing.commit, listing.files)} == {"ok"}
    with paths[0].open("r+b") as file:
        file.seek(1000)
        file.write(b"rot")
    os.truncate(paths[2], 5)
    paths[1].unlink()
    progress = list[Progress]()
    checks = check_files(REPOSITORY, listing.commit, listing.files, on_progress=progress.append)
    assert [check.state for check in checks] == ["corrupt", "missing", "corrupt", "ok", "ok"]
    assert "doesn't fit its sha256" in checks[0].problem
    assert "5 bytes instead of 1,048,576" in checks[2].problem
    assert progress[-1].done == progress[-1].total == TOTAL
    assert not any(os.path.lexists(path) for path in (*paths[:3], again[0], again[2]))
    assert again[1].exists()
    assert scan_cache_dir(cache).warnings == []
    pull()
    assert_complete(cache)


def test_a_snapshot_can_be_checked_without_the_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, *_) = pull()
    commit = path.parent.name
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    listing = local_listing(REPOSITORY, commit)
    assert {f.path: f.key for f in listing.files} == {p: s.key for p, s in CONTENTS.items()}
    with path.open("r+b") as file:
        file.write(b"rot")
    checks = check_files(REPOSITORY, commit, listing.files)
    assert [c.file.path for c in checks if c.state == "corrupt"] == ["m-00001-of-00002.gguf"]


# Systems without links


def test_without_links_files_are_moved_and_not_fetched_twice(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    paths = pull()
    assert not any(path.is_symlink() for path in paths)
    assert [*(cache / "models--org--model" / "blobs").iterdir()] == []
    assert_complete(cache)
    sent = hub.sent_bytes()
    listing = list_repository(REPOSITORY)
    assert missing_bytes(REPOSITORY, listing.files, commit=listing.commit) == 0
    assert pull() == paths
    hub.publish(REPOSITORY, CONTENTS | {"same.gguf": CONTENTS["m-00001-of-00002.gguf"]})
    new = pull()
    assert hub.sent_bytes() == sent
    assert new[0].read_bytes() == new[-1].read_bytes() == CONTENTS["m-00001-of-00002.gguf"].content
    assert_complete(cache)
    with new[1].open("r+b") as file:
        file.write(b"rot")
    listing = list_repository(REPOSITORY)
    checks = check_files(REPOSITORY, listing.commit, listing.files)
    assert [c.state for c in checks].count("corrupt") == 1
    assert not new[1].exists()


# Several processes

CHILD = """
import json, signal, sys
from localmistral.models.download import download_files, list_repository

# Shells start what runs in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
first, waited = [], []
def report(progress):
    if not first:
        first.append(progress.resumed)
        print(json.dumps({"resumed": progress.resumed}), flush=True)
    if progress.phase == "waiting" and not waited:
        waited.append(progress)
        print(json.dumps({"waiting": progress.file}), flush=True)
listing = list_repository(sys.argv[1])
try:
    download_files(sys.argv[1], listing.commit, listing.files, revision="main", on_progress=report)
except KeyboardInterrupt:
    print(json.dumps({"interrupted": True}), flush=True)
    sys.exit(130)
print(json.dumps({"done": True}), flush=True)
"""


class Child:
    """A process that pulls a repository and says what it meets, one JSON object a line."""

    def __init__(self, repository: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, repository],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=10)[1]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def finish(self) -> list[dict[str, Any]]:
        """Everything it still says, once it has ended well."""
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, err
        return [json.loads(line) for line in out.splitlines()]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture
def start_child() -> Iterator[Callable[[str], Child]]:
    children: list[Child] = []

    def start(repository: str) -> Child:
        children.append(Child(repository))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
            child.process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came to that")


def wait_until_sent(hub: Hub, count: int) -> None:
    wait_until(lambda: hub.sent_bytes() >= count)


@pytest.mark.parametrize("links", ["links", "no links"])
def test_two_processes_share_one_transfer(
    hub: Hub,
    cache: Path,
    start_child: Callable[[str], Child],
    monkeypatch: pytest.MonkeyPatch,
    links: str,
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1" if links == "no links" else "0")
    hub.bytes_per_second = 12e6
    one, other = start_child(REPOSITORY), start_child(REPOSITORY)
    said = [*one.finish(), *other.finish()]
    assert said.count({"done": True}) == 2
    assert any("waiting" in line for line in said)
    assert hub.sent_bytes() == sum(len(s.content) for s in CONTENTS.values() if s.lfs)
    assert_complete(cache)
    blobs = [*(cache / "models--org--model" / "blobs").iterdir()]
    assert len(blobs) == (0 if links == "no links" else len(CONTENTS))


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX'")
def test_a_killed_holder_does_not_block_the_one_who_waits(
    hub: Hub, cache: Path, start_child: Callable[[str], Child]
) -> None:
    hub.bytes_per_second = 5e6
    holder = start_child(REPOSITORY)
    assert holder.read() == {"resumed": 0}
    wait_until(lambda: hub.sent_bytes() > 1 << 20)
    waiting = start_child(REPOSITORY)
    waiting.read()
    assert waiting.read() == {"waiting": "m-00001-of-00002.gguf"}
    assert holder.end(signal.SIGKILL) == -signal.SIGKILL
    hub.bytes_per_second = None
    assert waiting.finish() == [{"done": True}]
    assert hub.sent_bytes() < TOTAL + (2 << 20)
    assert_complete(cache)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX'")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_ten_ends_at_random_points_lose_next_to_nothing(
    hub: Hub, cache: Path, start_child: Callable[[str], Child], number: signal.Signals
) -> None:
    shards = [70 << 20, 70 << 20, 60 << 20]
    source = random.Random(int(number))
    stored = {f"s-{n}.gguf": Stored(content=source.randbytes(s)) for n, s in enumerate(shards)}
    hub.publish("org/large", stored)
    total, had, shares = sum(shards), 0, []
    for point in sorted(source.randrange(total // 10, total - (4 << 20)) for _ in range(10)):
        hub.bytes_per_second = 60e6
        sent = hub.sent_bytes()
        child = start_child("org/large")
        resumed = child.read()["resumed"]
        shares.append(resumed / had if had else 1.0)
        wait_until_sent(hub, sent + point - resumed)
        # What the server has sent but a busy machine leaves in sockets hasn't been there.
        hub.bytes_per_second = 1e6
        time.sleep(0.2)
        pressed = time.monotonic()
        assert child.end(number) in (-signal.SIGKILL, 130)
        assert time.monotonic() - pressed < 5
        had = resumed + hub.sent_bytes() - sent
    print("continued from:", " ".join(f"{share:.1%}" for share in shares))
    hub.bytes_per_second = None
    last = start_child("org/large")
    shares.append(last.read()["resumed"] / had)
    last.finish()
    assert min(shares) >= 0.95, shares
    assert scan_cache_dir(cache).warnings == []
    for path, file in stored.items():
        found = try_to_load_from_cache("org/large", path, cache_dir=cache)
        assert isinstance(found, str)
        assert Path(found).read_bytes() == file.content


# Ranges for readers of headers


def test_ranges_are_read_by_many_threads_at_once(hub: Hub) -> None:
    listing = list_repository(REPOSITORY)
    wrong = []

    def read(number: int) -> None:
        file = listing.files[number % 3]
        content = CONTENTS[file.path].content
        data, etag = read_range(REPOSITORY, listing.commit, file, number * 100, number * 100 + 5000)
        if data != content[number * 100 : number * 100 + 5000] or etag != file.sha256:
            wrong.append(number)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert hub.sent_bytes() == 25 * 5000
