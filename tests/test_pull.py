"""`localmistral pull` as a person or a script types it, against a real server on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf_writer import tiny_llama
from hub import Fault, Hub, Stored, running_hub
from huggingface_hub import scan_cache_dir
from sample_repositories import (
    NEMO,
    SMALL_4,
    STEM,
    check_refusal,
    files_below,
    isolate,
    nemo,
    run_cli,
    shard_path,
    small_4,
    weights,
)

BIG = "big/Big-GGUF"
PATH = "Big-Q4_K_M.gguf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        isolate(monkeypatch, tmp_path, hub.endpoint)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


def folder_of(cache: Path, repository: str) -> Path:
    return cache / f"models--{repository.replace('/', '--')}"


def big(size: int = 8 << 20) -> bytes:
    """A tiny model with random bytes behind its weights, which nobody minds."""
    return weights(tiny_llama()) + os.urandom(size)


# Shells start what runs in the background with SIGINT ignored, and tests may run so.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from localmistral.__main__ import main; main()"
)


def start_cli(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def wait_until(is_true: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def listed() -> list[dict[str, object]]:
    done = run_cli("list", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert isinstance(rows, list)
    return rows


def check_cache(cache: Path) -> None:
    """The Hub's library reads the cache without a complaint."""
    assert list(scan_cache_dir(cache).warnings) == []


def test_a_sharded_quant_arrives_whole_and_where_other_programs_look(hub: Hub, cache: Path) -> None:
    commit = hub.publish(SMALL_4, small_4())
    done = run_cli("pull", "small-4:UD-Q4_K_XL", "--yes")
    assert done.returncode == 0, done.stderr
    snapshot = folder_of(cache, SMALL_4) / "snapshots" / commit
    assert done.stdout == f"{snapshot / shard_path('UD-Q4_K_XL', 1)}\n"
    expected = [*(shard_path("UD-Q4_K_XL", n) for n in (1, 2, 3)), "mmproj-F16.gguf"]
    assert files_below(snapshot) == sorted(expected)
    for path in expected:
        assert (snapshot / path).read_bytes() == small_4()[path].content
    (repository,) = scan_cache_dir(cache).repos
    (revision,) = repository.revisions
    assert (repository.repo_id, revision.commit_hash) == (SMALL_4, commit)
    assert revision.refs == {"main"}
    check_cache(cache)
    (row,) = listed()
    assert (row["name"], row["complete"]) == ("mistral-small-4:UD-Q4_K_XL", True)


def test_the_size_is_said_and_without_a_yes_a_script_is_told_what_to_type(
    hub: Hub, cache: Path
) -> None:
    hub.publish(SMALL_4, small_4())
    done = run_cli("pull", "small-4:UD-Q4_K_XL")
    command = "localmistral pull mistral-small-4:UD-Q4_K_XL --yes"
    check_refusal(done, 1, "4 files, 136.5 KiB", command)
    assert hub.sent_bytes() == 0
    assert not folder_of(cache, SMALL_4).exists()


def test_what_is_here_is_not_fetched_again_nor_asked_for(hub: Hub, cache: Path) -> None:
    hub.publish(NEMO, nemo())
    first = run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes")
    before = hub.sent_bytes()
    again = run_cli("pull", "-m", f"hf:{NEMO}", "--quant", "q8-0")
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert "is here already" in again.stderr
    assert hub.sent_bytes() == before


@pytest.mark.slow
def test_another_quant_moves_only_the_shards_that_differ(hub: Hub, cache: Path) -> None:
    files = small_4()
    hub.publish(SMALL_4, files)
    assert run_cli("pull", "small-4:UD-Q4_K_M", "--yes").returncode == 0
    before = hub.sent_bytes()
    done = run_cli("pull", "small-4:UD-Q4_K_XL", "--yes")
    assert done.returncode == 0, done.stderr
    assert hub.sent_bytes() - before == len(files[shard_path("UD-Q4_K_XL", 2)].content)
    assert "here already" in done.stderr
    # Named is what was asked for, though its first shard is the other's, too.
    assert done.stdout.endswith(f"{shard_path('UD-Q4_K_XL', 1)}\n")
    assert "mistral-small-4:UD-Q4_K_XL is downloaded" in done.stderr
    assert [row["complete"] for row in listed()] == [True, True]
    check_cache(cache)


def test_the_same_content_at_a_new_commit_moves_nothing(hub: Hub, cache: Path) -> None:
    hub.publish(NEMO, nemo())
    assert run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes").returncode == 0
    before = hub.sent_bytes()
    commit = hub.publish(NEMO, {**nemo(), "README.md": Stored(content=b"new", lfs=False)})
    done = run_cli("pull", f"hf:{NEMO}:Q8_0")
    assert done.returncode == 0, done.stderr
    assert commit in done.stdout
    assert hub.sent_bytes() == before
    check_cache(cache)


def test_json_says_what_was_got(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    done = run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes", "--json")
    document = json.loads(done.stdout)
    size = len(nemo()["Nemo-Q8_0.gguf"].content)
    assert document["name"] == f"hf:{NEMO}:Q8_0"
    assert (document["bytes"], document["downloaded_bytes"]) == (size, size)
    assert Path(document["path"]).read_bytes() == nemo()["Nemo-Q8_0.gguf"].content


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, ("No model is named",)),
        (("--yes",), 2, ("No model is named",)),
        (("--check", "--quant", "Q8_0"), 2, ("No model is named",)),
        (("small-4", "-m", "small-4"), 2, ("Two models are named",)),
        (("small-4:UD-IQ3_S", "--quant", "Q8_0"), 2, ("--quant",)),
        (("small-5",), 1, ("No model is called 'small-5'",)),
        (("small-4:Q9",), 1, ("has no quant 'Q9'",)),
        ((f"hf:{NEMO}:Q9",), 1, ("it has Q4_K_M, Q8_0", "localmistral pull")),
        (("hf:some/nothing:Q4_K_M",), 1, ("some/nothing",)),
        (("hf:../x",), 2, ("not a Hub repository",)),
        (("--no-such",), 2, ("--no-such",)),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(
    arguments: tuple[str, ...], code: int, words: tuple[str, ...], hub: Hub
) -> None:
    hub.publish(NEMO, nemo())
    check_refusal(run_cli("pull", *arguments), code, *words)


def test_a_file_on_this_disk_needs_no_download(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(weights(tiny_llama()))
    for name in (path, "demo"):
        done = run_cli("pull", name)
        assert done.returncode == 0
        assert "is here already" in done.stderr
    assert hub.seen == []


@pytest.mark.parametrize(
    "path",
    ["../../../../evil-Q8_0.gguf", "/evil-Q8_0.gguf", "C:\\evil-Q8_0.gguf", "a\nb-Q8_0.gguf"],
)
def test_a_path_that_leads_out_of_the_cache_is_refused(
    path: str, hub: Hub, cache: Path, tmp_path: Path
) -> None:
    hub.publish(BIG, {path: Stored(content=weights(tiny_llama()))})
    done = run_cli("pull", f"hf:{BIG}:Q8_0", "--yes")
    check_refusal(done, 1)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "evil" in p.name]
    assert hub.sent_bytes() == 0


@pytest.mark.parametrize("by", ["option", "variable"])
def test_offline_fails_at_once_and_asks_nobody(
    by: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(NEMO, nemo())
    if by == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    option = ["--offline"] if by == "option" else []
    check_refusal(run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes", *option), 1, "HF_HUB_OFFLINE")
    assert hub.seen == []


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_and_nothing_loadable_is_left(hub: Hub, cache: Path) -> None:
    hub.publish(NEMO, nemo())
    hub.order(Fault(kind="flip", after=5000))
    done = run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes")
    check_refusal(done, 1, "sha256")
    assert listed() == []
    assert not [name for name in files_below(folder_of(cache, NEMO)) if "snapshots" in name]
    hub.faults.clear()
    assert run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes").returncode == 0
    check_cache(cache)


def begin_and_stop(hub: Hub, how: int) -> subprocess.Popen[str]:
    """Start a slow pull and send it a signal when a part is there."""
    process = start_cli("pull", f"hf:{BIG}:Q4_K_M", "--yes")
    before = hub.sent_bytes()
    wait_until(lambda: hub.sent_bytes() > before + (3 << 20) or process.poll() is not None)
    process.send_signal(how)
    process.wait(60)
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_killed_pull_is_listed_and_goes_on_where_it_was(hub: Hub, cache: Path) -> None:
    content = big()
    hub.publish(BIG, {PATH: Stored(content=content)})
    hub.bytes_per_second = 4e6
    process = begin_and_stop(hub, signal.SIGKILL)
    process.communicate()
    check_cache(cache)
    (row,) = listed()
    assert (row["name"], row["complete"], row["quant"]) == (f"hf:{BIG}:Q4_K_M", False, "Q4_K_M")
    partial = row["partial_bytes"]
    assert isinstance(partial, int)
    assert 1 << 20 < partial < len(content)
    assert f"of {len(content) / (1 << 20):.1f} MiB are downloaded" in str(row["problem"])
    assert "partial, " in run_cli("list").stdout
    hub.bytes_per_second = None
    before = hub.sent_bytes()
    done = run_cli("pull", f"hf:{BIG}:Q4_K_M", "--yes")
    assert done.returncode == 0, done.stderr
    assert "were here already" in done.stderr
    assert hub.sent_bytes() - before <= len(content) - 0.95 * partial
    assert Path(done.stdout.strip()).read_bytes() == content
    check_cache(cache)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_ctrl_c_says_what_is_kept_and_ends_with_130(hub: Hub, cache: Path) -> None:
    hub.publish(BIG, {PATH: Stored(content=big())})
    hub.bytes_per_second = 4e6
    process = begin_and_stop(hub, signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Kept " in err.splitlines()[-1]
    assert "MiB; the same command continues" in err.splitlines()[-1]
    assert "Traceback" not in err
    swept = run_cli("rm", "--partial", "--yes")
    assert swept.returncode == 0
    assert f"hf:{BIG}:Q4_K_M" in swept.stderr
    assert listed() == []
    assert not [n for n in files_below(folder_of(cache, BIG)) if n.startswith("blobs/")]


@pytest.mark.slow
def test_two_pulls_of_one_model_share_one_transfer(hub: Hub) -> None:
    content = big(4 << 20)
    hub.publish(BIG, {PATH: Stored(content=content)})
    hub.bytes_per_second = 2e6
    both = [start_cli("pull", f"hf:{BIG}:Q4_K_M", "--yes") for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert hub.sent_bytes() < 1.1 * len(content)
    assert sum("Another process is downloading" in text for text in said) == 1


def test_what_older_versions_left_unfinished_is_swept_by_the_next_pull(
    hub: Hub, cache: Path
) -> None:
    hub.publish(NEMO, nemo())
    blobs = folder_of(cache, NEMO) / "blobs"
    blobs.mkdir(parents=True)
    old = [blobs / f"{'a' * 64}.part", blobs / f"{'a' * 64}.journal"]
    for path in old:
        path.write_bytes(b"left over")
    assert run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes").returncode == 0
    assert [path.exists() for path in old] == [False, False]


def test_a_retry_is_said_off_a_terminal_too(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    hub.order(Fault(kind="status", status=503, times=1, headers={"Retry-After": "1"}))
    done = run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes")
    assert done.returncode == 0, done.stderr
    assert "retrying in" in done.stderr
    assert "\x1b" not in done.stderr


# Checking.


def damage(path: Path, at: int = 4000) -> None:
    blob = path.resolve()
    data = bytearray(blob.read_bytes())
    data[at] ^= 1
    blob.write_bytes(data)


def test_a_check_of_sound_files_says_so(hub: Hub, cache: Path) -> None:
    hub.publish(SMALL_4, small_4())
    assert run_cli("pull", "small-4:UD-Q4_K_XL", "--yes").returncode == 0
    seen = len(hub.seen)
    done = run_cli("pull", "--check")
    assert (done.returncode, done.stdout) == (0, "")
    assert "all 4 files are verified" in done.stderr
    assert len(hub.seen) == seen
    rows = json.loads(run_cli("pull", "--check", "small-4", "--json").stdout)
    assert [row["state"] for row in rows] == ["ok"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_corrupt_file_is_found_removed_and_fetched_again(
    links: bool, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    hub.publish(SMALL_4, small_4())
    first = run_cli("pull", "small-4:UD-Q4_K_XL", "--yes")
    shard = Path(first.stdout.strip().replace("00001-of", "00002-of"))
    damage(shard)
    done = run_cli("pull", "--check", "small-4:UD-Q4_K_XL")
    check_refusal(done, 1, shard.name, "sha256", "localmistral pull mistral-small-4:UD-Q4_K_XL")
    assert not shard.exists()
    assert not shard.is_symlink()
    (row,) = listed()
    assert (row["complete"], row["problem"]) == (False, "shard 2 of 3 is missing")
    check_cache(cache)
    before = hub.sent_bytes()
    assert run_cli("pull", "small-4:UD-Q4_K_XL", "--yes").returncode == 0
    assert hub.sent_bytes() - before == len(small_4()[shard_path("UD-Q4_K_XL", 2)].content)
    assert run_cli("pull", "--check").returncode == 0


def test_a_check_names_what_is_missing(hub: Hub, cache: Path) -> None:
    hub.publish(SMALL_4, small_4())
    first = run_cli("pull", "small-4:UD-Q4_K_XL", "--yes")
    shard = Path(first.stdout.strip().replace("00001-of", "00003-of"))
    shard.unlink()
    check_refusal(run_cli("pull", "--check", "small-4"), 1, shard.name, "isn't there")


def test_a_file_placed_by_hand_is_said_to_be_unknown_and_stays(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(weights(tiny_llama()))
    done = run_cli("pull", "--check", path)
    assert done.returncode == 0
    assert "no hash is known" in done.stderr
    assert path.exists()


def test_a_check_of_what_is_not_here_says_so(hub: Hub) -> None:
    nothing = run_cli("pull", "--check", "--json")
    assert (nothing.returncode, nothing.stdout) == (0, "[]\n"), nothing.stderr
    assert "no models" in nothing.stderr
    check_refusal(run_cli("pull", "--check", "small-4"), 1, "on this disk")
    done = run_cli("pull", "--check")
    assert done.returncode == 0
    assert hub.seen == []


# On a terminal.


def answer_on_a_terminal(answer: str, *arguments: str) -> tuple[int, str]:
    """Run the program on a terminal of its own, type an answer to its question."""
    import pty

    process_id, terminal = pty.fork()
    if process_id == 0:
        command = [sys.executable, "-m", "localmistral", *arguments]
        os.execve(command[0], command, {**os.environ, "TERM": "xterm", "COLUMNS": "80"})
    output = b""
    while chunk := _read(terminal):
        output += chunk
        if b"[Y/n]" in output and answer:
            os.write(terminal, answer.encode())
            answer = ""
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]), output.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side has closed
        return b""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 0), ("n\n", 1), ("\x04", 130)])
def test_on_a_terminal_a_person_is_asked(answer: str, code: int, hub: Hub) -> None:
    content = weights(tiny_llama()) + os.urandom(1 << 20)
    hub.publish(BIG, {PATH: Stored(content=content)})
    got, output = answer_on_a_terminal(answer, "pull", f"hf:{BIG}:Q4_K_M")
    assert got == code, output
    assert "1 file, 1.3 MiB" in output
    assert [bool(row["complete"]) for row in listed()] == ([True] if code == 0 else [])
    assert (hub.sent_bytes() > 0) == (code == 0)


# Without a quant: the planner's choice.


@pytest.mark.slow
def test_without_a_quant_the_planners_choice_is_shown_with_its_size(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    done = run_cli("pull", "small-4")
    check_refusal(done, 1, "The plan for this machine: mistral-small-4:UD-", "to download", "--yes")
    got = run_cli("pull", "small-4", "--yes")
    assert got.returncode == 0, got.stderr
    (row,) = listed()
    assert row["complete"]
    assert f"{row['name']} is downloaded and verified" in got.stderr
    assert STEM in str(row["path"])
    before = hub.sent_bytes()
    for again in (run_cli("pull", "small-4"), run_cli("pull", "small-4", "--offline")):
        assert (again.returncode, again.stdout) == (0, got.stdout), again.stderr
        assert "is here already" in again.stderr
    assert hub.sent_bytes() == before
    newer = {path: f for path, f in small_4().items() if str(row["quant"]) not in path}
    hub.publish(SMALL_4, {**newer, **_changed(str(row["quant"]))})
    fresh = run_cli("pull", "small-4", "--yes")
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout != got.stdout


@pytest.mark.parametrize("names", [["model.gguf"], ["a-Q8_0.gguf", "b-Q8_0.gguf"]])
def test_files_whose_quant_tells_nothing_can_be_pulled_and_run(names: list[str], hub: Hub) -> None:
    hub.publish(BIG, {n: Stored(content=weights(tiny_llama(), i)) for i, n in enumerate(names)})
    done = run_cli("pull", f"hf:{BIG}", "--yes")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.name in names
    (row,) = listed()
    assert (row["complete"], row["path"]) == (True, str(path))
    again = run_cli("pull", f"hf:{BIG}")
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    offline = run_cli("pull", f"hf:{BIG}:{path.stem}", "--offline")
    assert (offline.returncode, offline.stdout) == (0, done.stdout), offline.stderr


def _changed(quant: str) -> dict[str, Stored]:
    """The files of a quant, as a newer commit might have them."""
    files = {path: f.content for path, f in small_4().items() if quant in path}
    return {path: Stored(content=content[:-1] + b"\x63") for path, content in files.items()}
