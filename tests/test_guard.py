"""The gate: forms of paths and methods, hosts, keys, pages that may read refusals, ids."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from live_server import LiveServer, serve_live, serve_model

from localmistral.engine import EngineSettings
from localmistral.errors import UsageError
from localmistral.server.serving import Serving
from localmistral.server.settings import ServerSettings, read_host_name

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is 31 + 46?"}]
KEY = "secret-key-1"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=2)) as live:
        yield live


@pytest.fixture(scope="module")
def paged(server: LiveServer) -> Iterator[httpx2.Client]:
    """A server with a key that one web page may use."""
    settings = ServerSettings(port=0, api_keys=(KEY,), allow_origins=("http://page",))
    with serve_live(Serving(chat=server.chat), settings) as http:
        yield http


def send(server: LiveServer, request: str) -> bytes:
    """The whole answer to a request that no client would send."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        link.sendall(request.replace("\n", "\r\n").encode())
        got = b""
        while piece := link.recv(65_536):
            got += piece
    return got


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/demo", "/metrics", "/"])
def test_head_is_get_without_the_body(server: LiveServer, path: str) -> None:
    whole, head = server.http.get(path), server.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    if path != "/metrics":  # which has just counted one more
        assert head.headers["content-length"] == whole.headers["content-length"]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "BREW"])
@pytest.mark.parametrize(("path", "allowed"), [("/v1/models", "GET"), (CHAT, "POST")])
def test_another_method_is_an_error_that_names_the_right_one(
    server: LiveServer, method: str, path: str, allowed: str
) -> None:
    response = server.http.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert method in response.json()["error"]["message"]


def test_posting_nothing_where_nothing_is_posted_is_a_wrong_method(server: LiveServer) -> None:
    assert server.http.post("/health").status_code == 405
    assert server.http.post("/no/such/path").status_code == 404
    nothing = server.http.post(CHAT)
    assert nothing.status_code == 400
    assert "body is missing" in nothing.json()["error"]["message"]
    form = server.http.post("/health", data={"a": "b"})
    assert form.status_code == 415


@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/v1//models//", "/v1/models"])
def test_slashes_too_many_do_no_harm(server: LiveServer, path: str) -> None:
    assert send(server, f"GET {path} HTTP/1.1\nHost: localhost\nConnection: close\n\n").startswith(
        b"HTTP/1.1 200 "
    )


def test_a_slash_at_the_end_is_no_redirect(server: LiveServer) -> None:
    body = {"messages": QUESTION, "max_tokens": 1}
    assert server.http.post(f"{CHAT}/", json=body).status_code == 200
    body = {"messages": 5, "max_tokens": 1}
    assert server.http.post("/v1/messages/", json=body).json()["type"] == "error"


def test_a_slash_more_opens_no_closed_path(paged: httpx2.Client) -> None:
    for path in ("/v1/models/", "//v1/models", "/health/../v1/models", "/%2Fv1/models"):
        assert paged.get(path).status_code == 401
    assert paged.get("/health/").status_code == 200


def test_a_path_may_be_a_whole_url_of_this_server(server: LiveServer) -> None:
    def status(url: str, host: str) -> int:
        answer = send(server, f"GET {url} HTTP/1.1\nHost: {host}\nConnection: close\n\n")
        return int(answer.split()[1])

    assert status("http://localhost/health", "localhost") == 200
    assert status("http://localhost:80/health", "localhost:80") == 200
    assert status("http://evil.example/health", "localhost") == 404
    assert status("http://evil.example/health", "evil.example") == 403


@pytest.mark.parametrize(
    "host",
    [
        "localhost:x", "user@localhost", "localhost/evil", "localhost,evil", "localhost..", "[::1",
        "::1", "127.1", "0.0.0.0", "2130706433", "localhost#evil", "localhost evil",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_local_host_is_refused(server: LiveServer, host: str) -> None:
    answer = send(server, f"GET /health HTTP/1.1\nHost: {host}\nConnection: close\n\n")
    assert answer.startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("box", "box"), ("Box:80", "box"), ("box.:80", "box"), ("[::1]:8", "::1"), ("box:", "box"),
        ("box:x", ""), ("[::1", ""), ("[::1]x", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_name_in_a_host_header_is_found(host: str, name: str) -> None:
    assert read_host_name(host) == name


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}", "x-api-key": "for-another-server"},
        {"authorization": "Bearer for-another-server", "x-api-key": KEY},
        {"authorization": "Basic eDp5", "x-api-key": KEY},
        {"authorization": f"BEARER  {KEY}"},
    ],
)
def test_one_right_key_of_two_is_enough(paged: httpx2.Client, headers: dict[str, str]) -> None:
    assert paged.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer", "x-api-key": ""},
        {"authorization": "Bearer a", "x-api-key": "b"},
        {"x-api-key": f"Bearer {KEY}"},
    ],
)
def test_a_key_in_another_form_is_none(paged: httpx2.Client, headers: dict[str, str]) -> None:
    assert paged.get("/v1/models", headers=headers).status_code == 401


def test_a_page_that_is_allowed_can_read_refusals_too(paged: httpx2.Client) -> None:
    origin = {"origin": "http://page"}
    key = {"authorization": f"Bearer {KEY}"}
    for response in (
        paged.get("/v1/models", headers=origin),
        paged.get("/v1/nothing", headers={**origin, **key}),
        paged.post(CHAT, content=b"x", headers={**origin, **key, "content-type": "text/plain"}),
    ):
        assert response.status_code in (401, 404, 415)
        assert response.headers["access-control-allow-origin"] == "http://page"
        assert "x-request-id" in response.headers["access-control-expose-headers"]
    other = paged.get("/v1/models", headers={"origin": "http://other"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_page_that_is_allowed_may_ask_first(paged: httpx2.Client, method: str) -> None:
    asked = {
        "origin": "http://page",
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        "access-control-request-private-network": "true",
    }
    response = paged.options(CHAT, headers=asked)
    assert response.status_code == 200, response.text
    assert response.headers["access-control-allow-origin"] == "http://page"
    assert response.headers["access-control-allow-private-network"] == "true"
    assert "authorization" in response.headers["access-control-allow-headers"]
    refused = paged.options(CHAT, headers={**asked, "origin": "http://other"})
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("name", ["", "http://box", "*", "a b", "a/b", "box:x", "box,other"])
def test_a_name_that_no_host_header_carries_is_refused_at_once(name: str) -> None:
    with pytest.raises(UsageError, match="Host header"):
        ServerSettings(allow_hosts=(name,))


@pytest.mark.parametrize(
    "origin", ["", "page", "http://page/", "http://page/x", "HTTP://Page", "http://a http://b"]
)
def test_an_origin_that_no_browser_sends_is_refused_at_once(origin: str) -> None:
    with pytest.raises(UsageError, match="origin"):
        ServerSettings(allow_origins=(origin,))


def test_names_with_a_port_and_origins_of_extensions_are_taken(server: LiveServer) -> None:
    origins = ("*", "null", "https://[::1]:8", "vscode-webview://abc", "chrome-extension://a1")
    settings = ServerSettings(port=0, allow_hosts=("Box:80", "[fe80::1]"), allow_origins=origins)
    with serve_live(Serving(chat=server.chat), settings) as http:
        for host in ("box", "BOX:99", "[fe80::1]:1"):
            assert http.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("key", [" secret-key", "secret-key ", "    ", "abc", "a\nbcd", ""])
def test_a_key_that_no_header_can_carry_is_refused_at_once(key: str) -> None:
    with pytest.raises(UsageError, match="API key"):
        ServerSettings(api_keys=(key,))


def test_every_answer_has_an_id_that_the_log_has_too(
    server: LiveServer, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ServerSettings(port=0, log="json")
    with serve_live(Serving(chat=server.chat), settings) as http:
        body = {"messages": QUESTION, "max_tokens": 1}
        answers = [
            http.get("/health"),
            http.post(CHAT, json=body),
            http.post(CHAT, json={**body, "stream": True}),
            http.get("/v1/nothing"),
            http.get("/health", headers={"host": "evil.example"}),
        ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert ids == [answer.headers["request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["id"] for line in logged if line["event"] == "request"] == ids


def test_anthropics_errors_name_the_request(server: LiveServer) -> None:
    def check(response: httpx2.Response) -> None:
        found: dict[str, Any] = response.json()
        assert found["type"] == "error"
        assert found["request_id"] == response.headers["request-id"]

    check(server.http.post("/v1/messages", json={"messages": 5}))
    check(server.http.post("/v1/messages", json={}, headers={"host": "evil.example"}))
    check(server.http.get("/v1/messages"))
