"""`localmistral run` beside a server that has the model: used, and no different but in speed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

from localmistral.engine.specs import Choice, Gbnf, JsonObject, JsonSchema, Lark, Regex
from localmistral.errors import BadRequestError, ContextOverflowError, LocalMistralError
from localmistral.server.wire import decode_error, decode_spec, encode_error, encode_spec

KEY = "secret-key-1"
QUESTION = ("-m", "demo", "What is 31 + 46?", "--temperature", "0", "--seed", "5")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[ServerProcess]:
    with launch(home, "demo", "--api-key", KEY, "--context", "2048") as server:
        yield server


def answers_of(server: ServerProcess) -> int:
    with connect(server, headers={"x-api-key": KEY}) as http:
        return count_answers(http)


def run_both(
    home: Path, server: ServerProcess, *arguments: str | Path, **options: Any
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """The same command answered by the server and by a load of its own."""
    before = answers_of(server)
    asked = run(home, *arguments, **options)
    assert asked.returncode or answers_of(server) == before + 1
    loaded = run(home, *arguments, "--context", "2048", "--no-server", **options)
    return asked, loaded


def without_times(text: str) -> Any:
    document = json.loads(text)
    timings = document.pop("timings")
    assert all(isinstance(value, float) for value in timings.values())
    document["usage"].pop("cached_tokens")  # the server has answered before
    return document, set(timings)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tool = {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [77, 78]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    (folder / "tool.json").write_text(json.dumps(tool), encoding="utf-8")
    (folder / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    (folder / "loop.json").write_text('{"$ref": "#"}', encoding="utf-8")
    (folder / "text.txt").write_text("größer als 🦆", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--effort", "high", "--show-thinking"),
        ("--effort", "high", "--thinking-budget", "3"),
        ("--effort", "none", "--hide-thinking"),
        ("--system", "Be brief."),
        ("--max-tokens", "3"),
        ("--file", "{files}/text.txt"),
        ("--choice", "yes", "--choice", "größer"),
        ("--json-schema", "{files}/schema.json"),
        ("--tool", "{files}/tool.json"),
    ],
    ids=lambda options: " ".join(options[:1]) or "plain",
)
def test_the_answer_is_the_same_as_from_a_load_of_its_own(
    home: Path, server: ServerProcess, files: Path, options: tuple[str, ...]
) -> None:
    given = [option.format(files=files) for option in options]
    asked, loaded = run_both(home, server, *QUESTION, *given, "--json")
    assert (asked.returncode, loaded.returncode) == (0, 0), asked.stderr + loaded.stderr
    assert without_times(asked.stdout) == without_times(loaded.stdout)
    assert asked.stderr == loaded.stderr
    asked, loaded = run_both(home, server, *QUESTION, *given, "--stats")
    assert asked.stdout == loaded.stdout
    figures = re.compile(r"[\d.,]+")
    strip = [figures.sub("#", re.sub(r" \(.*cached\)", "", d.stderr)) for d in (asked, loaded)]
    assert strip[0] == strip[1]


def test_standard_input_reaches_the_server(home: Path, server: ServerProcess) -> None:
    asked, loaded = run_both(home, server, "-m", "demo", "--temperature", "0", input="What is 2+2?")
    assert asked.stdout == loaded.stdout
    assert asked.stdout


def test_a_call_comes_out_the_same(home: Path, server: ServerProcess, files: Path) -> None:
    weather = ("-m", "demo", "What is the weather in Oslo?", "--temperature", "0")
    asked, loaded = run_both(home, server, *weather, "--tool", files / "tool.json")
    assert json.loads(asked.stdout)["name"] == "get_weather"
    assert asked.stdout == loaded.stdout


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("word " * 3000,), 1),
        (("x", "--json-schema", "{files}/loop.json"), 1),
        (("x", "--json-schema", "{files}/missing.json"), 2),
        (("x", "--temperature", "-1"), 2),
        (("x", "--seed", "-3"), 2),
        (("x", "--effort", "extreme"), 2),
        (("x", "--thinking-budget", "0"), 2),
        (("x", "--choice", "a\0b"[:1], "--json-schema", "{files}/schema.json"), 2),
        (("",), 2),
    ],
    ids=lambda value: " ".join(map(str, value))[:30] if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_in_the_same_words(
    home: Path, server: ServerProcess, files: Path, options: tuple[str, ...], code: int
) -> None:
    given = [option.format(files=files) for option in options]
    asked, loaded = run_both(home, server, "-m", "demo", *given)
    assert (asked.returncode, asked.stdout, asked.stderr) == (code, "", loaded.stderr)
    assert loaded.returncode == code
    assert asked.stderr.startswith("error: ")


def test_without_a_name_the_served_model_answers(home: Path, server: ServerProcess) -> None:
    before = answers_of(server)
    done = run(home, "What is 1 + 1?", "--max-tokens", "2")
    assert (done.returncode, done.stderr) == (0, "(cut after 2 tokens, as --max-tokens says)\n")
    assert answers_of(server) == before + 1


@pytest.mark.parametrize(
    "options",
    [
        ("--no-server",),
        ("--context", "1024"),
        ("--kv-type", "q8_0"),
        ("--threads", "1"),
        ("--gpu-layers", "0"),
        ("--chat-template", "embedded"),
        ("--verbose",),
    ],
)
def test_wishes_for_the_load_make_it_load(
    home: Path, server: ServerProcess, options: tuple[str, ...]
) -> None:
    before = answers_of(server)
    done = run(home, "-m", "demo", "What is 1 + 1?", "--max-tokens", "1", *options)
    assert done.returncode == 0, done.stderr
    assert answers_of(server) == before


def test_another_model_is_loaded(home: Path, server: ServerProcess, smollm2_path: Path) -> None:
    before = answers_of(server)
    done = run(home, "-m", smollm2_path, "Hello", "--max-tokens", "1", "--json")
    assert json.loads(done.stdout)["model"] == str(smollm2_path)
    assert answers_of(server) == before


def test_of_two_servers_the_one_with_the_model_answers(
    home: Path, server: ServerProcess, smollm2_path: Path
) -> None:
    with launch(home, "-m", smollm2_path) as other:
        before = answers_of(server), answers_of(other)
        done = run(home, "-m", smollm2_path, "Hello", "--max-tokens", "1")
        assert done.returncode == 0, done.stderr
        assert (answers_of(server), answers_of(other)) == (before[0], before[1] + 1)
        unclear = run(home, "Hello")
        assert unclear.returncode == 2
        assert "2 are being served" in unclear.stderr


def test_a_server_that_was_killed_is_forgotten(tmp_path: Path) -> None:
    with launch(tmp_path, "demo") as killed:
        assert len(list(tmp_path.rglob("servers/*.json"))) == 1
        killed.process.kill()
        killed.process.wait()
        done = run(tmp_path, *QUESTION)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        assert list(tmp_path.rglob("servers/*.json")) == []


def wait_until_idle(server: ServerProcess) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    with connect(server) as http:
        while time.monotonic() < deadline:
            if "localmistral_running 0.0" in http.get("/metrics").text:
                return
            time.sleep(0.05)
    raise AssertionError("still busy")


def begin_long_answer(home: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*COMMAND, "run", "Write a very long story about a duck."], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=make_environ(home),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(3)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_cancels_the_servers_work(tmp_path: Path, smollm2_path: Path) -> None:
    with launch(tmp_path, "-m", smollm2_path) as server:
        process = begin_long_answer(tmp_path)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 130
        assert said == b""
        wait_until_idle(server)
        with connect(server) as http:
            assert (
                'localmistral_requests_total{outcome="cancelled"} 1.0' in http.get("/metrics").text
            )


def test_a_server_that_dies_midway_is_an_error(tmp_path: Path, smollm2_path: Path) -> None:
    with launch(tmp_path, "-m", smollm2_path) as server:
        process = begin_long_answer(tmp_path)
        server.process.kill()
        _, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert b"has gone before its answer ended" in said
        assert b"--no-server" in said


def test_asking_a_server_loads_no_engine(home: Path, server: ServerProcess) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "localmistral", "run", *QUESTION]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL, env=make_environ(home),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    times = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[1].strip() for line in times}
    assert "localmistral.server.client" in loaded
    heavy = {"llama_cpp", "llguidance", "huggingface_hub", "fastapi", "uvicorn", "jinja2"}
    assert {name.split(".")[0] for name in loaded}.isdisjoint(heavy)


def test_the_private_routes_ask_for_a_key_and_stay_out_of_the_documents(
    server: ServerProcess,
) -> None:
    with connect(server) as http:
        assert http.post("/local/stream", json={"messages": []}).status_code == 401
        assert "proof" not in http.get("/local/proof").text
        with connect(server, headers={"x-api-key": KEY}) as keyed:
            assert "/local" not in keyed.get("/openapi.json").text
            odd = {"messages": "x", "output": {"Nothing": {}}}
            bodies: list[Any] = [{}, [], {"messages": []}, odd]
            for body in bodies:
                assert keyed.post("/local/stream", json=body).status_code == 400


def test_the_environment_can_refuse_servers(home: Path, server: ServerProcess) -> None:
    before = answers_of(server)
    environ = {**make_environ(home), "LOCALMISTRAL_NO_SERVER": "1"}
    command = [*COMMAND, "run", *QUESTION]
    done = subprocess.run(
        command, capture_output=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, env=environ
    )
    assert done.returncode == 0
    assert answers_of(server) == before
    assert os.environ["LOCALMISTRAL_NO_SERVER"] == "1"  # or every other test would use servers


# What goes over the wire


@pytest.mark.parametrize(
    "spec",
    [
        None,
        JsonSchema(schema={"type": "object", "größe": ['"', None, 1.5]}, strict=False),
        JsonObject(whitespace="compact"),
        Regex(pattern="\\d+\ud800"),
        Lark(grammar="start: /a/", lenient=True),
        Choice(options=("a", "🦆")),
        Gbnf(grammar='root ::= "a"'),
    ],
)
def test_what_an_answer_has_to_look_like_arrives_as_it_was(spec: Any) -> None:
    assert decode_spec(json.loads(json.dumps(encode_spec(spec)))) == spec


@pytest.mark.parametrize(
    "error",
    [
        LocalMistralError("One.", "Two."),
        ContextOverflowError("Long.", "Cut.", param="messages"),
        BadRequestError("Bad."),
    ],
)
def test_errors_arrive_as_they_were(error: LocalMistralError) -> None:
    found = decode_error(json.loads(json.dumps(encode_error(error))))
    assert type(found) is type(error)
    assert encode_error(found) == encode_error(error)


@pytest.mark.parametrize("name", ["", "Exception", "annotations", "__doc__", "os"])
def test_a_class_that_is_no_error_of_ours_is_a_plain_one(name: str) -> None:
    assert type(decode_error({"class": name, "message": "x"})) is LocalMistralError


def test_the_engines_names_all_have_a_home() -> None:
    from localmistral import engine

    assert all(getattr(engine, name) is not None for name in engine.__all__)
    with pytest.raises(AttributeError):
        getattr(engine, "nothing_of_that_name")  # noqa: B009
