"""`localmistral list`: what is here, how whole it is, when it was used, and what isn't finished."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hub import Fault, Hub, running_hub
from sample_repositories import NEMO, SMALL_4, isolate, nemo, run_cli, shard_path, small_4

from localmistral.models import history
from localmistral.models.download import list_repository
from localmistral.models.history import (
    BegunDownload,
    begun_downloads,
    forget_download,
    last_used_s,
    record_download,
    record_use,
)
from localmistral.models.hub import HubFile


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        isolate(monkeypatch, tmp_path, hub.endpoint)
        yield hub


def listed() -> list[dict[str, Any]]:
    done = run_cli("list", "--json")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


KEYS = {
    "name",
    "model",
    "repository",
    "revision",
    "quant",
    "bytes",
    "path",
    "files",
    "complete",
    "problem",
    "mmproj",
    "last_used",
    "partial_bytes",
}


def test_a_model_is_listed_with_size_state_and_use(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    assert run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes").returncode == 0
    (row,) = listed()
    assert set(row) == KEYS
    assert (row["complete"], row["problem"], row["partial_bytes"]) == (True, "", None)
    used = datetime.fromisoformat(row["last_used"])
    assert used.tzinfo is not None
    assert abs((datetime.now(UTC) - used).total_seconds()) < 600
    lines = run_cli("list").stdout.splitlines()
    assert lines[0].split() == ["model", "quant", "size", "state", "last", "used"]
    assert lines[1].split() == f"hf:{NEMO}:Q8_0 Q8_0 269.8 KiB complete just now".split()


def test_a_missing_shard_is_named_and_how_far_its_download_is(hub: Hub, tmp_path: Path) -> None:
    hub.publish(SMALL_4, small_4())
    done = run_cli("pull", "small-4:UD-Q4_K_XL", "--yes")
    Path(done.stdout.strip().replace("00001-of", "00002-of")).unlink()
    (row,) = listed()
    assert (row["complete"], row["problem"]) == (False, "shard 2 of 3 is missing")
    assert row["last_used"] is None
    # an unfinished download of that shard, as a killed pull leaves it
    listing = list_repository(SMALL_4)
    wanted = [shard_path("UD-Q4_K_XL", n) for n in (1, 2, 3)]
    files = tuple(file for file in listing.files if file.path in wanted)
    record_download(
        BegunDownload(
            name="mistral-small-4:UD-Q4_K_XL",
            repository=SMALL_4,
            commit=listing.commit,
            quant="UD-Q4_K_XL",
            files=files,
        )
    )
    blobs = tmp_path / "hf" / "hub" / f"models--{SMALL_4.replace('/', '--')}" / "blobs"
    (blobs / str(files[1].sha256)).unlink()
    (row,) = listed()
    assert row["partial_bytes"] == files[0].bytes + files[2].bytes
    assert "shard 2 of 3 is missing; partial, 34%" in run_cli("list").stdout


def test_a_model_that_lacks_its_encoder_has_one_row_that_says_so(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    hub.order(Fault(kind="flip", path="*mmproj*"))
    assert run_cli("pull", "small-4:UD-Q4_K_XL", "--yes").returncode == 1
    (row,) = listed()
    assert (row["complete"], row["mmproj"]) == (True, None)
    assert row["partial_bytes"] == row["bytes"]
    assert "complete; partial, 99%" in run_cli("list").stdout


def test_nothing_here_says_how_to_get_something(hub: Hub) -> None:
    done = run_cli("list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "localmistral pull" in done.stderr


# What is remembered.


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "state_folder", lambda: tmp_path / "state")


@pytest.mark.usefixtures("_own_folder")
def test_our_own_record_of_use_goes_before_the_disks(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert last_used_s(path) is None
    path.write_bytes(b"GGUF")
    os.utime(path, (1_000_000, 1_000_000))
    assert last_used_s(path) == 1_000_000
    record_use(path)
    os.utime(path, (2_000_000, 2_000_000))
    used = last_used_s(path)
    assert used is not None
    assert abs(used - time.time()) < 600
    assert last_used_s(tmp_path / "other.gguf") is None


@pytest.mark.usefixtures("_own_folder")
def test_a_begun_download_is_remembered_until_forgotten(tmp_path: Path) -> None:
    files = (
        HubFile(path="a.gguf", bytes=5, sha256="a" * 64),
        HubFile(path="b.txt", bytes=6, blob_id="b" * 40),
    )
    begun = BegunDownload(
        name="hf:a/b:Q8_0", repository="a/b", commit="c" * 40, quant="Q8_0", files=files
    )
    record_download(begun)
    record_download(begun)
    assert list(begun_downloads()) == [begun]
    forget_download("hf:a/b:other")
    assert list(begun_downloads()) == [begun]
    forget_download(begun.name)
    assert list(begun_downloads()) == []


@pytest.mark.usefixtures("_own_folder")
@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"files": 3}', '{"files": [[1, 2]]}'])
def test_a_damaged_record_is_as_good_as_none(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "state" / "downloads"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(text, encoding="utf-8")
    assert list(begun_downloads()) == []


@pytest.mark.usefixtures("_own_folder")
def test_a_disk_that_refuses_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a file where a folder should be")
    record_use(tmp_path / "model.gguf")
    forget_download("x")
    assert list(begun_downloads()) == []
