"""The commands as a person or a script types them: real processes, real pipes, a real terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from malformed_gguf import MALFORMED

from localmistral.cli import main
from localmistral.engine import Engine
from localmistral.fit.calibration import Calibration, calibration_file, write_calibration
from localmistral.planning import current_machine

SYSTEM = ("--system", "You are a helpful assistant.")
PARIS = ("--temperature", "0", *SYSTEM, "What is the capital of France?")


@pytest.fixture(autouse=True)
def no_models_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty disk, as far as the program looks."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("LOCALMISTRAL_MODELS", raising=False)


def run(
    *arguments: object, stdin: bytes | None = None, timeout_s: float = 240
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "localmistral", *map(str, arguments)]
    if stdin is not None:
        return subprocess.run(command, capture_output=True, timeout=timeout_s, input=stdin)
    return subprocess.run(command, capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def check_refusal(done: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    """One sentence and a hint on stderr, nothing on stdout, no traceback."""
    said = done.stderr.decode()
    assert done.returncode == code, said
    assert done.stdout == b""
    assert said.startswith("error: ")
    assert len(said.splitlines()) <= 2
    assert "Traceback" not in said
    for word in words:
        assert word in said


@pytest.fixture
def check_refused(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Iterator[Callable[..., None]]:
    """As check_refusal(run(...)) in this process: most of a refusal's time is the start."""

    def check(arguments: tuple[object, ...], code: int, *words: str) -> None:
        given = [str(argument) for argument in arguments]
        done = subprocess.CompletedProcess(given, main(given), *capfdbinary.readouterr())
        check_refusal(done, code, *words)

    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield check


# run


def test_the_answer_alone_is_on_stdout_and_the_same_twice(smollm2_path: Path) -> None:
    first = run("run", "-m", smollm2_path, *PARIS)
    assert b"Paris" in first.stdout
    assert (first.returncode, first.stderr) == (0, b"")
    assert run("run", "-m", smollm2_path, *PARIS).stdout == first.stdout


def test_standard_input_is_appended_to_the_prompt(smollm2_path: Path) -> None:
    options = ("run", "-m", smollm2_path, "--temperature", "0", *SYSTEM, "--max-tokens", "20")
    whole = run(*options, "What is the capital\n\nof France?")
    assert run(*options, "What is the capital", stdin=b"of France?\n").stdout == whole.stdout
    only = run(*options, stdin=b"What is the capital\n\nof France?")
    assert only.stdout == whole.stdout


def test_a_file_is_appended_to_the_prompt(smollm2_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("The secret word is banana.", encoding="utf-8")
    done = run("run", "-m", smollm2_path, "--file", path, "--json", "--max-tokens", "2", "Hi")
    alone = run("run", "-m", smollm2_path, "--json", "--max-tokens", "2", "Hi")
    more = json.loads(done.stdout)["usage"]["prompt_tokens"]
    assert more > json.loads(alone.stdout)["usage"]["prompt_tokens"] + 5
    check_refusal(run("run", "-m", smollm2_path, "--file", tmp_path / "none", "Hi"), 2, "none")


def test_the_json_document_holds_the_answer_and_its_numbers(smollm2_path: Path) -> None:
    done = run("run", "-m", smollm2_path, "--json", "--seed", "5", *PARIS)
    document = json.loads(done.stdout)
    assert "Paris" in document["answer"]
    assert document["reasoning"] == ""
    assert document["tool_calls"] == []
    assert (document["finish_reason"], document["seed"]) == ("stop", 5)
    assert document["usage"]["completion_tokens"] > 3
    assert document["timings"]["decode_tokens_per_second"] > 0


def test_statistics_and_remarks_go_to_stderr(smollm2_path: Path) -> None:
    done = run("run", "-m", smollm2_path, "--stats", "--max-tokens", "3", *PARIS)
    assert b"cut after 3 tokens" in done.stderr
    assert b"tokens/s" in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr


def test_a_model_without_the_switch_says_so_once_and_runs(smollm2_path: Path) -> None:
    done = run("run", "-m", smollm2_path, "--effort", "high", *PARIS)
    assert b"Paris" in done.stdout
    assert done.stderr.decode().count("no reasoning switch") == 1


def test_verbose_shows_llama_cpps_log(smollm2_path: Path) -> None:
    done = run("run", "-m", smollm2_path, "--verbose", "--max-tokens", "1", *PARIS)
    assert b"llama_model_loader" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_reader_that_leaves_ends_it_cleanly(smollm2_path: Path, tmp_path: Path) -> None:
    python = f'"{sys.executable}" -m localmistral run -m "{smollm2_path}" --max-tokens 300'
    command = f'{python} "Write a list of a hundred animals." 2>err | head -c 20'
    command += "; code=$?; cat err; exit $code"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
    )
    assert len(done.stdout) == 20
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_ends_run_with_130_and_no_traceback(smollm2_path: Path) -> None:
    import signal

    command = [sys.executable, "-m", "localmistral", "run", "-m", str(smollm2_path)]
    process = subprocess.Popen(
        [*command, "Write a very long story."], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in said


@pytest.fixture
def weather(tmp_path: Path) -> Path:
    path = tmp_path / "weather.json"
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"name": "get_weather", "description": "The weather", "parameters": parameters}
    path.write_text(json.dumps({"type": "function", "function": tool}), encoding="utf-8")
    return path


def test_an_answer_can_be_held_to_a_schema(smollm2_path: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"age": {"type": "integer", "maximum": 120}},'
        ' "required": ["age"], "additionalProperties": false}',
        encoding="utf-8",
    )
    done = run("run", "-m", smollm2_path, "--json-schema", schema, "Invent a person.")
    document = json.loads(done.stdout)
    assert list(document) == ["age"]
    assert document["age"] <= 120


def test_an_answer_can_be_held_to_a_choice(smollm2_path: Path) -> None:
    options = ("--choice", "rouge \u2764", "--choice", "bleu")
    done = run("run", "-m", smollm2_path, *options, "Which colour has the sky?")
    assert done.stdout.decode() in ("rouge \u2764", "bleu")


def test_tools_are_part_of_the_prompt_in_any_of_three_forms(
    smollm2_path: Path, weather: Path, tmp_path: Path
) -> None:
    options = ("run", "-m", smollm2_path, "--json", "--max-tokens", "2", "Hi")
    plain = json.loads(run(*options).stdout)["usage"]["prompt_tokens"]
    tool = json.loads(weather.read_text(encoding="utf-8"))
    for form in (tool, [tool], {"tools": [tool]}, tool["function"]):
        weather.write_text(json.dumps(form), encoding="utf-8")
        done = run(*options, "--tool", weather)
        assert json.loads(done.stdout)["usage"]["prompt_tokens"] > plain + 10


# Wrong input.


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run",), 2, ["prompt is empty"]),
        (("run", "-m", "", "hi"), 2, ["name is empty"]),
        (("run", "-m", "nowhere.gguf", "hi"), 1, ["nowhere.gguf"]),
        (("run", "-m", "smal-4", "hi"), 1, ["smal-4", "small-4"]),
        (("run", "-m", "small-4", "hi"), 1, ["isn't on this disk", "localmistral pull "]),
        (("run", "-m", "small-4:Q99", "hi"), 1, ["Q99", "UD-Q4_K_M"]),
        (("run", "-m", "hf:nothing", "hi"), 2, ["hf:ORG/REPOSITORY"]),
        (("run", "--effort", "banana", "hi"), 2, ["banana", "none, low, medium or high"]),
        (("run", "--temperature", "-1", "hi"), 2, ["--temperature is -1"]),
        (("run", "--temperature", "nan", "hi"), 2, ["temperature"]),
        (("run", "--seed", "99999999999", "hi"), 2, ["seed", "4294967294"]),
        (("run", "--seed", "x", "hi"), 2, ["--seed"]),
        (("run", "--max-tokens", "0", "hi"), 2, ["--max-tokens is 0"]),
        (("run", "--context", "lots", "hi"), 2, ["lots", "32k"]),
        (("run", "--context", "0", "hi"), 2, ["whole number"]),
        (("run", "--kv-type", "q9", "hi"), 2, ["q9", "q8_0"]),
        (("run", "--tensor-split", "a,b", "hi"), 2, ["3,1"]),
        (("run", "--threads", "-2", "hi"), 2, ["--threads is -2"]),
        (("run", "--threads", "100000", "hi"), 2, ["--threads", "512"]),
        (("run", "--gpu-layers", "-5", "hi"), 2, ["--gpu-layers", "-5"]),
        (("run", "-m", "x" * 5000, "hi"), 1, ["xxx"]),
        (("run", "-m", "demo", "--quant", "Q4_K_M", "hi"), 2, ["--quant", "demo"]),
        (("run", "-m", "small-4:Q4_K_M", "--quant", "Q8_0", "hi"), 2, ["--quant"]),
        (("run", "--choice", "", "hi"), 2, ["--choice is empty"]),
        (("run", "--nope", "hi"), 2, ["--nope", "run --help"]),
        (("run", "--thinking-budget", "0", "hi"), 2, ["at least 1", "--effort none"]),
        (("run", "--tool", "nowhere.json", "hi"), 2, ["nowhere.json"]),
        (("run", "--json-schema", "nowhere.json", "hi"), 2, ["nowhere.json"]),
        (("run", "--json-schema", "x", "--choice", "y", "hi"), 2, ["Use one of them"]),
        (("run", "one", "two"), 2, ["two"]),
        (("chat", "small-4", "-m", "other"), 2, ["small-4", "other"]),
        (("bogus",), 2, ["bogus", "--help"]),
    ],
)
def test_wrong_input_gets_one_sentence(
    check_refused: Callable[..., None], arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    check_refused(arguments, code, *words)


def test_text_that_is_not_utf8_is_refused_with_its_place(smollm2_path: Path) -> None:
    done = run("run", "-m", smollm2_path, "Hi", stdin=b"abc\xff")
    check_refusal(done, 2, "Byte 3", "0xff")


def test_a_prompt_over_the_context_names_both_counts(smollm2_path: Path) -> None:
    done = run("run", "-m", smollm2_path, "--context", "256", stdin=b"word " * 1000)
    check_refusal(done, 1, "tokens, the context holds 256", "--context")


def test_a_context_over_the_models_limit_names_it(smollm2_path: Path) -> None:
    check_refusal(run("run", "-m", smollm2_path, "--context", "1M", "hi"), 1, "8,192", "--context")


# Plans


@pytest.fixture(scope="module")
def demo_plan() -> bytes:
    return run("plan", "-m", "demo", "--context", "512", "--json").stdout


@pytest.fixture
def plan_file(tmp_path: Path, demo_plan: bytes) -> Path:
    """The demo model's plan, as a shell would have saved it."""
    path = tmp_path / "plan.json"
    path.write_bytes(demo_plan)
    return path


def test_the_plan_that_is_shown_is_the_plan_that_is_run(smollm2_path: Path) -> None:
    shown = json.loads(run("plan", smollm2_path, "--context", "2k", "--json").stdout)
    done = run("run", "-m", smollm2_path, "--context", "2k", "--verbose", "--max-tokens", "1", "Hi")
    said = done.stderr.decode()
    stable = [reason for reason in shown["reasons"] if "GiB" not in reason]  # of RAM, at the time
    assert len(stable) > 1
    for reason in stable:
        assert reason in said
    assert re.search(rf"n_ctx += {shown['context']}\b", said)
    assert re.search(rf"n_ubatch += {shown['ubatch']}\b", said)


def test_a_saved_plan_is_run(plan_file: Path) -> None:
    done = run("run", "--plan", plan_file, "--json", "--effort", "high", "What is 31 + 46?")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "77" in json.loads(done.stdout)["answer"]
    long = run("run", "--plan", plan_file, stdin=b"word " * 1000)
    check_refusal(long, 1, "the context holds 512")


@pytest.mark.parametrize(
    "more",
    [
        ("run", "-m", "demo", "hi"),
        ("run", "--quant", "Q8_0", "hi"),
        ("run", "--context", "1k", "hi"),
        ("run", "--threads", "0", "hi"),
        ("run", "--cpu-experts", "none", "hi"),
        ("chat", "demo"),
        ("chat", "--kv-type", "f16"),
        ("serve", "--parallel", "2"),
        ("bench", "demo"),
        ("bench", "--ubatch", "512"),
    ],
)
def test_a_saved_plan_bears_no_knob_beside_it(
    check_refused: Callable[..., None], plan_file: Path, more: tuple[str, ...]
) -> None:
    command, *rest = more
    check_refused((command, "--plan", plan_file, *rest), 2, "finished plan", "Leave one of")


def test_a_plan_that_can_not_be_replayed_says_why(plan_file: Path, tmp_path: Path) -> None:
    plan = json.loads(plan_file.read_bytes())
    gone = {**plan, "files": [{**plan["files"][0], "path": str(tmp_path / "gone.gguf")}]}
    cards = {**plan, "gpu_layers": 5, "tensor_split": [2, 3]}
    cards["devices"] = [{**plan["devices"][-1], "name": name} for name in ("A", "B", "CPU")]
    documents = {
        "gone.gguf": json.dumps(gone), "JSON": "{", "plan of localmistral": '{"a": 1}',
        "cards": json.dumps(cards), "context": json.dumps({**plan, "context": -1}),
    }  # fmt: skip
    for word, text in documents.items():
        plan_file.write_text(text, encoding="utf-8")
        check_refusal(run("run", "--plan", plan_file, "hi"), 1, word, "localmistral ")
    check_refusal(run("run", "--plan", tmp_path / "none.json", "hi"), 1, "none.json")


def test_doctor_tells_whether_the_last_load_went_as_planned(smollm2_path: Path) -> None:
    def look() -> dict[str, str]:
        checks = json.loads(run("doctor", "--json").stdout)
        rows = checks["checks"] if isinstance(checks, dict) else checks
        return next(row for row in rows if row["name"] == "last load")

    assert "No load" in look()["message"]
    run("run", "-m", smollm2_path, "--max-tokens", "1", "Hi")
    after = look()
    assert (after["status"], after["message"]) == ("ok", "The last load took what was planned.")


def test_a_slow_model_is_announced_and_the_answer_stays_alone(smollm2_path: Path) -> None:
    machine = replace(current_machine(), gpus=())
    write_calibration(Calibration(ram_decode=20.0), machine, calibration_file())
    done = run("run", "-m", smollm2_path, "--max-tokens", "2", "Hi")
    note, _ = done.stderr.decode().splitlines()  # the other says where it was cut
    assert "tokens/s here" in note and "localmistral plan" in note
    assert done.returncode == 0 and done.stdout


def test_debug_shows_the_traceback() -> None:
    done = run("run", "--debug", "-m", "nowhere.gguf", "hi")
    assert done.returncode == 1
    assert b"Traceback" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MALFORMED)[::6])
def test_a_malformed_file_ends_with_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(MALFORMED[name])
    check_refusal(run("run", "-m", path, "hi"), 1, "bad.gguf")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_truncated_model_ends_with_one_sentence(
    smollm2_path: Path, tmp_path: Path, share: float
) -> None:
    data = smollm2_path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    check_refusal(run("run", "-m", path, "hi"), 1, "cut.gguf")


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "small-4.gguf"
    script = Path(__file__).parent.parent / "scripts" / "make_header_gguf.py"
    subprocess.run(
        [sys.executable, script, path, "--model", "small-4", "--quant", "q8_0"],
        check=True,
        capture_output=True,
    )
    if psutil.virtual_memory().total > path.stat().st_size or Engine.has_gpu():
        pytest.skip("this machine can hold it")
    check_refusal(run("run", "-m", path, "hi"), 1, "CPU needs 1", "GiB", "too little by")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "code"), [(">/dev/full", 1), (">&-", 0), ("2>/dev/full", 0), ("<&-", 0)]
)
def test_streams_that_are_full_or_closed_are_no_defect(redirection: str, code: int) -> None:
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    python = f'"{sys.executable}" -m localmistral'
    command = f'{python} run -m demo --stats "Hello" {redirection}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"defect" not in done.stderr


def test_a_long_prompt_is_answered_alike_whatever_else_runs(
    smollm2_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("A cat sat on the mat and looked at the sea. " * 90, encoding="utf-8")
    command = ("run", "-m", smollm2_path, "--temperature", "0", "--max-tokens", "60")
    quiet = run(*command, "--file", path, "Summarise:").stdout
    hogs = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(3)]
    try:
        assert run(*command, "--file", path, "Summarise:").stdout == quiet
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


# The other commands.


def test_version_and_help_answer() -> None:
    assert run("--version").stdout.startswith(b"localmistral ")
    shown = run("--help").stdout.decode()
    for command in ("run", "chat", "models", "list"):
        assert f"  {command}" in shown
    for option in ("--model", "--effort", "--hide-thinking", "--context", "--json"):
        assert option in run("run", "--help").stdout.decode()


def test_alone_it_says_what_this_is_and_how_to_start(smollm2_path: Path) -> None:
    shown = run().stdout.decode()
    assert "RAM" in shown
    assert "none on this disk" in shown
    assert shown.count("localmistral ") >= 3


def test_models_lists_the_catalogue() -> None:
    assert "mistral-small-4" in run("models").stdout.decode()
    document = json.loads(run("models", "--json").stdout)
    assert any("small-4" in model["aliases"] for model in document)


def test_list_shows_what_is_on_disk_and_run_takes_the_only_one(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    os.link(smollm2_path, folder / "SmolLM2.Q4_1.gguf") if _same_disk(smollm2_path, folder) else (
        folder / "SmolLM2.Q4_1.gguf"
    ).write_bytes(smollm2_path.read_bytes())
    monkeypatch.setenv("LOCALMISTRAL_MODELS", str(folder))
    (entry,) = json.loads(run("list", "--json").stdout)
    assert (entry["quant"], entry["complete"]) == ("Q4_1", True)
    assert "complete" in run("list").stdout.decode()
    assert b"Paris" in run("run", *PARIS).stdout


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def test_without_any_model_the_demo_answers_and_says_so() -> None:
    done = run("run", "--effort", "high", "--json", "What is 31 + 46?")
    document = json.loads(done.stdout)
    assert document["model"] == "demo"
    assert document["reasoning"]
    assert "77" in document["answer"]
    assert "toy" in done.stderr.decode()


def test_a_tools_call_is_one_line_of_json(weather: Path) -> None:
    done = run("run", "-m", "demo", "--tool", weather, "What is the weather in Oslo?")
    assert json.loads(done.stdout) == {"name": "get_weather", "arguments": {"city": "Oslo"}}


def test_an_empty_list_is_an_empty_document() -> None:
    assert json.loads(run("list", "--json").stdout) == []
