"""What no application sees: broken HTTP, clients that dawdle, requests cut off by the end."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from live_server import serve_live

from localmistral.server import protocol
from localmistral.server.running import RunningServer, bind
from localmistral.server.serving import Serving
from localmistral.server.settings import ServerSettings

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
WAIT_S = 60
"""Generous: nothing here takes as long unless it is broken."""


@pytest.fixture
def server() -> Iterator[httpx2.Client]:
    with serve_live(Serving()) as http:
        yield http


def connect(server: httpx2.Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.base_url.port), timeout=WAIT_S)


def read_to_end(link: socket.socket) -> bytes:
    """Everything until the server closes; a reset counts as that."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := link.recv(65_536):
            got += piece
    return got


def read_answer(link: socket.socket) -> bytes:
    """An answer that ends with an object."""
    got = b""
    while not got.endswith(b"}"):
        piece = link.recv(65_536)
        assert piece, got
        got += piece
    return got


def read_error(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error object of the last answer in `answer`."""
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", 431),
        ("GET /café HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), 400),
        (HEAD + b"Content-Length: x\r\n\r\n", 400),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n", 400),
        (HEALTH + b"garbage\r\n\r\n", 400),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_what_is_no_http_is_refused_with_an_error_object(
    server: httpx2.Client, request_bytes: bytes, status: int
) -> None:
    with connect(server) as link:
        with contextlib.suppress(ConnectionError):  # the rest of a large head has no reader
            link.sendall(request_bytes)
        answer = read_to_end(link)
    if status != 431 or answer:
        assert (found := read_error(answer))[0] == status
        assert set(found[1]) == {"message", "type", "param", "code"}
        assert "no valid HTTP request" in found[1]["message"]
    assert server.get("/health").status_code == 503


def test_a_broken_body_behind_a_refusal_ends_the_connection_and_nothing_else(
    server: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "asyncio"), connect(server) as link:
        refused = HEAD.replace(b"application/json", b"text/plain")
        link.sendall(refused + b"Transfer-Encoding: chunked\r\n\r\n")
        assert b" 415 " in read_answer(link)
        link.sendall(b"zz\r\nxx\r\n")
        assert read_to_end(link) == b""
    assert not caplog.records
    assert server.get("/health").status_code == 503


def test_a_head_that_comes_by_the_byte_is_not_waited_for_and_holds_up_nobody(
    server: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 1.0)
    with connect(server) as link:
        is_closed = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                for number in range(1000):
                    link.sendall(HEALTH[number : number + 1] if number < 20 else b"x")
                    time.sleep(0.05)
            is_closed.set()

        thread = threading.Thread(target=trickle)
        thread.start()
        assert server.get("/health").status_code == 503
        assert link.recv(65_536) == b""
        thread.join(WAIT_S)
        assert is_closed.is_set()


def test_a_connection_that_sends_nothing_is_closed(
    server: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    with connect(server) as link:
        assert read_to_end(link) == b""


def test_between_two_requests_a_connection_may_rest(
    server: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
    with connect(server) as link:
        for _ in range(2):
            link.sendall(HEALTH)
            assert b"loading" in read_answer(link)
            time.sleep(0.6)


def test_a_body_that_stops_coming_is_given_up_with_408(
    server: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", 0.3)
    with connect(server) as link:
        link.sendall(HEAD + b'Content-Length: 500\r\n\r\n{"messages"')
        status, error = read_error(read_to_end(link))
    assert status == 408
    assert "body" in error["message"]


def test_a_body_that_comes_slowly_is_waited_for(
    server: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", 1.0)
    body = b'{"messages": 5}'
    with connect(server) as link:
        link.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        for number in range(0, len(body), 5):
            time.sleep(0.5)
            link.sendall(body[number : number + 5])
        assert b"still loading" in read_answer(link)


def test_a_request_that_is_not_whole_does_not_hold_up_the_end() -> None:
    bound, settings = bind(ServerSettings(port=0, drain_s=WAIT_S))
    with contextlib.closing(bound):
        server = RunningServer(Serving(), settings, bound)
        server.start()
        with socket.create_connection(("127.0.0.1", settings.port), timeout=WAIT_S) as link:
            link.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
            with httpx2.Client(base_url=settings.url, timeout=WAIT_S) as http:
                http.get("/health")  # by now the half request has been read
            server.stop()
            answer = read_to_end(link)
            assert not server.is_running
    status, error = read_error(answer)
    assert status == 503
    assert "shutting down" in error["message"]
    assert b"retry-after" in answer.lower()


def test_many_idle_connections_leave_room_for_requests(server: httpx2.Client) -> None:
    with contextlib.ExitStack() as links:
        for _ in range(300):
            links.enter_context(connect(server))
        assert server.get("/health").status_code == 503


def test_requests_may_be_sent_before_the_answers_have_come(server: httpx2.Client) -> None:
    last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with connect(server) as link:
        link.sendall(HEALTH * 2 + last)
        assert read_to_end(link).count(b'"status":"loading"') == 3
