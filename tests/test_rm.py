"""`localmistral rm`: what goes, what stays, and that the Hub's library sees no harm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from gguf_writer import tiny_llama
from hub import Hub, Stored, running_hub
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

from localmistral.errors import LocalMistralError
from localmistral.models import removal
from localmistral.models.cache import find_copies, hold_blob, scan_local
from localmistral.models.catalog import load_catalog
from localmistral.models.download import download_files, list_repository
from localmistral.models.history import BegunDownload, begun_downloads, record_download
from localmistral.models.hub import HubFile, SweptFiles
from localmistral.models.orphans import find_orphans, sweep_orphans
from localmistral.models.removal import plan_removal, remove

XL, M = "UD-Q4_K_XL", "UD-Q4_K_M"


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


def fetch(repository: str, *paths: str, revision: str | None = None) -> tuple[Path, ...]:
    """Bring files of a repository's newest commit into the cache."""
    listing = list_repository(repository, revision)
    found = {file.path: file for file in listing.files}
    files: list[HubFile] = [found[path] for path in paths]
    return download_files(repository, listing.commit, files, revision=listing.revision)


def quant_paths(quant: str) -> list[str]:
    return [*(shard_path(quant, n) for n in (1, 2, 3)), "mmproj-F16.gguf"]


def names() -> list[str]:
    return [local.name for local in scan_local(load_catalog()).models]


def check_cache(cache: Path) -> None:
    """The Hub's library reads the cache without a complaint, and no link is broken."""
    assert list(scan_cache_dir(cache).warnings) == []
    assert not [p for p in cache.rglob("*") if p.is_symlink() and not p.exists()]


def test_a_removed_model_leaves_nothing_of_its_repository(hub: Hub, cache: Path) -> None:
    hub.publish(SMALL_4, small_4())
    fetch(SMALL_4, *quant_paths(XL))
    done = run_cli("rm", f"small-4:{XL}", "--yes")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"mistral-small-4:{XL}" in done.stderr
    assert "136.5 KiB are free again" in done.stderr
    assert not folder_of(cache, SMALL_4).exists()
    assert names() == []
    check_cache(cache)


def test_shards_and_encoder_that_another_quant_uses_stay(hub: Hub, cache: Path) -> None:
    hub.publish(SMALL_4, small_4())
    (first, *_) = fetch(SMALL_4, *quant_paths(M), *quant_paths(XL))
    done = run_cli("rm", f"small-4:{M}", "--yes")
    assert done.returncode == 0, done.stderr
    assert "of it stay" in done.stderr
    assert names() == [f"mistral-small-4:{XL}"]
    assert not first.parent.exists()
    (local,) = scan_local().models
    assert local.complete
    assert local.mmproj is not None
    content = small_4()
    for path in quant_paths(XL):
        assert (first.parents[1] / path).read_bytes() == content[path].content
    assert len(files_below(folder_of(cache, SMALL_4) / "blobs")) == 4
    check_cache(cache)


def test_a_blob_that_another_snapshot_uses_stays(hub: Hub, cache: Path) -> None:
    old = hub.publish(NEMO, nemo())
    fetch(NEMO, "Nemo-Q8_0.gguf")
    hub.publish(NEMO, {**nemo(), "README.md": Stored(content=b"new", lfs=False)})
    (path,) = fetch(NEMO, "Nemo-Q8_0.gguf")
    removed = run_cli("rm", f"hf:{NEMO}:Q8_0", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert not path.exists()
    (local,) = scan_local().models
    assert local.revision == old
    assert local.path.read_bytes() == nemo()["Nemo-Q8_0.gguf"].content
    check_cache(cache)
    assert run_cli("rm", f"hf:{NEMO}:Q8_0", "--yes").returncode == 0
    assert names() == []
    assert not folder_of(cache, NEMO).exists()


def test_without_a_quant_all_of_a_model_go_and_other_files_stay(hub: Hub, cache: Path) -> None:
    hub.publish(SMALL_4, small_4())
    paths = fetch(SMALL_4, *quant_paths(XL), f"{STEM}-UD-IQ3_S.gguf", "README.md")
    hub.publish(NEMO, nemo())
    fetch(NEMO, "Nemo-Q8_0.gguf")
    assert run_cli("rm", "small-4", "--yes").returncode == 0
    assert names() == [f"hf:{NEMO}:Q8_0"]
    assert files_below(folder_of(cache, SMALL_4) / "snapshots") == [
        f"{paths[0].parents[1].name}/README.md"
    ]
    check_cache(cache)


def test_an_incomplete_model_can_be_removed(hub: Hub, cache: Path) -> None:
    hub.publish(SMALL_4, small_4())
    paths = fetch(SMALL_4, *quant_paths(XL))
    paths[1].resolve().unlink()
    assert run_cli("rm", f"small-4:{XL}", "--yes").returncode == 0
    assert names() == []
    assert not folder_of(cache, SMALL_4).exists()


def test_nothing_is_removed_without_a_yes(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    (path,) = fetch(NEMO, "Nemo-Q8_0.gguf")
    refused = run_cli("rm", f"hf:{NEMO}:Q8_0")
    check_refusal(refused, 1, f"localmistral rm hf:{NEMO}:Q8_0 --yes")
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "No model is named"),
        (("small-4", "-m", "small-4"), 2, "Two models are named"),
        (("small-4", "--yes"), 1, "No file of 'small-4' is on this disk"),
        (("small-5", "--yes"), 1, "No model is called"),
        (("hf:a/b", "--yes"), 1, "on this disk"),
        (("demo", "--yes"), 1, "demo"),
        (("--partial", "small-4"), 2, "--partial"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[str, ...], code: int, words: str, hub: Hub
) -> None:
    check_refusal(run_cli("rm", *arguments), code, words)
    assert hub.seen == []


def test_a_file_placed_by_hand_elsewhere_is_never_touched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models of mine"
    folder.mkdir()
    path = folder / "my-model-Q4_K_M.gguf"
    path.write_bytes(weights(tiny_llama()))
    check_refusal(run_cli("rm", path, "--yes"), 1, "placed", "Delete the file yourself")
    monkeypatch.setenv("LOCALMISTRAL_MODELS", str(folder))
    check_refusal(run_cli("rm", path, "--yes"), 1, "Delete the file yourself")
    link = folder / "link-Q4_K_M.gguf"
    if sys.platform != "win32":
        link.symlink_to(path)
        check_refusal(run_cli("rm", link, "--yes"), 1, "Delete the file yourself")
    assert path.exists()


def test_a_file_in_the_programs_own_folder_goes(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "localmistral" / "models"
    folder.mkdir(parents=True)
    path = folder / "my-model-Q4_K_M.gguf"
    path.write_bytes(weights(tiny_llama()))
    other = folder / "other-Q4_K_M.gguf"
    other.write_bytes(weights(tiny_llama(), 3))
    if sys.platform != "linux":
        pytest.skip("the own folder lies elsewhere")
    assert run_cli("rm", path, "--yes").returncode == 0
    assert files_below(folder) == ["other-Q4_K_M.gguf"]


def test_the_path_of_a_cached_file_means_that_model(hub: Hub, cache: Path) -> None:
    hub.publish(NEMO, nemo())
    q4, q8 = fetch(NEMO, "Nemo-Q4_K_M.gguf", "Nemo-Q8_0.gguf")
    assert run_cli("rm", q4, "--yes").returncode == 0
    assert (q4.exists(), q8.exists()) == (False, True)
    check_cache(cache)


def test_the_path_of_a_shard_that_quants_share_means_the_quant_it_lies_in(
    hub: Hub, cache: Path
) -> None:
    hub.publish(SMALL_4, small_4())
    paths = fetch(SMALL_4, *quant_paths(XL), *quant_paths(M)[:3])
    assert [local.quant for local in find_copies(str(paths[0]))] == [XL]
    assert run_cli("rm", paths[0], "--yes").returncode == 0
    assert names() == [f"mistral-small-4:{M}"]
    check_cache(cache)


def test_a_link_out_of_the_cache_is_removed_and_not_followed(
    hub: Hub, cache: Path, tmp_path: Path
) -> None:
    hub.publish(NEMO, nemo())
    (path,) = fetch(NEMO, "Nemo-Q8_0.gguf")
    precious = tmp_path / "blobs" / "precious.gguf"
    precious.parent.mkdir()
    precious.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(precious)
    remove(plan_removal(find_copies(f"hf:{NEMO}:Q8_0")))
    assert precious.exists()
    assert not path.is_symlink()


def test_without_links_the_snapshots_own_files_go(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    hub.publish(NEMO, nemo())
    paths = fetch(NEMO, "Nemo-Q4_K_M.gguf", "Nemo-Q8_0.gguf")
    assert not paths[0].is_symlink()
    planned = plan_removal(find_copies(f"hf:{NEMO}:Q8_0"))
    assert planned.freed_bytes == len(nemo()["Nemo-Q8_0.gguf"].content)
    remove(planned)
    assert [path.exists() for path in paths] == [True, False]
    check_cache(cache)


def test_blobs_in_the_store_that_repositories_share_are_left_to_the_hubs_library(
    hub: Hub, cache: Path
) -> None:
    hub.publish(NEMO, nemo())
    (path,) = fetch(NEMO, "Nemo-Q8_0.gguf")
    blob = path.resolve()
    store = cache / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n", encoding="utf-8")
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    other = folder_of(cache, "else/where") / "blobs" / ("c" * 64)
    other.parent.mkdir(parents=True)
    other.symlink_to(os.path.relpath(store, other.parent))
    references = [f.relative_to(cache).as_posix() for f in (blob, other)]
    store.with_name(f"{store.name}.refs").write_text("\n".join(references) + "\n", encoding="utf-8")
    remove(plan_removal(find_copies(f"hf:{NEMO}:Q8_0")))
    assert not blob.is_symlink()
    assert store.exists()
    assert other.exists()


def test_a_file_that_the_system_keeps_is_said(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(NEMO, nemo())
    (path,) = fetch(NEMO, "Nemo-Q8_0.gguf")

    def refuse(blob: Path) -> None:
        raise PermissionError(13, "The file is in use by another process", str(blob))

    monkeypatch.setattr(removal, "delete_blob", refuse)
    with pytest.raises(LocalMistralError, match="in use by another process") as caught:
        remove(plan_removal(find_copies(f"hf:{NEMO}:Q8_0")))
    assert "End the programs" in caught.value.hint
    assert not path.is_symlink()
    check_cache(cache)


# Unfinished downloads.


def leave_partial(cache: Path, repository: str, key: str) -> Path:
    blobs = folder_of(cache, repository) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    part = blobs / f"{key}.part"
    part.write_bytes(os.urandom(5000))
    return part


def test_partials_are_swept_and_models_stay(hub: Hub, cache: Path) -> None:
    hub.publish(NEMO, nemo())
    (path,) = fetch(NEMO, "Nemo-Q8_0.gguf")
    part = leave_partial(cache, NEMO, "d" * 64)
    check_refusal(run_cli("rm", "--partial"), 1, "localmistral rm --partial --yes")
    assert part.exists()
    assert "partial" in run_cli("list").stdout
    done = run_cli("rm", "--partial", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"hf:{NEMO}" in done.stderr
    assert not part.exists()
    assert path.exists()
    again = run_cli("rm", "--partial")
    assert (again.returncode, "no unfinished" in again.stderr) == (0, True)


def test_a_sweep_leaves_a_running_download_and_its_name_alone(hub: Hub, cache: Path) -> None:
    hub.publish(NEMO, nemo())
    listing = list_repository(NEMO)
    running, gone = (file for file in listing.files if file.path.endswith(".gguf"))
    for file in (running, gone):
        record_download(
            BegunDownload(
                name=f"hf:{NEMO}:{file.path}",
                repository=NEMO,
                commit=listing.commit,
                quant="any",
                files=(file,),
            )
        )
    part = leave_partial(cache, NEMO, str(running.sha256))
    with hold_blob(part.with_name(str(running.sha256))) as is_held:
        assert is_held
        done = run_cli("rm", "--partial", "--yes")
    assert done.returncode == 0, done.stderr
    assert part.exists()
    assert [begun.files for begun in begun_downloads()] == [(running,)]
    assert run_cli("rm", "--partial", "--yes").returncode == 0
    assert (part.exists(), list(begun_downloads())) == (False, [])


def test_a_repository_with_nothing_but_a_partial_keeps_the_hubs_library_content(
    hub: Hub, cache: Path
) -> None:
    hub.publish(NEMO, nemo())
    fetch(NEMO, "Nemo-Q8_0.gguf")
    part = leave_partial(cache, NEMO, "d" * 64)
    assert run_cli("rm", f"hf:{NEMO}:Q8_0", "--yes").returncode == 0
    assert part.exists()
    check_cache(cache)
    assert run_cli("rm", "--partial", "--yes").returncode == 0
    assert not part.exists()
    check_cache(cache)


def test_a_short_name_means_the_copy_that_is_listed_by_it(hub: Hub, cache: Path) -> None:
    hub.publish(SMALL_4, small_4())
    fetch(SMALL_4, f"{STEM}-UD-IQ3_S.gguf")
    copy = "someone/Mistral-Small-4-119B-2603-GGUF"
    hub.publish(copy, {f"{STEM}-UD-IQ3_S.gguf": Stored(content=weights(tiny_llama(), 7))})
    fetch(copy, f"{STEM}-UD-IQ3_S.gguf")
    assert len(names()) == 2
    assert run_cli("rm", "small-4:UD-IQ3_S", "--yes").returncode == 0
    assert names() == [f"hf:{copy}:UD-IQ3_S"]
    assert run_cli("rm", "small-4", "--yes").returncode == 0
    assert names() == []


# Files that nothing links to.


def leave_orphan(cache: Path, repository: str, content: bytes) -> Path:
    blobs = folder_of(cache, repository) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    blob = blobs / sha256(content).hexdigest()
    blob.write_bytes(content)
    return blob


def test_model_files_that_nothing_links_to_are_swept(hub: Hub, cache: Path) -> None:
    hub.publish(NEMO, nemo())
    (path,) = fetch(NEMO, "Nemo-Q8_0.gguf")
    orphans = [leave_orphan(cache, name, b"GGUF of " + name.encode()) for name in (NEMO, "a/b")]
    others = leave_orphan(cache, "a/b", b"some other program's")
    named = orphans[0].with_name("config.json")
    named.write_bytes(b"GGUF by another name")
    check_refusal(run_cli("rm", "--partial"), 1, str(orphans[0]), str(orphans[1]), "--yes")
    done = run_cli("rm", "--partial", "--yes")
    assert done.returncode == 0, done.stderr
    assert "Removed 2 files" in done.stderr
    assert [p.exists() for p in (*orphans, others, named, path)] == [False, False, True, True, True]
    assert [local.complete for local in scan_local().models] == [True]


def test_a_pull_sweeps_orphans_of_its_repository_alone(hub: Hub, cache: Path) -> None:
    hub.publish(NEMO, nemo())
    mine, other = (leave_orphan(cache, name, b"GGUF " + name.encode()) for name in (NEMO, "a/b"))
    wanted = leave_orphan(cache, NEMO, nemo()["Nemo-Q4_K_M.gguf"].content)
    before = hub.sent_bytes()
    assert run_cli("pull", f"hf:{NEMO}:Q8_0", "--yes").returncode == 0
    assert [p.exists() for p in (mine, other, wanted)] == [False, True, False]
    moved = hub.sent_bytes() - before
    wanted = leave_orphan(cache, NEMO, nemo()["Nemo-Q4_K_M.gguf"].content)
    assert run_cli("pull", f"hf:{NEMO}:Q4_K_M", "--yes").returncode == 0
    assert wanted.exists()
    assert hub.sent_bytes() - before == moved  # a file that is there by its hash isn't fetched
    assert [local.complete for local in scan_local().models] == [True, True]


def test_a_file_is_no_orphan_while_a_process_is_at_it_or_however_it_is_linked(
    hub: Hub, cache: Path
) -> None:
    hub.publish(NEMO, nemo())
    (path,) = fetch(NEMO, "Nemo-Q8_0.gguf")
    blob = path.resolve()
    path.unlink()
    path.symlink_to(blob)  # absolute, as some tools write them
    assert find_orphans() == ()
    orphan = leave_orphan(cache, NEMO, b"GGUF orphan")
    assert find_orphans(NEMO) == (orphan,)
    with hold_blob(orphan) as is_held:
        assert is_held
        done = run_cli("rm", "--partial", "--yes")
        assert "Removed 0 files" in done.stderr
    assert orphan.exists()
    assert sweep_orphans(NEMO) == SweptFiles(count=1, bytes=11)
    assert not orphan.exists()
