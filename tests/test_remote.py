"""What the Hub has of a model, asked of a real server: quantisations, their files and shapes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_writer import tiny_llama
from hub import Fault, Hub, Stored, running_hub
from sample_repositories import (
    NEMO,
    SMALL_4,
    STEM,
    isolate,
    nemo,
    shard_path,
    sharded,
    small_4,
    weights,
)
from test_remote_header import large

from localmistral.errors import DownloadError, ModelFileError, ModelNotFoundError
from localmistral.models.gguf import read_shape
from localmistral.models.names import CatalogModel, HubRepository, resolve
from localmistral.models.remote import RemoteFiles, find_remote, list_remote, remote_candidates
from localmistral.models.remote_header import make_lender, read_whole
from localmistral.models.transfer import Patience


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        isolate(monkeypatch, tmp_path, hub.endpoint)
        yield hub


def known(name: str) -> CatalogModel | HubRepository:
    resolved = resolve(name)
    assert isinstance(resolved, CatalogModel | HubRepository)
    return resolved


def by_name(found: tuple[RemoteFiles, ...]) -> dict[str, RemoteFiles]:
    return {source.name: source for source in found}


def test_every_quant_is_listed_with_all_its_shards_and_the_encoder(hub: Hub) -> None:
    commit = hub.publish(SMALL_4, small_4())
    found = by_name(list_remote(known(f"hf:{SMALL_4}")))
    assert sorted(found) == ["UD-IQ1_M", "UD-IQ3_S", "UD-Q4_K_M", "UD-Q4_K_XL"]
    source = found["UD-Q4_K_XL"]
    assert [f.path for f in source.files] == [shard_path("UD-Q4_K_XL", n) for n in (1, 2, 3)]
    assert source.mmproj is not None
    assert source.mmproj.path == "mmproj-F16.gguf"
    assert (source.repository, source.commit, source.revision) == (SMALL_4, commit, "main")
    files = small_4()
    for file in source.all_files:
        assert (file.bytes, file.sha256) == (len(files[file.path].content), files[file.path].sha256)
    assert source.bytes == sum(file.bytes for file in source.all_files)


def test_a_name_with_a_quant_means_one_and_spelling_is_free(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    for name in ("small-4:ud-iq3_s", f"hf:{SMALL_4}:iq3s", f"hf:{SMALL_4}:UD-IQ3_S"):
        source = find_remote(known(name))
        assert source is not None
        assert [file.path for file in source.files] == [f"{STEM}-UD-IQ3_S.gguf"]
    assert find_remote(known(f"hf:{SMALL_4}")) is None


def test_an_unknown_quant_names_those_there_are(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    with pytest.raises(ModelNotFoundError) as caught:
        list_remote(known(f"hf:{NEMO}:Q5_K_M"))
    assert "'Q5_K_M'; it has Q4_K_M, Q8_0" in caught.value.message
    assert caught.value.hint.startswith(f"localmistral pull hf:{NEMO}:Q")


def test_a_repository_without_models_says_so(hub: Hub) -> None:
    hub.publish(
        "a/b", {"model.safetensors": Stored(content=b"x"), "mmproj.gguf": Stored(content=b"y")}
    )
    with pytest.raises(ModelNotFoundError, match="no GGUF model among its 2 files"):
        list_remote(known("hf:a/b"))


def test_a_set_with_a_shard_missing_on_the_hub_is_left_out_and_said(hub: Hub) -> None:
    files = {**nemo(), **sharded("Q6_K", 1)}
    del files[shard_path("Q6_K", 2)]
    hub.publish(NEMO, files)
    notes: list[str] = []
    assert sorted(by_name(list_remote(known(f"hf:{NEMO}"), on_note=notes.append))) == [
        "Q4_K_M",
        "Q8_0",
    ]
    assert len(notes) == 1
    assert "lacks 1 of 3 shards" in notes[0]


def test_two_models_of_one_quant_in_a_repository_keep_their_names_apart(hub: Hub) -> None:
    files = {f"{name}-Q8_0.gguf": Stored(content=weights(tiny_llama())) for name in ("one", "two")}
    hub.publish("a/b", files)
    assert sorted(by_name(list_remote(known("hf:a/b")))) == ["one-Q8_0", "two-Q8_0"]
    source = find_remote(HubRepository(id="a/b", quant="two-Q8_0"))
    assert source is not None
    assert source.files[0].path == "two-Q8_0.gguf"


def test_a_quant_in_one_file_and_again_in_shards_is_one_quant(hub: Hub) -> None:
    one = {f"{STEM}-UD-Q4_K_M.gguf": Stored(content=weights(tiny_llama()))}
    hub.publish("a/b", {**sharded("UD-Q4_K_M", 3), **one, "Q-Q8_0.gguf": Stored(content=b"GGUF")})
    found = list_remote(known("hf:a/b"))
    assert [(source.name, len(source.files)) for source in found] == [
        ("UD-Q4_K_M", 1),
        ("Q8_0", 1),
    ]


def test_the_catalogues_other_repositories_count_for_what_only_they_have(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    other = "bartowski/mistralai_Mistral-Small-4-119B-2603-GGUF"
    base = "mistralai_Mistral-Small-4-119B-2603"
    hub.publish(
        other,
        {f"{base}-{q}.gguf": Stored(content=weights(tiny_llama())) for q in ("Q4_K_M", "Q2_K")},
    )
    found = by_name(list_remote(known("small-4")))
    assert found["Q4_K_M"].repository == other
    assert found["UD-Q4_K_M"].repository == SMALL_4
    assert "Q2_K" not in found


def test_a_repository_that_is_gone_is_said_while_another_serves(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    notes: list[str] = []
    assert len(list_remote(known("small-4"), on_note=notes.append)) == 4
    assert [("bartowski" in note) for note in notes] == [True]


def test_shapes_are_those_of_the_files(hub: Hub, tmp_path: Path) -> None:
    files = small_4()
    commit = hub.publish(SMALL_4, files)
    notes: list[str] = []
    found = remote_candidates(known(f"hf:{SMALL_4}"), on_note=notes.append)
    assert len(found) == 4
    for quant in found:
        for file in quant.files:
            path = tmp_path / "files" / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[file.path].content)
        shape = read_shape(tmp_path / "files" / quant.files[0].path)
        assert quant.shape == replace(shape, files=tuple(Path(f.path) for f in quant.files))
        assert quant.commit == commit
    assert len(notes) == 1
    assert notes[0].startswith("Read ")


def publish_large(hub: Hub, repository: str, count: int) -> None:
    kinds = ("q8_0", "f16", "f32", "q4_0", "q5_0", "q4_1", "q5_1", "bf16")
    weight = bytes(4 << 20)  # so that whole files would show in what was moved
    hub.publish(
        repository,
        {
            f"M-Q{n}_K.gguf": Stored(content=large(kinds[n % 8]).data() + weight + bytes([n]))
            for n in range(1, count + 1)
        },
    )


def test_many_quants_cost_little_more_than_one_vocabulary(hub: Hub) -> None:
    publish_large(hub, "a/b", 9)
    vocabulary = len(large().header())
    notes: list[str] = []
    found = remote_candidates(known("hf:a/b"), on_note=notes.append)
    assert len(found) == 9
    assert hub.sent_bytes() < 2 * vocabulary + 9 * (24 << 10)
    assert "9 quantisations" in notes[0]


def test_a_second_plan_moves_no_byte_and_says_none(hub: Hub) -> None:
    publish_large(hub, "a/b", 3)
    first = remote_candidates(known("hf:a/b"))
    before = hub.sent_bytes()
    notes: list[str] = []
    assert remote_candidates(known("hf:a/b"), on_note=notes.append) == first
    assert hub.sent_bytes() == before
    assert notes == []


def test_a_file_that_changed_on_the_hub_is_read_again(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    first = {q.name: q for q in remote_candidates(known(f"hf:{NEMO}"))}
    changed = weights(tiny_llama({"llama.context_length": 256}))
    hub.publish(NEMO, {**nemo(), "Nemo-Q8_0.gguf": Stored(content=changed)})
    second = {q.name: q for q in remote_candidates(known(f"hf:{NEMO}"))}
    assert (first["Q8_0"].shape.context_length, second["Q8_0"].shape.context_length) == (512, 256)
    assert second["Q4_K_M"].shape == first["Q4_K_M"].shape
    assert second["Q4_K_M"].commit != first["Q4_K_M"].commit


def test_a_damaged_file_on_the_hub_is_left_out_and_said(hub: Hub) -> None:
    good = weights(tiny_llama())
    hub.publish(
        "a/b",
        {
            "M-Q2_K.gguf": Stored(content=b"<!DOCTYPE html>" + bytes(9000)),
            "M-Q4_K.gguf": Stored(content=good),
            "M-Q5_K.gguf": Stored(content=good[:3000]),
            "M-Q6_K.gguf": Stored(content=b""),
            "M-Q8_0-00001-of-00001.gguf": Stored(content=good),
        },
    )
    notes: list[str] = []
    found = remote_candidates(known("hf:a/b"), on_note=notes.append)
    assert [quant.name for quant in found] == ["Q4_K", "Q8_0"]
    for name in ("Q2_K", "Q5_K", "Q6_K"):
        assert any(note.startswith(f"{name} of a/b is left out: ") for note in notes)
    hub.publish("a/c", {"M-Q2_K.gguf": Stored(content=b"<!DOCTYPE html>" + bytes(9000))})
    with pytest.raises(ModelFileError, match="looks like an HTML page"):
        remote_candidates(known("hf:a/c"))


def test_files_with_unsafe_names_are_left_out_and_said(hub: Hub) -> None:
    files = nemo()
    for path in (
        "../up-Q2_K.gguf",
        "/abs-Q2_K.gguf",
        "a//b-Q2_K.gguf",
        "con.gguf",
        "../mmproj.gguf",
    ):
        hub.publish(NEMO, {**files, path: Stored(content=weights(tiny_llama(), 3))})
        notes: list[str] = []
        found = list_remote(known(f"hf:{NEMO}"), on_note=notes.append)
        assert [(source.name, source.mmproj) for source in found] == [
            ("Q4_K_M", None),
            ("Q8_0", None),
        ]
        assert [path in note and note.endswith("It is left out.") for note in notes] == [True]


@pytest.mark.parametrize("refused", ["*Q4_K_M*", "*Q8_0*"])
def test_a_file_that_the_hub_refuses_is_left_out_and_said(refused: str, hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    hub.order(Fault(kind="status", status=404, path=refused))
    notes: list[str] = []
    (found,) = remote_candidates(known(f"hf:{NEMO}"), on_note=notes.append)
    assert found.name != refused.strip("*")
    assert any("is left out: There is no" in note for note in notes)
    hub.faults[0].path = "*"
    hub.publish(NEMO, {p: Stored(content=s.content + b"new") for p, s in nemo().items()})
    with pytest.raises(DownloadError, match="There is no"):
        remote_candidates(known(f"hf:{NEMO}"))


def test_a_network_that_goes_away_midway_is_an_error(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmistral.models.remote._HEADER_PATIENCE", Patience(tries=1))
    hub.publish(NEMO, nemo())
    hub.order(Fault(kind="status", status=503, path="*Q8_0*"))
    with pytest.raises(DownloadError, match="answered 503"):
        remote_candidates(known(f"hf:{NEMO}"))


def test_a_busy_hub_is_asked_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmistral.models.remote._HEADER_PATIENCE", Patience(first_wait_s=0.1))
    hub.publish(NEMO, nemo())
    hub.order(Fault(kind="status", status=503, times=1, headers={"Retry-After": "0"}))
    hub.order(Fault(kind="cut", after=1000, times=1))
    assert len(remote_candidates(known(f"hf:{NEMO}"))) == 2


@pytest.mark.parametrize("name", ["small-4", f"hf:{NEMO}"])
def test_offline_is_one_error_at_once(name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        remote_candidates(known(name))
    assert hub.seen == []


@pytest.mark.parametrize("name", ["small-4", f"hf:{NEMO}"])
def test_nobody_listening_is_one_error(
    name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free}")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 can't be reached"):
        remote_candidates(known(name))


def test_a_network_that_swallows_packets_costs_seconds(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        assert timeout <= 3
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", connect)
    started_s = time.monotonic()
    with pytest.raises(DownloadError, match="timed out"):
        remote_candidates(known("small-4"))
    assert time.monotonic() - started_s < 30
    assert hub.seen == []


@pytest.mark.slow
def test_a_real_models_vocabulary_is_borrowed_and_little_is_moved(
    hub: Hub, smollm2_path: Path
) -> None:
    content = smollm2_path.read_bytes()
    names = [f"SmolLM2-{quant}.gguf" for quant in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")]
    hub.publish("a/b", {n: Stored(content=content + bytes([i])) for i, n in enumerate(names)})
    found = remote_candidates(known("hf:a/b"))
    shape = read_shape(smollm2_path)
    for quant, name in zip(found, names, strict=True):
        size = (len(content) + 1,)
        assert quant.shape == replace(shape, files=(Path(name),), file_bytes=size)
    vocabulary = make_lender(read_whole(lambda a, b: content[a:b], len(content), "m.gguf"))
    assert vocabulary is not None
    header = vocabulary.start + len(vocabulary.body) + vocabulary.rest_bytes
    assert hub.sent_bytes() < header + (2 << 20) + 3 * (64 << 10)
