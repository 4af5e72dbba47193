"""A server's life as a process: ports, loading, signals, draining, its log."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from server_process import (
    COMMAND,
    TIMEOUT_S,
    ServerProcess,
    connect,
    count_answers,
    launch,
    make_environ,
    run,
)

from localmistral.errors import LocalMistralError
from localmistral.server.running import _Signals, bind
from localmistral.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
LONG = {
    "messages": [{"role": "user", "content": "Write a very long story."}],
    "max_tokens": 3000,
    "ignore_eos": True,
}
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


def serve_to_the_end(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "serve", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL, env=make_environ(home),
    )  # fmt: skip


def port_of(server: ServerProcess) -> int:
    return int(server.url.rpartition(":")[2])


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def wait_until_running(server: ServerProcess, count: int) -> None:
    """Wait until so many answers are under way."""
    deadline = time.monotonic() + TIMEOUT_S
    with connect(server) as http:
        while time.monotonic() < deadline:
            if f"localmistral_running {count:.1f}" in http.get("/metrics").text:
                return
    raise AssertionError(f"never {count} at once")


class LongStream:
    """A long answer, read on a thread; `text` is what came, `error` why it broke off."""

    def __init__(self, server: ServerProcess, **fields: Any) -> None:
        self.lines: list[str] = []
        self.status = 0
        self.error: Exception | None = None
        self.begun = threading.Event()
        self._http = connect(server)
        self._body = {**LONG, "stream": True, **fields}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            with self._http, self._http.stream("POST", CHAT, json=self._body) as response:
                self.status = response.status_code
                for line in response.iter_lines():
                    self.lines.append(line)
                    if len(self.lines) > 4:
                        self.begun.set()
        except httpx2.HTTPError as error:
            self.error = error

    def wait_until_begun(self) -> None:
        assert self.begun.wait(TIMEOUT_S)

    def wait(self) -> list[str]:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return [line.removeprefix("data: ") for line in self.lines if line]


def test_a_taken_port_is_an_error_before_anything_is_loaded(
    tmp_path: Path, smollm2_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve_to_the_end(tmp_path, "-m", smollm2_path, "--port", str(port), "--verbose")
    assert done.returncode == 1
    assert f"Port {port} of 127.0.0.1 is in use" in done.stderr
    assert f"--port {port + 1}" in done.stderr
    assert "llama_model_loader" not in done.stderr
    assert done.stdout == ""


def test_while_it_loads_the_server_says_how_far_it_is(tmp_path: Path, smollm2_path: Path) -> None:
    with launch(tmp_path, "-m", smollm2_path, is_ready=False) as server, connect(server) as http:
        refused = http.post(CHAT, json={**LONG, "max_tokens": 1})
        health = [http.get("/health")]
        while health[-1].status_code == 503:
            health.append(http.get("/health"))
        assert (refused.status_code, health[0].status_code) == (503, 503)
        assert "loading" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        shares = [answer.json()["progress"] for answer in health[:-1]]
        assert all(answer.json()["status"] == "loading" for answer in health[:-1])
        assert shares == sorted(shares)
        assert health[-1].json() == {"status": "ok"}
        assert http.post(CHAT, json={**LONG, "max_tokens": 1}).status_code == 200


def test_one_line_says_where_what_and_how_much_context(tmp_path: Path) -> None:
    options = ("demo", "--context", "1k", "--parallel", "3")
    with launch(tmp_path, *options, log="off") as server:
        deadline = time.monotonic() + TIMEOUT_S
        while "\n" not in server.said() and time.monotonic() < deadline:
            time.sleep(0.02)
        url = server.said().split()[0]
        assert url.startswith("http://127.0.0.1:")
        with httpx2.Client(base_url=url.removesuffix("/v1"), timeout=TIMEOUT_S) as http:
            model = http.get("/v1/models").json()["data"][0]
            assert http.get("/health?secret=1").status_code == 200
        assert (model["id"], model["parallel"], model["max_model_len"]) == ("demo", 3, 1024)
        assert model["plan"]["devices"]
        assert server.said().count("\n") == 1  # requests are not logged unless asked for
        assert "demo" in server.said()
        assert "1,024" in server.said() or "1k" in server.said()


@posix_only
def test_sigterm_lets_answers_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    with launch(tmp_path, "demo") as server:
        stream = LongStream(server, max_tokens=1500)
        whole = LongStream(server, max_tokens=1500, stream=False)
        stream.wait_until_begun()
        wait_until_running(server, 2)
        server.signal(signal.SIGTERM)
        assert server.wait_for("stopping")["answers"] >= 1
        with connect(server) as http:
            try:
                refused = http.post(CHAT, json=LONG).status_code
            except httpx2.TransportError:
                refused = 503
        assert refused == 503
        lines = stream.wait()
        assert lines[-1] == "[DONE]"
        assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
        assert json.loads("".join(whole.wait()))["usage"]["completion_tokens"] == 1500
        assert server.wait() == 0
        assert is_free(port_of(server))
        assert not list(tmp_path.rglob("servers/*"))
        assert server.events()[-1]["event"] == "stopped"


@posix_only
def test_answers_that_take_too_long_are_cut_with_an_error(
    tmp_path: Path, smollm2_path: Path
) -> None:
    with launch(tmp_path, "-m", smollm2_path, "--drain", "1", "--parallel", "2") as server:
        stream = LongStream(server)
        whole = LongStream(server, stream=False)
        stream.wait_until_begun()
        wait_until_running(server, 2)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        lines = stream.wait()
        assert "shutting down" in json.loads(lines[-1])["error"]["message"]
        assert "[DONE]" not in lines
        assert "shutting down" in json.loads("".join(whole.wait()))["error"]["message"]
        assert (stream.error, whole.error, whole.status) == (None, None, 503)
        assert "Traceback" not in server.said()


@posix_only
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(
    tmp_path: Path, smollm2_path: Path, second: int
) -> None:
    with launch(tmp_path, "-m", smollm2_path, "--drain", "3600") as server:
        stream = LongStream(server)
        stream.wait_until_begun()
        server.signal(signal.SIGTERM)
        server.wait_for("stopping")
        server.signal(second)
        assert server.wait() == 1
        assert "[DONE]" not in stream.wait()


@posix_only
def test_ctrl_c_ends_the_server_with_130(tmp_path: Path) -> None:
    with launch(tmp_path, "demo") as server:
        server.signal(signal.SIGINT)
        assert server.wait() == 130
        assert is_free(port_of(server))
        assert [line["event"] for line in server.events()][-2:] == ["stopping", "stopped"]


@posix_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_load(tmp_path: Path, smollm2_path: Path, number: int, code: int) -> None:
    with launch(tmp_path, "-m", smollm2_path, is_ready=False) as server:
        server.signal(number)
        assert server.wait() == code
        assert "ready" not in [line["event"] for line in server.events()]


@posix_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_before_the_load_keeps_it_from_beginning(number: int, code: int) -> None:
    with _Signals() as signals:
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt), signals.raised():
            pytest.fail("the load has begun")
    assert signals.exit_code == code


def test_a_load_that_fails_ends_the_server_with_its_sentence(
    tmp_path: Path, smollm2_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_path.read_bytes()[: 1 << 20])
    done = serve_to_the_end(tmp_path / "home", "-m", cut, "--port", "0")
    loaded = subprocess.run(
        [*COMMAND, "run", "-m", str(cut), "x"], capture_output=True, encoding="utf-8",
        timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, env=make_environ(tmp_path),
    )  # fmt: skip
    assert (done.returncode, loaded.returncode) == (1, 1)
    assert done.stderr == loaded.stderr
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.rglob("servers/*"))
    logged = serve_to_the_end(tmp_path / "home", "-m", cut, "--port", "0", "--log", "json")
    events = [json.loads(line) for line in logged.stderr.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events] == ["listening", "failed", "stopped"]
    assert events[1]["message"] in done.stderr


@posix_only
def test_a_client_that_never_reads_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with launch(tmp_path, "demo", "--drain", "1", "--parallel", "8") as server:
        with socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            link.connect(("127.0.0.1", port_of(server)))
            body = json.dumps({**LONG, "n": 8, "stream": True}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until_running(server, 8)
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
        assert "Traceback" not in server.said()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--drain", "-1"], "--drain"),
        (["--drain", "nan"], "--drain"),
        (["--log", "xml"], "--log"),
        (["--port", "70000"], "--port"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["--api-key", "abc"], "API key"),
        (["--api-key", " padded "], "API key"),
        (["--allow-host", "http://box"], "--allow-host"),
        (["--allow-origin", "http://page/"], "--allow-origin"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path: Path, options: list[str], word: str) -> None:
    done = serve_to_the_end(tmp_path, "demo", "--port", "0", *options)
    assert done.returncode == 2
    assert word in done.stderr


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a..b", "x" * 80])
def test_a_host_that_cannot_be_had_is_one_sentence(tmp_path: Path, host: str) -> None:
    done = serve_to_the_end(tmp_path, "demo", "--host", host, "--api-key", "a-key")
    assert done.returncode == 1
    assert host in done.stderr
    assert "--host 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_last_port_taken_has_no_next_one() -> None:
    with socket.create_server(("127.0.0.1", 65_535)), pytest.raises(LocalMistralError) as caught:
        bind(ServerSettings(port=65_535))
    assert caught.value.hint.endswith("--port 65534")


def test_a_name_of_either_kind_of_address_is_listened_on() -> None:
    for host, family in (("localhost", socket.AF_INET), ("::1", socket.AF_INET6)):
        bound, settings = bind(ServerSettings(host=host, port=0))
        with bound:
            assert bound.family == family
            assert str(settings.port) in settings.url


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_low_limit_of_files_is_raised(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with launch(tmp_path, "demo") as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            with contextlib.ExitStack() as links, connect(server) as http:
                for _ in range(400):
                    links.enter_context(socket.create_connection(("127.0.0.1", port_of(server))))
                assert http.get("/health").status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_keys_come_from_the_environment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALMISTRAL_API_KEY", "key-of-the-environment")
    with launch(tmp_path, "demo", "--host", "::1") as server, connect(server) as http:
        assert server.url.startswith("http://[::1]:")
        assert http.get("/v1/models").status_code == 401
        key = {"x-api-key": "key-of-the-environment"}
        assert http.get("/v1/models", headers=key).status_code == 200
        done = run(tmp_path, "-m", "demo", "What is 1 + 1?", "--max-tokens", "2")
        assert done.returncode == 0, done.stderr
        http.headers.update(key)
        assert count_answers(http) == 1
        assert "key-of-the-environment" not in server.said()


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with launch(tmp_path_factory.mktemp("keyed"), "demo", "--api-key", "secret-key-1") as server:
        yield server


def test_the_log_is_json_and_tells_no_secrets(keyed: ServerProcess) -> None:
    with connect(keyed, headers={"authorization": "Bearer secret-key-1"}) as http:
        body = {"messages": [{"role": "user", "content": "my-own-words"}], "max_tokens": 1}
        assert http.post(f"{CHAT}?token=in-the-query", json=body).status_code == 200
        assert http.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert http.get("/no/such/path").status_code == 404
        assert http.post(CHAT, json={**body, "model": "other-words"}).status_code == 404
    requests = [line for line in keyed.events() if line["event"] == "request"]
    assert {(line["method"], line["path"], line["status"]) for line in requests} >= {
        ("POST", CHAT, 200), ("GET", "/v1/models", 401),
        ("GET", "/no/such/path", 404), ("POST", CHAT, 404),
    }  # fmt: skip
    assert all(line["seconds"] >= 0 and line["time"] and line["client"] for line in requests)
    for secret in ("secret", "my-own-words", "in-the-query", "wrong", "other-words"):
        assert secret not in keyed.said()


def test_the_log_as_text_has_a_line_a_request(tmp_path: Path) -> None:
    with launch(tmp_path, "demo", log="text") as server:
        deadline = time.monotonic() + TIMEOUT_S
        while " ready " not in server.said() and time.monotonic() < deadline:
            time.sleep(0.02)
        url = next(w for w in server.said().split() if w.startswith("url="))[5:-1]
        assert httpx2.get(f"{url}/health", timeout=TIMEOUT_S).status_code == 200
        assert ' request client="127.0.0.1" method="GET" path="/health" status=200' in re.sub(
            r' id="\w+"', "", server.said()
        )


# The page


def test_the_page_says_how_to_use_the_server(keyed: ServerProcess) -> None:
    with connect(keyed) as http:
        page = http.get("/")
        head = http.head("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert f"{keyed.url}/v1" in page.text
    assert "model=&quot;demo&quot;" in page.text
    assert "secret-key-1" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert (head.status_code, head.text) == (200, "")
    assert head.headers["content-length"] == page.headers["content-length"]


def test_the_pages_snippet_runs(tmp_path: Path) -> None:
    import html

    with launch(tmp_path, "demo") as server, connect(server) as http:
        found = re.search(r"<pre>(.*?)</pre>", http.get("/").text, re.S)
        assert found is not None
        snippet = html.unescape(found[1])
        command = [sys.executable, "-c", snippet]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_page_loads_nothing_and_its_style_is_the_one_that_is_allowed() -> None:
    import base64
    import hashlib
    from importlib import resources

    from live_server import serve_live

    from localmistral.server.serving import Serving

    source = resources.files("localmistral.server").joinpath("page.html").read_text("utf-8")
    assert not re.search(r"<script|<img|<link|@import|\bsrc=|url\(|\son\w+=|\sstyle=", source)
    with serve_live(Serving()) as http:
        page = http.get("/", headers={"host": "localhost:80"})
    style = page.text.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page.headers["content-security-policy"]
    assert "still loading (0%)" in page.text
