"""The files by which `run` finds servers: who may read them, which are believed, which removed."""

from __future__ import annotations

import dataclasses
import http.server
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmistral.errors import UsageError
from localmistral.server import runtime_file
from localmistral.server.client import find_server
from localmistral.server.runtime_file import (
    ServerRecord,
    forget,
    machine_name,
    published,
    read_servers,
)

RECORD = ServerRecord(
    pid=os.getpid(),
    machine=machine_name(),
    host="127.0.0.1",
    port=1,
    token="a-token",
    names=("small-4", "Mistral-Small-4.gguf"),
    path="small-4.gguf",
    name="small-4",
    title="small-4",
    context=4096,
    has_effort_switch=True,
    started=1.0,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state" / "servers"
    monkeypatch.setattr(runtime_file, "servers_folder", lambda: path)
    return path


def dead_pid() -> int:
    """A process that was there and is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(folder: Path, name: str, record: ServerRecord) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")
    return path


def test_a_server_can_be_found_while_it_runs_and_not_after(folder: Path) -> None:
    with published(RECORD):
        assert read_servers() == (RECORD,)
        assert len(list(folder.iterdir())) == 1
    assert read_servers() == ()
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_only_its_owner_may_read_the_file(folder: Path) -> None:
    old = os.umask(0)
    try:
        with published(RECORD):
            (path,) = folder.iterdir()
            assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)


def test_a_file_left_by_another_process_of_that_number_is_replaced(folder: Path) -> None:
    with published(dataclasses.replace(RECORD, port=2)), published(RECORD):
        assert read_servers() == (RECORD,)


def test_a_folder_that_cannot_be_written_is_only_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file", encoding="utf-8")
    with caplog.at_level(logging.WARNING), published(RECORD):
        assert "won't use this server" in caplog.text
    assert folder.is_file()


def test_the_file_of_a_process_that_is_gone_is_removed(folder: Path) -> None:
    path = write(folder, "old.json", dataclasses.replace(RECORD, pid=dead_pid()))
    assert read_servers() == ()
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "{", "[" * 100_000, '{"pid": "x"}', "\x00"],
    ids=["empty", "object", "list", "null", "cut", "deep", "wrong", "binary"],
)
def test_a_file_that_is_no_record_is_removed(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(text, encoding="utf-8")
    assert read_servers() == ()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ServerRecord)])
def test_a_record_with_a_field_of_another_type_is_removed(folder: Path, field: str) -> None:
    path = write(folder, "x.json", RECORD)
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, field: None}), encoding="utf-8")
    assert read_servers() == ()
    assert not path.exists()


def test_servers_of_other_machines_are_left_alone(folder: Path) -> None:
    path = write(folder, "x.json", dataclasses.replace(RECORD, machine="elsewhere", pid=2**22))
    assert read_servers() == ()
    assert path.exists()


def test_the_last_one_started_comes_first(folder: Path) -> None:
    for number in (1, 3, 2):
        write(folder, f"{number}.json", dataclasses.replace(RECORD, started=float(number)))
    assert [record.started for record in read_servers()] == [3.0, 2.0, 1.0]


def test_a_model_goes_by_its_names_or_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "small-4.gguf"
    model.write_bytes(b"")
    record = dataclasses.replace(RECORD, path=str(model))
    for name in ("small-4", "SMALL-4", str(model), "small-4.gguf", "./small-4.gguf"):
        assert record.serves(name)
    for name in ("small", "small-4:Q4_K_M", "", "other.gguf", "a\0b", "x" * 5000):
        assert not record.serves(name)


def test_a_file_of_the_same_name_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Mistral-Small-4.gguf").write_bytes(b"")
    assert not RECORD.serves("Mistral-Small-4.gguf")


# Finding one that answers


def test_where_nobody_listens_the_file_is_removed(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = write(folder, forgotten_name(), dataclasses.replace(RECORD, port=port))
    assert find_server("small-4") is None
    assert not path.exists()


def forgotten_name() -> str:
    """What `forget` will look for."""
    return f"{RECORD.machine}-{RECORD.pid}.json"


class Impostor(http.server.BaseHTTPRequestHandler):
    """Another program on the port: it notes what it is sent, and answers what it was told to."""

    body = b""
    status = 200
    wait_s = 0.0
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path + str(self.headers))
        time.sleep(self.wait_s)
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture
def impostor() -> Iterator[tuple[type[Impostor], int]]:
    handler = type("Told", (Impostor,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield handler, server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b'{"proof": "0000"}'), (200, b""), (200, b"<html>"), (404, b"{}"), (401, b"")],
)
def test_another_program_on_the_port_is_not_asked_and_learns_no_key(
    folder: Path, impostor: tuple[type[Impostor], int], status: int, body: bytes
) -> None:
    handler, port = impostor
    handler.status, handler.body = status, body
    path = write(folder, forgotten_name(), dataclasses.replace(RECORD, port=port))
    assert find_server("small-4") is None
    assert not path.exists()
    assert len(handler.seen) == 1
    assert RECORD.token not in handler.seen[0]


def test_a_server_that_is_about_to_end_is_passed_over(
    folder: Path, impostor: tuple[type[Impostor], int]
) -> None:
    handler, port = impostor
    handler.status = 503
    path = write(folder, forgotten_name(), dataclasses.replace(RECORD, port=port))
    assert find_server("small-4") is None
    assert path.exists()


def test_a_server_that_is_slow_is_passed_over(
    folder: Path, impostor: tuple[type[Impostor], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmistral.server.client.PROOF_TIMEOUT_S", 0.05)
    handler, port = impostor
    handler.wait_s = 0.5
    path = write(folder, forgotten_name(), dataclasses.replace(RECORD, port=port))
    assert find_server("small-4") is None
    assert path.exists()


def test_a_server_of_another_model_is_not_asked(
    folder: Path, impostor: tuple[type[Impostor], int]
) -> None:
    handler, port = impostor
    write(folder, forgotten_name(), dataclasses.replace(RECORD, port=port))
    assert find_server("ministral-3-8b") is None
    assert handler.seen == []


def test_without_a_name_two_models_leave_no_choice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmistral.server.client._answers", lambda record: True)
    write(folder, "1.json", RECORD)
    write(folder, "2.json", dataclasses.replace(RECORD, names=("other",), started=2.0, context=8))
    with pytest.raises(UsageError, match="small-4"):
        find_server(None)
    found = find_server("other")
    assert found is not None
    assert found.context == 8


def test_without_a_name_the_only_model_is_taken_from_its_newest_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmistral.server.client._answers", lambda record: True)
    write(folder, "1.json", RECORD)
    write(folder, "2.json", dataclasses.replace(RECORD, started=2.0, context=8))
    found = find_server(None)
    assert found is not None
    assert found.context == 8


def test_forgetting_twice_is_no_error(folder: Path) -> None:
    write(folder, forgotten_name(), RECORD)
    forget(RECORD)
    forget(RECORD)
    assert read_servers() == ()
