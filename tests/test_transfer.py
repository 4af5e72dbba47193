"""Ranges, journals, and the transfer of one file through all that can go wrong on the way."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hub import Fault, Hub, Stored, running_hub
from hypothesis import given
from hypothesis import strategies as st

from localmistral.errors import DownloadError
from localmistral.models.blobs import list_places
from localmistral.models.journal import LONGEST_WRITE, Partial, partial_keys, recorded_bytes
from localmistral.models.ranges import Ranges
from localmistral.models.transfer import Patience, State, fetch, read_bytes
from localmistral.models.web import (
    Body,
    FileChangedError,
    InterruptedTransferError,
    RemoteFile,
    Source,
)

CONTENT = random.Random(1).randbytes(12 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(stall_s=0.5, tries=4, first_wait_s=0.01, longest_wait_s=0.05)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.publish("org/m", {"m.gguf": Stored(content=CONTENT)})
        yield hub


def source_of(hub: Hub, name: str = "m.gguf", key: str | None = SHA256, **headers: str) -> Source:
    commit = hub.repositories["org/m"].commit
    url = f"{hub.endpoint}/org/m/resolve/{commit}/{name}"
    size = len(hub.repositories["org/m"].files[name].content)
    remote = RemoteFile(name=name, url=url, bytes=size, key=key, headers=headers)
    return Source(remote, stall_s=QUICK.stall_s, connect_s=1)


def ignore(state: State) -> None:
    """For transfers whose progress doesn't matter."""


def run_fetch(
    hub: Hub,
    folder: Path,
    *,
    connections: int = 4,
    report: Callable[[State], None] = ignore,
) -> bytes:
    """Fetch m.gguf as `download` would; its bytes."""
    partial = Partial(folder, SHA256, len(CONTENT))
    try:
        fetch(source_of(hub), partial, connections=connections, patience=QUICK, report=report)
        partial.complete(folder / SHA256)
    finally:
        partial.leave()
    return (folder / SHA256).read_bytes()


class InterruptionError(Exception):
    """Stands for whatever ends a download from outside."""


def interrupt_at(byte: int) -> Callable[[State], None]:
    def report(state: State) -> None:
        if state.done >= byte:
            raise InterruptionError

    return report


# Ranges


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=12))
def test_ranges_are_the_set_of_their_bytes(added: list[tuple[int, int]]) -> None:
    ranges, model = Ranges(), set[int]()
    for start, length in added:
        ranges.add(start, start + length)
        model |= set(range(start, start + length))
    assert ranges.bytes == len(model)
    assert {b for start, end in ranges for b in range(start, end)} == model
    assert {b for start, end in ranges.gaps(60) for b in range(start, end)} == set(
        range(60)
    ) - model
    assert ranges.frontier == next(b for b in range(61) if b not in model)
    assert all(a[1] < b[0] for a, b in zip([*ranges], [*ranges][1:], strict=False))
    for start in range(0, 55, 5):
        assert ranges.holds(start, start + 5) == (set(range(start, start + 5)) <= model)


# Journals


def abandon(partial: Partial) -> None:
    """What a killed process leaves: nothing more is written."""
    partial.close()


def test_what_was_written_is_believed_after_a_kill(tmp_path: Path) -> None:
    partial = Partial(tmp_path, SHA256, 1000)
    partial.write(100, b"a" * 50)
    partial.write(150, b"b" * 50)
    partial.write(900, b"c" * 100)
    abandon(partial)
    assert recorded_bytes(tmp_path, SHA256, 1000) == 200
    again = Partial(tmp_path, SHA256, 1000)
    assert [*again.done] == [(100, 200), (900, 1000)]
    again.close()
    assert again.path.read_bytes()[100:200] == b"a" * 50 + b"b" * 50


def test_what_a_power_cut_lost_is_not_believed_and_what_was_synced_is(tmp_path: Path) -> None:
    partial = Partial(tmp_path, SHA256, 1000)
    partial.write(0, b"a" * 100)
    partial.sync()
    partial.write(100, b"b" * 100)
    partial.write(200, b"c" * 100)
    abandon(partial)
    with partial.path.open("r+b") as data:
        data.seek(150)
        data.write(bytes(10))  # the middle write never reached the disk
    again = Partial(tmp_path, SHA256, 1000)
    assert [*again.done] == [(0, 100), (200, 300)]
    again.close()


@pytest.mark.parametrize(
    "tail", [b"+ 200 30", b"+ 200 300 x\n", b"\0\0\0\0", b"\xff\xfe\n", b"*\n"]
)
def test_a_torn_journal_counts_up_to_where_it_is_torn(tmp_path: Path, tail: bytes) -> None:
    partial = Partial(tmp_path, SHA256, 1000)
    partial.write(0, b"a" * 100)
    abandon(partial)
    with (tmp_path / f"{SHA256}.journal").open("ab") as journal:
        journal.write(tail + b"* 500 600\n")
    again = Partial(tmp_path, SHA256, 1000)
    assert [*again.done] == [(0, 100)]
    again.write(100, b"b")  # and the journal goes on as if nothing had been
    abandon(again)
    assert recorded_bytes(tmp_path, SHA256, 1000) == 101


@pytest.mark.parametrize(
    "line",
    [
        "* 0 2000",  # beyond the end
        "* 500 400",
        "* 300 300",
        f"* 0 {'9' * 5000}",  # more digits than Python reads
        f"+ 0 {LONGEST_WRITE + 1} 1",  # would have to be read into memory whole
    ],
)
def test_a_journal_that_says_what_cannot_be_is_not_believed(tmp_path: Path, line: str) -> None:
    size = 1000 if line.startswith("*") else 3 * LONGEST_WRITE
    Partial(tmp_path, SHA256, size).close()
    os.truncate(tmp_path / f"{SHA256}.part", size)
    with (tmp_path / f"{SHA256}.journal").open("ab") as journal:
        journal.write(f"{line}\n".encode())
    again = Partial(tmp_path, SHA256, size)
    assert again.done.bytes == 0
    again.close()


def test_a_journal_without_its_data_or_of_another_size_counts_for_nothing(tmp_path: Path) -> None:
    partial = Partial(tmp_path, SHA256, 1000)
    partial.write(0, b"a" * 600)
    partial.sync()
    abandon(partial)
    os.truncate(partial.path, 500)
    assert recorded_bytes(tmp_path, SHA256, 1000) == 500
    shorter = Partial(tmp_path, SHA256, 1000)
    assert shorter.done.bytes == 0
    shorter.write(0, b"a" * 600)
    abandon(shorter)
    assert recorded_bytes(tmp_path, SHA256, 999) == 0
    other = Partial(tmp_path, SHA256, 999)
    assert other.done.bytes == 0
    other.close()


def test_a_reset_forgets_all_even_what_is_being_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = Partial(tmp_path, SHA256, 1000)
    partial.write(0, b"a" * 100)
    real_fsync = os.fsync

    def reset_meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real_fsync)
        partial.reset()
        partial.write(500, b"z" * 10)

    monkeypatch.setattr(os, "fsync", reset_meanwhile)
    partial.sync()
    abandon(partial)
    again = Partial(tmp_path, SHA256, 1000)
    assert [*again.done] == [(500, 510)]
    again.close()


def test_a_long_journal_is_shortened_and_says_the_same(tmp_path: Path) -> None:
    size = 60_000
    partial = Partial(tmp_path, SHA256, size)
    for start in range(0, size, 2):
        partial.write(start, b"x")
    partial.remember_version("abc")
    abandon(partial)
    journal = tmp_path / f"{SHA256}.journal"
    with journal.open("ab") as file:
        file.write(b"v abc\n" * 100_000)
    again = Partial(tmp_path, SHA256, size)
    assert again.done.bytes == size / 2
    again.write(1, b"y")
    abandon(again)
    assert journal.stat().st_size < 1 << 20
    once_more = Partial(tmp_path, SHA256, size)
    assert (once_more.done.bytes, once_more.version) == (size / 2 + 1, "abc")
    assert not (tmp_path / f"{SHA256}.journal-new").exists()
    once_more.close()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_a_folder_that_cannot_be_read_holds_nothing(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert partial_keys(loop) == ()
    assert list_places(loop) == ()


def test_a_partial_without_a_byte_leaves_nothing_behind(tmp_path: Path) -> None:
    Partial(tmp_path, SHA256, 1000).leave()
    assert [*tmp_path.iterdir()] == []
    partial = Partial(tmp_path, SHA256, 1000)
    partial.write(10, b"x")
    partial.leave()
    assert partial_keys(tmp_path) == (SHA256,)


# One file over the network


def test_a_file_comes_over_several_connections_and_only_once(hub: Hub, tmp_path: Path) -> None:
    assert run_fetch(hub, tmp_path) == CONTENT
    assert hub.sent_bytes() == len(CONTENT)
    assert len({seen.range for seen in hub.seen if seen.host == "data"}) >= 3
    assert [path.name for path in tmp_path.iterdir()] == [SHA256]


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind="cut", after=300_000, times=3),
        Fault(kind="cut", after=0, times=2),
        Fault(kind="stall", after=200_000, times=1),
        Fault(kind="stall", after=0, times=1),
        Fault(kind="status", status=500, times=2),
        Fault(kind="status", status=503, headers={"Retry-After": "0"}, times=2),
        Fault(kind="status", status=429, times=2),
        Fault(kind="status", status=408, times=1),
        Fault(kind="status", status=500, at="hub", times=2),
        Fault(kind="status", status=429, at="hub", headers={"Retry-After": "0"}, times=2),
        Fault(kind="short_range", times=None),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.at}-{fault.status}-{fault.after}",
)
def test_what_another_try_mends_costs_nothing_that_had_come(
    hub: Hub, tmp_path: Path, fault: Fault, connections: int
) -> None:
    hub.order(replace(fault))
    assert run_fetch(hub, tmp_path, connections=connections) == CONTENT
    in_flight = 4 * (1 << 20) if fault.kind == "cut" else 0  # may sit in sockets when cut
    assert hub.sent_bytes() <= len(CONTENT) + in_flight


def test_an_interrupted_file_continues_by_range(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 20e6
    with pytest.raises(InterruptionError):
        run_fetch(hub, tmp_path, report=interrupt_at(len(CONTENT) // 4))
    kept = recorded_bytes(tmp_path, SHA256, len(CONTENT))
    assert kept >= len(CONTENT) // 4
    time.sleep(0.2)  # what is in flight drains
    before = hub.sent_bytes()
    assert run_fetch(hub, tmp_path) == CONTENT
    assert hub.sent_bytes() - before == len(CONTENT) - kept


def test_a_server_that_ignores_ranges_is_read_in_one_stream(hub: Hub, tmp_path: Path) -> None:
    hub.order(Fault(kind="ignore_range"))
    assert run_fetch(hub, tmp_path) == CONTENT


def test_a_partial_starts_over_where_the_server_no_longer_sends_ranges(
    hub: Hub, tmp_path: Path
) -> None:
    hub.bytes_per_second = 20e6
    with pytest.raises(InterruptionError):
        run_fetch(hub, tmp_path, report=interrupt_at(3 << 20))
    hub.order(Fault(kind="ignore_range"))
    assert run_fetch(hub, tmp_path) == CONTENT


def test_without_ranges_a_stream_that_always_breaks_off_ends_with_an_error(
    hub: Hub, tmp_path: Path
) -> None:
    hub.order(Fault(kind="cut_whole", after=1 << 20))
    with pytest.raises(DownloadError, match="breaks off again and again"):
        run_fetch(hub, tmp_path)
    assert hub.sent_bytes() < 30 << 20
    hub.faults[:] = [Fault(kind="cut_whole", after=1 << 20, times=2), Fault(kind="ignore_range")]
    assert run_fetch(hub, tmp_path) == CONTENT


def test_a_file_that_changed_between_tries_starts_over(hub: Hub, tmp_path: Path) -> None:
    stored = hub.repositories["org/m"].files["m.gguf"]
    stored.served = bytes(len(CONTENT))  # the storage host had something else at first
    hub.bytes_per_second = 20e6
    with pytest.raises(InterruptionError):
        run_fetch(hub, tmp_path, report=interrupt_at(3 << 20))
    stored.served, hub.bytes_per_second = None, None
    time.sleep(0.2)
    hub.bytes_per_second = 30e6
    before = hub.sent_bytes()
    assert run_fetch(hub, tmp_path) == CONTENT
    # At once, not only when the hash of the whole turns out wrong.
    assert len(CONTENT) <= hub.sent_bytes() - before < len(CONTENT) + (3 << 20)


def test_leftovers_that_went_bad_are_found_by_the_hash_and_fetched_again(
    hub: Hub, tmp_path: Path
) -> None:
    hub.bytes_per_second = 20e6
    with pytest.raises(InterruptionError):
        run_fetch(hub, tmp_path, report=interrupt_at(3 << 20))
    partial = Partial(tmp_path, SHA256, len(CONTENT))
    partial.sync()
    start, end = next(iter(partial.done))
    partial.close()
    with partial.path.open("r+b") as data:  # below what the journal calls durable
        data.seek((start + end) // 2)
        data.write(b"rotten")
    hub.bytes_per_second = None
    assert run_fetch(hub, tmp_path) == CONTENT


def test_a_flipped_bit_is_said_and_nothing_is_left(hub: Hub, tmp_path: Path) -> None:
    hub.order(Fault(kind="flip", after=7 << 20))
    with pytest.raises(DownloadError, match="sha256 mismatch"):
        run_fetch(hub, tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_etags_that_differ_with_every_answer_cannot_restart_a_download_for_ever(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flips = iter(range(10_000))
    monkeypatch.setattr("hub.etag_of", lambda _: str(next(flips)))
    assert run_fetch(hub, tmp_path) == CONTENT
    assert hub.sent_bytes() < 3 * len(CONTENT)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(kind="status", status=500), r"localhost answered 500 \(4 tries\)"),
        (Fault(kind="stall", after=0), r"no byte for 0\.5 s \(4 tries\)"),
        (Fault(kind="cut", after=0), r"\(4 tries\)"),
        (Fault(kind="status", status=429, headers={"Retry-After": "7200"}), "wait 120 minutes"),
        (
            Fault(kind="status", status=206, headers={"Content-Range": f"bytes 0-9/{'9' * 5000}"}),
            "another range than was asked for",
        ),
        (Fault(kind="html"), "web page instead of 'm.gguf'.*captive portal"),
        (Fault(kind="html", at="hub"), "web page instead of 'm.gguf'.*captive portal"),
        (Fault(kind="status", status=511, at="hub"), "captive portal"),
        (Fault(kind="status", status=403), "refuses 'm.gguf'"),
        (Fault(kind="status", status=404, at="hub"), "There is no 'm.gguf'"),
        (Fault(kind="redirect", at="hub", location="/x"), "redirects more than 10 times"),
        (
            Fault(kind="redirect", at="hub", location="ftp://h/x"),
            "can't be read from.*URLSchemeUnknown",
        ),
        (
            Fault(kind="redirect", at="hub", location="http://[::bad"),
            "can't be read from.*ValueError",
        ),
    ],
    ids=lambda value: f"{value.kind}-{value.status}-{value.at}" if isinstance(value, Fault) else "",
)
def test_what_no_try_mends_ends_with_the_reason_and_what_to_do(
    hub: Hub, tmp_path: Path, fault: Fault, said: str
) -> None:
    hub.order(fault)
    with pytest.raises(DownloadError, match=said) as raised:
        run_fetch(hub, tmp_path)
    assert raised.value.hint or "redirect" in fault.kind
    assert "top-secret" not in str(raised.value)
    assert [*tmp_path.iterdir()] == []


def test_ten_bytes_at_a_time_are_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.order(Fault(kind="cut", after=10))
    with pytest.raises(DownloadError, match=r"broke|ended early.* \(4 tries\)"):
        run_fetch(hub, tmp_path)
    assert len(hub.seen) < 40


def test_a_failure_midway_keeps_what_has_come(hub: Hub, tmp_path: Path) -> None:
    hub.order(Fault(kind="cut", after=1 << 20, times=4))
    hub.order(Fault(kind="status", status=500))
    with pytest.raises(DownloadError, match="answered 500"):
        run_fetch(hub, tmp_path)
    kept = recorded_bytes(tmp_path, SHA256, len(CONTENT))
    assert kept > 0
    hub.faults.clear()
    before = hub.sent_bytes()
    assert run_fetch(hub, tmp_path) == CONTENT
    assert hub.sent_bytes() - before == len(CONTENT) - kept


def test_another_file_at_the_address_is_refused_before_a_byte_is_taken(
    hub: Hub, tmp_path: Path
) -> None:
    listed = source_of(hub)
    hub.repositories["org/m"].files["m.gguf"].content = bytes(len(CONTENT))
    partial = Partial(tmp_path, SHA256, len(CONTENT))
    with pytest.raises(FileChangedError, match="isn't the file that was listed"):
        fetch(listed, partial, connections=2, patience=QUICK, report=ignore)
    partial.leave()
    assert hub.sent_bytes() == 0


def test_an_address_that_expired_is_asked_for_anew(hub: Hub, tmp_path: Path) -> None:
    source = source_of(hub)
    assert read_bytes(source, 0, 10, QUICK) == CONTENT[:10]
    hub.order(Fault(kind="status", status=403, times=1))
    assert read_bytes(source, 10, 20, QUICK) == CONTENT[10:20]
    assert [seen.host for seen in hub.seen] == ["hub", "data", "data", "hub", "data"]


def test_a_wait_that_the_server_asks_for_is_kept(hub: Hub) -> None:
    hub.order(Fault(kind="status", status=429, headers={"Retry-After": "1"}, times=1))
    read_bytes(source_of(hub), 0, 10, QUICK)
    refused, taken = (seen.began for seen in hub.seen if seen.host == "data")
    assert taken - refused >= 1


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry-After": "17"}, 17),
        ({"Retry-After": "in an hour"}, 3600),  # stands for a date
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"resolvers";r=0;t=55', "Retry-After": "1"}, 55),
        ({"RateLimit": '"resolvers";r=3;t=55'}, None),
        ({}, None),
    ],
)
def test_waits_are_read_in_every_form(
    hub: Hub, headers: dict[str, str], wait_s: float | None
) -> None:
    if wait_s == 3600:
        then = datetime.now(UTC) + timedelta(hours=1)
        headers = {"Retry-After": format_datetime(then, usegmt=True)}
    hub.order(Fault(kind="status", status=429, headers=headers))
    with pytest.raises(InterruptedTransferError) as raised, source_of(hub).open(0, 10):
        pytest.fail("an answer of 429 has no body to read")
    if wait_s is None:
        assert raised.value.wait_s is None
    else:
        assert raised.value.wait_s == pytest.approx(wait_s, abs=30 if wait_s == 3600 else 0)


def test_ranges_are_read_whole_from_servers_that_cut_shorten_or_ignore_them(hub: Hub) -> None:
    for fault in (
        Fault(kind="cut", after=100_000, times=1),
        Fault(kind="short_range", times=2),
        Fault(kind="ignore_range", times=1),
        Fault(kind="stall", after=70_000, times=1),
    ):
        hub.faults[:] = [fault]
        assert read_bytes(source_of(hub), 100, 400_000, QUICK) == CONTENT[100:400_000], fault.kind
    assert read_bytes(source_of(hub), len(CONTENT) - 5, len(CONTENT) + 5, QUICK) == CONTENT[-5:]
    assert read_bytes(source_of(hub), len(CONTENT) + 5, len(CONTENT) + 9, QUICK) == b""


def test_a_proxy_of_the_environment_is_used_except_where_it_says_not(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    # The Hub here answers as a proxy would: requests name the whole address.
    proxy = hub.endpoint.replace("http://", "http://user:p%40ss@")
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "localhost")
    here = source_of(hub, authorization="Bearer hf_x").file
    away = replace(here, url=here.url.replace(hub.endpoint, "http://hub.invalid"))
    source = Source(away, stall_s=1, connect_s=1)
    assert read_bytes(source, 0, 10, QUICK) == CONTENT[:10]
    asked, stored = hub.seen
    assert asked.path.startswith("http://hub.invalid/org/m/resolve/")
    assert asked.proxy_authorization == "Basic dXNlcjpwQHNz"
    assert (stored.host, stored.proxy_authorization) == ("data", None)
    assert stored.path.startswith("/org/m/")
    monkeypatch.setenv("http_proxy", hub.endpoint.removeprefix("http://"))
    assert read_bytes(Source(away, stall_s=1, connect_s=1), 0, 10, QUICK) == CONTENT[:10]


def test_progress_is_told_in_the_callers_thread_and_only_grows(hub: Hub, tmp_path: Path) -> None:
    states: list[State] = []
    threads = set()

    def report(state: State) -> None:
        states.append(state)
        threads.add(threading.get_ident())

    hub.bytes_per_second = 30e6
    hub.order(Fault(kind="status", status=500, times=3))
    run_fetch(hub, tmp_path, report=report)
    done = [state.done for state in states]
    assert done == sorted(done)
    assert done[-1] == states[-1].verified == len(CONTENT)
    assert len(set(done)) > 2
    assert threads == {threading.get_ident()}


def test_hosts_that_are_not_there_are_named_in_words(tmp_path: Path) -> None:
    for url, said in (
        ("http://nowhere.invalid/x", "address isn't found"),
        ("http://127.0.0.1:9/x", "no connection could be made"),
    ):
        remote = RemoteFile(name="x.gguf", url=url, bytes=9, key=SHA256, headers={})
        source = Source(remote, stall_s=1, connect_s=1)
        with pytest.raises(DownloadError, match=rf"'x\.gguf' couldn't be .*{said} \(4 tries\)"):
            read_bytes(source, 0, 9, QUICK)


def test_a_partial_that_another_program_cuts_short_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 20e6
    with pytest.raises(InterruptionError):
        run_fetch(hub, tmp_path, report=interrupt_at(2 << 20))
    real = hashlib.sha256

    def cut_short(*args: bytes) -> object:
        os.truncate(tmp_path / f"{SHA256}.part", 0)
        return real(*args)

    partial = Partial(tmp_path, SHA256, len(CONTENT))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DownloadError, match="cut short"):
        patch.setattr("localmistral.models.transfer.hashlib.sha256", cut_short)
        fetch(source_of(hub), partial, connections=1, patience=QUICK, report=ignore)
    partial.leave()


def test_a_thread_that_is_left_behind_writes_nothing_more(hub: Hub, tmp_path: Path) -> None:
    go_on = threading.Event()

    class SlowSource(Source):
        @contextmanager
        def open(self, start: int, end: int) -> Iterator[Body]:
            def chunks() -> Iterator[bytes]:
                go_on.wait(30)
                yield b"late" * 1000

            yield Body(start=start, end=end, version="", chunks=chunks())

    def interrupt(state: State) -> None:
        raise InterruptionError

    before = {*threading.enumerate()}
    partial = Partial(tmp_path, SHA256, len(CONTENT))
    slow = SlowSource(source_of(hub).file, stall_s=1, connect_s=1)
    with pytest.raises(InterruptionError):
        fetch(slow, partial, connections=2, patience=QUICK, report=interrupt)
    left_behind = {*threading.enumerate()} - before
    assert left_behind
    go_on.set()
    for thread in left_behind:
        thread.join(10)
    assert partial.done.bytes == 0
    partial.leave()
