"""What is found on disk, with a Hub cache laid out as huggingface_hub lays it out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from localmistral.models import cache
from localmistral.models.cache import LocalModel, find_local, list_local, scan_local
from localmistral.models.names import resolve

SMALL_4 = "unsloth/Mistral-Small-4-119B-2603-GGUF"
IQ3_S = "Mistral-Small-4-119B-2603-UD-IQ3_S.gguf"
OLD, NEW = "a" * 40, "b" * 40


def shard(n: int, quant: str = "UD-Q4_K_XL") -> str:
    return f"{quant}/Mistral-Small-4-119B-2603-{quant}-{n:05}-of-00003.gguf"


class HubCache:
    """Writes files into a Hub cache: content in blobs, links in snapshots, names in refs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, repository: str) -> Path:
        return self.root / f"models--{repository.replace('/', '--')}"

    def add(
        self, repository: str, path: str, content: bytes = b"GGUF", revision: str = NEW
    ) -> Path:
        blob = self.folder(repository) / "blobs" / sha256(content).hexdigest()
        entry = self.folder(repository) / "snapshots" / revision / path
        for file in (blob, entry):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        entry.symlink_to(os.path.relpath(blob, entry.parent))
        return entry

    def point_main_to(self, repository: str, revision: str) -> None:
        ref = self.folder(repository) / "refs" / "main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(revision, encoding="utf-8")


@pytest.fixture(autouse=True)
def _empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(cache, "models_folder", lambda: tmp_path / "own")
    monkeypatch.delenv("LOCALMISTRAL_MODELS", raising=False)


@pytest.fixture
def hub(tmp_path: Path) -> HubCache:
    return HubCache(tmp_path / "hub")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a file into a folder that LOCALMISTRAL_MODELS names."""

    def put(path: str, content: bytes = b"GGUF") -> Path:
        file = tmp_path / "placed" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        monkeypatch.setenv("LOCALMISTRAL_MODELS", str(tmp_path / "placed"))
        return file

    return put


def only(models: tuple[LocalModel, ...]) -> LocalModel:
    assert len(models) == 1, [model.name for model in models]
    return models[0]


def test_an_absent_cache_is_an_empty_list_without_warnings() -> None:
    scan = scan_local()
    assert (scan.models, scan.warnings) == ((), ())


def test_a_single_file_is_listed_with_all_that_its_place_says(hub: HubCache) -> None:
    path = hub.add(SMALL_4, IQ3_S, b"x" * 100)
    hub.point_main_to(SMALL_4, NEW)
    model = only(list_local())
    assert model == LocalModel(
        name="mistral-small-4:UD-IQ3_S",
        model="mistral-small-4",
        repository=SMALL_4,
        revision=NEW,
        quant="UD-IQ3_S",
        bytes=100,
        path=path,
        files=(path,),
        problem="",
        mmproj=None,
    )
    assert model.complete


def test_the_layout_of_these_tests_is_the_one_huggingface_hub_reads(hub: HubCache) -> None:
    hub.add(SMALL_4, shard(1))
    hub.add(SMALL_4, IQ3_S, b"other")
    hub.point_main_to(SMALL_4, NEW)
    info = scan_cache_dir(hub.root)
    assert not info.warnings
    (repository,) = info.repos
    (revision,) = repository.revisions
    assert repository.repo_id == SMALL_4
    assert revision.refs == {"main"}
    assert {file.file_path for file in revision.files} == {m.path for m in list_local()} | {
        hub.folder(SMALL_4) / "snapshots" / NEW / shard(1)
    }


def test_shards_are_one_model_that_loads_from_the_first(hub: HubCache) -> None:
    paths = tuple(hub.add(SMALL_4, shard(n), bytes([n]) * n) for n in (1, 2, 3))
    model = only(list_local())
    assert (model.path, model.files, model.bytes) == (paths[0], paths, 6)
    assert model.complete


def test_a_missing_shard_is_named_and_the_model_is_not_found_to_run(hub: HubCache) -> None:
    for n in (1, 3):
        hub.add(SMALL_4, shard(n), bytes([n]))
    model = only(list_local())
    assert model.problem == "shard 2 of 3 is missing"
    assert not model.complete
    assert find_local(resolve("small-4")) is None


def test_a_shard_whose_blob_was_deleted_counts_as_missing(hub: HubCache) -> None:
    paths = [hub.add(SMALL_4, shard(n), bytes([n])) for n in (1, 2, 3)]
    paths[0].resolve().unlink()
    model = only(list_local())
    assert model.problem == "shard 1 of 3 is missing"
    assert model.path == paths[0]
    assert model.bytes == 2


def test_a_broken_link_to_a_single_file_is_listed_as_unusable(hub: HubCache) -> None:
    hub.add(SMALL_4, IQ3_S).resolve().unlink()
    model = only(list_local())
    assert (model.bytes, model.files, model.complete) == (0, (), False)
    assert "broken link" in model.problem


def test_shards_of_two_revisions_do_not_make_one_model(hub: HubCache) -> None:
    for n, revision in ((1, OLD), (2, OLD), (3, NEW)):
        hub.add(SMALL_4, shard(n), bytes([n]), revision)
    assert sorted(model.problem for model in list_local()) == [
        "shard 3 of 3 is missing",
        "shards 1 and 2 of 3 are missing",
    ]


def test_two_revisions_linking_to_one_blob_are_listed_once_under_main(hub: HubCache) -> None:
    for revision in (OLD, NEW):
        hub.add(SMALL_4, IQ3_S, b"same", revision)
    hub.point_main_to(SMALL_4, OLD)
    assert only(list_local()).revision == OLD


def test_a_changed_file_in_two_revisions_takes_space_twice_and_runs_from_main(
    hub: HubCache,
) -> None:
    for revision in (OLD, NEW):
        hub.add(SMALL_4, IQ3_S, revision[:4].encode(), revision)
    hub.point_main_to(SMALL_4, OLD)
    assert len(list_local()) == 2
    found = find_local(resolve("small-4:UD-IQ3_S"))
    assert found is not None
    assert found.revision == OLD


def test_copies_in_snapshots_work_as_on_windows_without_links(hub: HubCache) -> None:
    entry = hub.add(SMALL_4, IQ3_S, b"content")
    entry.unlink()
    entry.write_bytes(b"content")
    shutil.rmtree(hub.folder(SMALL_4) / "blobs")
    found = find_local(resolve("small-4"))
    assert found is not None
    assert (found.path, found.bytes) == (entry, 7)


def test_an_image_encoder_is_attached_and_not_listed(hub: HubCache) -> None:
    for n in (1, 2, 3):
        hub.add(SMALL_4, shard(n), bytes([n]))
    hub.add(SMALL_4, IQ3_S, b"other")
    encoder = hub.add(SMALL_4, "mmproj-F16.gguf", b"encoder")
    hub.add(SMALL_4, "mmproj-F32.gguf", b"larger encoder")
    models = list_local()
    assert [model.quant for model in models] == ["UD-IQ3_S", "UD-Q4_K_XL"]
    assert {model.mmproj for model in models} == {encoder}


def test_an_image_encoder_of_another_revision_of_the_repository_will_do(hub: HubCache) -> None:
    hub.add(SMALL_4, IQ3_S, b"model", NEW)
    encoder = hub.add(SMALL_4, "mmproj-F16.gguf", b"encoder", OLD)
    assert only(list_local()).mmproj == encoder


def test_a_broken_link_to_an_image_encoder_attaches_nothing(hub: HubCache) -> None:
    hub.add(SMALL_4, IQ3_S, b"model")
    hub.add(SMALL_4, "mmproj-F16.gguf", b"encoder").resolve().unlink()
    assert only(list_local()).mmproj is None


def test_an_importance_matrix_is_no_model(hub: HubCache) -> None:
    hub.add(SMALL_4, "Mistral-Small-4-119B-2603-imatrix.gguf")
    hub.add(SMALL_4, "README.md")
    assert list_local() == ()


def test_an_unknown_repository_is_listed_by_what_runs_it(hub: HubCache) -> None:
    hub.add("someone/Some-Model-GGUF", "Some-Model.Q4_1.gguf")
    model = only(list_local())
    assert (model.name, model.model) == ("hf:someone/Some-Model-GGUF:Q4_1", None)
    assert find_local(resolve(model.name)) == model


def test_another_publishers_copy_is_the_same_model_under_a_name_of_its_own(hub: HubCache) -> None:
    hub.add(
        "lmstudio-community/Ministral-3-8B-Instruct-2512-GGUF",
        "Ministral-3-8B-Instruct-2512-Q6_K.gguf",
    )
    model = only(list_local())
    assert model.model == "ministral-3-8b"
    assert model.name == "hf:lmstudio-community/Ministral-3-8B-Instruct-2512-GGUF:Q6_K"
    assert find_local(resolve("ministral-3-8b")) == model
    assert find_local(resolve("ministral-3-8b-reasoning")) is None


def test_every_listed_name_finds_the_model_it_stands_for(
    hub: HubCache, place: Callable[..., Path]
) -> None:
    hub.add(SMALL_4, IQ3_S, b"1")
    hub.add(
        "bartowski/mistralai_Ministral-3-8B-Instruct-2512-GGUF",
        "mistralai_Ministral-3-8B-Instruct-2512-Q4_K_M.gguf",
        b"2",
    )
    hub.add(
        "mistralai/Ministral-3-8B-Instruct-2512-GGUF",
        "Ministral-3-8B-Instruct-2512-Q4_K_M.gguf",
        b"3",
    )
    hub.add("someone/x", "model.gguf", b"4")
    hub.add("someone/y", "y.i1-IQ2_M.gguf", b"5")
    place("deep/er/Own-Model-Q8_0.gguf", b"6")
    models = list_local()
    assert len(models) == 6
    assert len({model.name for model in models}) == 6
    for model in models:
        found = find_local(resolve(model.name))
        assert found is not None
        assert found.path == model.path


def test_without_a_quant_the_largest_complete_copy_is_taken(hub: HubCache) -> None:
    hub.add(SMALL_4, "Mistral-Small-4-119B-2603-UD-IQ1_M.gguf", b"x" * 10)
    hub.add(SMALL_4, IQ3_S, b"x" * 30)
    for n in (1, 2):
        hub.add(SMALL_4, shard(n), bytes([n]) * 1000)
    found = find_local(resolve("small-4"))
    assert found is not None
    assert found.quant == "UD-IQ3_S"


def test_a_quant_that_is_not_here_is_not_replaced_by_another(hub: HubCache) -> None:
    hub.add(SMALL_4, IQ3_S)
    assert find_local(resolve("small-4:UD-IQ1_M")) is None
    assert find_local(resolve(f"hf:{SMALL_4}:UD-IQ1_M")) is None


def test_a_hub_name_finds_its_copy_without_regard_to_case_or_ud(hub: HubCache) -> None:
    path = hub.add(SMALL_4, IQ3_S)
    found = find_local(resolve(f"hf:{SMALL_4.lower()}:iq3_s"))
    assert found is not None
    assert found.path == path


def test_placed_files_are_found_and_named_by_their_path(
    place: Callable[..., Path],
) -> None:
    path = place(f"org/repo/{IQ3_S}")
    model = only(list_local())
    assert (model.name, model.model, model.repository) == (str(path), "mistral-small-4", None)
    assert find_local(resolve("small-4:iq3_s")) == model


def test_the_programs_own_folder_is_searched(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my.gguf").write_bytes(b"GGUF")
    assert only(list_local()).path == tmp_path / "own" / "my.gguf"


def test_a_nameless_encoder_is_attached_only_where_one_model_can_be_meant(
    place: Callable[..., Path],
) -> None:
    place("a/One-Q4_0.gguf", b"1")
    place("a/One-Q8_0.gguf", b"2")
    encoder = place("a/mmproj-F16.gguf", b"3")
    place("b/Two-Q8_0.gguf", b"4")
    place("b/Three-Q8_0.gguf", b"5")
    place("b/mmproj-F16.gguf", b"6")
    named = place("b/mmproj-Three-BF16.gguf", b"7")
    attached = {model.path.name: model.mmproj for model in list_local()}
    assert attached == {
        "One-Q4_0.gguf": encoder,
        "One-Q8_0.gguf": encoder,
        "Two-Q8_0.gguf": None,
        "Three-Q8_0.gguf": named,
    }


def test_a_path_finds_its_shards_and_the_encoder_a_folder_above(
    place: Callable[..., Path],
) -> None:
    paths = tuple(place(shard(n), bytes([n])) for n in (1, 2, 3))
    encoder = place("mmproj-F16.gguf", b"encoder")
    found = find_local(resolve(str(paths[1])))
    assert found is not None
    assert (found.path, found.files, found.mmproj) == (paths[0], paths, encoder)
    assert found.model == "mistral-small-4"


def test_a_folder_named_twice_lists_its_models_once(
    place: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place("x/y.gguf").parent.parent
    monkeypatch.setenv("LOCALMISTRAL_MODELS", os.pathsep.join([str(folder), "", str(folder / "x")]))
    assert len(list_local()) == 1


def test_a_folder_that_is_not_there_is_a_warning_without_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCALMISTRAL_MODELS", "no/such\x1b[31m")
    scan = scan_local()
    assert scan.models == ()
    assert len(scan.warnings) == 1
    assert scan.warnings[0].isprintable()
    assert "no/such" in scan.warnings[0]


@pytest.mark.skipif(
    sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="needs a user whom permissions bind",
)
def test_an_unreadable_repository_is_a_warning_and_the_others_are_listed(hub: HubCache) -> None:
    hub.add(SMALL_4, IQ3_S)
    hub.add("someone/x", "x.gguf")
    locked = hub.folder("someone/x") / "snapshots"
    locked.chmod(0)
    scan = scan_local()
    locked.chmod(0o700)
    assert [model.model for model in scan.models] == ["mistral-small-4"]
    assert "Permission denied" in scan.warnings[0]


def test_a_repository_that_cannot_be_listed_is_a_warning_and_the_others_are_listed(
    hub: HubCache,
) -> None:
    hub.add(SMALL_4, IQ3_S)
    (hub.root / "models--someone--x").mkdir()
    (hub.root / "models--someone--x" / "snapshots").write_text("no folder", encoding="utf-8")
    scan = scan_local()
    assert [model.model for model in scan.models] == ["mistral-small-4"]
    assert len(scan.warnings) == 1
    assert "snapshots" in scan.warnings[0]


def test_a_file_where_the_cache_should_be_is_a_warning(hub: HubCache) -> None:
    hub.root.write_text("not a folder", encoding="utf-8")
    scan = scan_local()
    assert scan.models == ()
    assert len(scan.warnings) == 1


def test_stray_files_in_the_cache_do_no_harm(hub: HubCache) -> None:
    hub.add(SMALL_4, IQ3_S)
    (hub.root / ".DS_Store").write_bytes(b"")
    (hub.root / "models--x").mkdir()
    (hub.root / "datasets--a--b" / "snapshots" / NEW).mkdir(parents=True)
    (hub.root / "datasets--a--b" / "snapshots" / NEW / "d.gguf").write_bytes(b"")
    (hub.folder(SMALL_4) / "snapshots" / "note.txt").write_text("", encoding="utf-8")
    (hub.folder(SMALL_4) / "refs").mkdir()
    (hub.folder(SMALL_4) / "refs" / "main").write_bytes(b"\xff\xfe")
    scan = scan_local()
    assert only(scan.models).quant == "UD-IQ3_S"
    assert scan.warnings == ()


def test_a_listed_model_is_plain_json(hub: HubCache) -> None:
    hub.add(SMALL_4, IQ3_S)
    hub.add(SMALL_4, "mmproj-F16.gguf", b"encoder")
    row = json.loads(json.dumps(only(list_local()).to_json()))
    assert (row["name"], row["complete"], row["bytes"]) == ("mistral-small-4:UD-IQ3_S", True, 4)
    assert row["mmproj"].endswith("mmproj-F16.gguf")


def test_the_environment_decides_where_the_cache_is(tmp_path: Path) -> None:
    HubCache(tmp_path / "home" / "hub").add(SMALL_4, IQ3_S)
    code = "from localmistral.models.cache import list_local; print([m.name for m in list_local()])"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "XDG_DATA_HOME": str(tmp_path / "data")}
    environment.pop("LOCALMISTRAL_MODELS", None)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert "mistral-small-4:UD-IQ3_S" in run.stdout


def test_importing_the_module_does_not_import_huggingface_hub() -> None:
    code = "import sys, localmistral.models.cache; print('huggingface_hub' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
