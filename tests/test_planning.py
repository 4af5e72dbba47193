"""What a plan may choose from, by name: the disk, the Hub and the catalogue, and saved plans."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from make_header_gguf import build_files, write_files

from localmistral.errors import (
    LocalMistralError,
    ModelFileError,
    ModelNotFoundError,
    UsageError,
)
from localmistral.fit.plan import Candidate, Plan, PlannedFile, PlanRequest
from localmistral.fit.plan_json import plan_to_json
from localmistral.models import cache
from localmistral.models.catalog import Model, load_catalog
from localmistral.models.gguf import read_shape
from localmistral.models.hub import HubFile
from localmistral.models.remote import RemoteQuant
from localmistral.planning import (
    current_machine,
    gather_candidates,
    load_plan,
    plan_choices,
    plan_model,
)

UNSLOTH = "unsloth/Mistral-Small-4-119B-2603-GGUF"
MINISTRAL = "mistralai/Ministral-3-8B-Instruct-2512-GGUF"
COMMIT = "b" * 40
HASH = "c" * 64
TWO_3090 = current_machine(["2x3090"], "64GiB")


@pytest.fixture(autouse=True)
def _empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(cache, "models_folder", lambda: tmp_path / "own")
    monkeypatch.delenv("LOCALMISTRAL_MODELS", raising=False)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_files(
        tmp_path_factory.mktemp("header") / "h.gguf", build_files("ministral-3-8b", "q4_K")
    )
    return path


@pytest.fixture
def on_disk(header: Path, tmp_path: Path) -> Iterator[Path]:
    """Ministral 3 8B as UD-Q3_K_XL in the Hub's cache, under the hash of its blob."""
    folder = tmp_path / "hub" / f"models--{MINISTRAL.replace('/', '--')}"
    entry = folder / "snapshots" / COMMIT / "Ministral-3-8B-Instruct-2512-UD-Q3_K_XL.gguf"
    entry.parent.mkdir(parents=True)
    (folder / "blobs").mkdir()
    os.link(header, folder / "blobs" / HASH)
    entry.symlink_to(os.path.relpath(folder / "blobs" / HASH, entry.parent))
    yield entry


def quants(candidates: tuple[Candidate, ...]) -> list[str]:
    return [candidate.quant for candidate in candidates]


def test_a_catalogue_name_has_every_quant_of_known_size_as_an_estimate() -> None:
    choices = gather_candidates("small-4")
    assert {"UD-IQ1_M", "UD-IQ3_S", "UD-Q4_K_XL", "Q4_K_M", "Q8_0"} <= set(
        quants(choices.candidates)
    )
    assert "UD-Q5_K_XL" not in quants(choices.candidates)
    for candidate in choices.candidates:
        assert candidate.model == "mistral-small-4"
        assert candidate.is_estimated and not candidate.is_local
        assert candidate.context_limit == 262_144
        assert candidate.mmproj is not None
        assert candidate.mmproj.bytes == 857_078_496
    exact = choices.candidates[quants(choices.candidates).index("UD-Q4_K_XL")]
    assert [file.bytes for file in exact.files] == [7_875_616, 49_697_757_344, 24_456_006_464]
    assert exact.repository == UNSLOTH
    assert exact.revision == "bd93c721735aa32c035c0f19e738cb3371fd56ff"


def test_smaller_models_for_the_same_use_follow_the_largest_first() -> None:
    choices = gather_candidates("small-4")
    assert [group[0].model for group in choices.siblings] == [
        "ministral-3-14b",
        "ministral-3-8b",
        "ministral-3-3b",
    ]
    assert gather_candidates("ministral-3-3b").siblings == ()


@pytest.mark.parametrize("model", load_catalog().models, ids=lambda model: model.name)
def test_every_model_of_the_catalogue_can_be_planned_offline(model: Model) -> None:
    choices = gather_candidates(model.name)
    assert choices.candidates
    parameters = [
        group[0].shape.parameter_count for group in (choices.candidates, *choices.siblings)
    ]
    assert parameters == sorted(parameters, reverse=True)
    assert len(choices.siblings) == len(model.siblings)


def test_a_quant_that_is_named_is_passed_on() -> None:
    choices = gather_candidates("small-4:iq3_s")
    assert choices.quant == "UD-IQ3_S"
    plan = plan_choices(choices, PlanRequest(), TWO_3090)
    assert (plan.model, plan.quant) == ("mistral-small-4", "UD-IQ3_S")
    assert choices.candidate_of(plan).quant == "UD-IQ3_S"


def test_a_quant_of_unknown_size_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match="UD-Q5_K_XL is unknown offline") as refusal:
        gather_candidates("small-4:UD-Q5_K_XL")
    assert "UD-IQ3_S" in refusal.value.hint


def test_a_copy_on_the_disk_is_exact_and_stands_beside_the_estimates(on_disk: Path) -> None:
    choices = gather_candidates("ministral-3-8b")
    first, *others = choices.candidates
    assert (first.quant, first.is_local, first.is_estimated) == ("UD-Q3_K_XL", True, False)
    assert first.model == "ministral-3-8b"
    assert first.files[0].path == str(on_disk)
    assert first.files[0].sha256 == HASH
    assert first.files[0].bytes == on_disk.stat().st_size
    assert (first.repository, first.revision) == (MINISTRAL, COMMIT)
    assert first.context_limit == 262_144
    assert set(quants(tuple(others))) == {"Q4_K_M", "Q5_K_M", "Q8_0"}
    assert all(other.is_estimated and not other.is_local for other in others)


def test_a_command_that_loads_takes_what_is_on_the_disk(on_disk: Path) -> None:
    choices = gather_candidates("ministral-3-8b", prefers_local=True)
    assert quants(choices.candidates) == ["UD-Q3_K_XL"]
    assert choices.siblings == ()
    plan = plan_model("ministral-3-8b", PlanRequest(), TWO_3090, prefers_local=True)
    assert plan.is_local
    assert len(gather_candidates("small-4", prefers_local=True).candidates) > 5


def test_a_plan_says_what_is_on_the_disk(on_disk: Path) -> None:
    other = plan_model("ministral-3-8b:Q8_0", PlanRequest(), TWO_3090)
    assert other.reasons[-1].startswith("UD-Q3_K_XL of ministral-3-8b is on this disk")
    same = plan_model("ministral-3-8b:UD-Q3_K_XL", PlanRequest(), TWO_3090)
    assert same.reasons[-1] == "UD-Q3_K_XL is on this disk, nothing has to be downloaded."
    none = plan_model("small-4", PlanRequest(), TWO_3090)
    assert not any("on this disk" in reason for reason in none.reasons)


def test_a_quant_that_the_catalogue_does_not_list_may_be_on_the_disk(on_disk: Path) -> None:
    assert gather_candidates("ministral-3-8b:q3_k_xl").quant == "UD-Q3_K_XL"
    with pytest.raises(ModelNotFoundError, match="has no quant 'UD-Q3_K_XL'"):
        gather_candidates("ministral-3-14b:UD-Q3_K_XL")


def test_a_copy_on_the_disk_hides_the_estimate_of_its_quant(on_disk: Path) -> None:
    renamed = on_disk.with_name("Ministral-3-8B-Instruct-2512-Q4_K_M.gguf")
    on_disk.rename(renamed)
    choices = gather_candidates("ministral-3-8b")
    assert quants(choices.candidates).count("Q4_K_M") == 1
    assert choices.candidates[0].is_local


def test_a_sibling_that_is_on_the_disk_counts_as_such(on_disk: Path) -> None:
    choices = gather_candidates("small-4")
    sibling = next(group for group in choices.siblings if group[0].model == "ministral-3-8b")
    assert sibling[0].is_local


def test_a_damaged_copy_is_passed_over_with_a_note_unless_it_is_meant(on_disk: Path) -> None:
    on_disk.unlink()
    on_disk.write_bytes(b"<html>Not found</html>")
    choices = gather_candidates("ministral-3-8b")
    assert "UD-Q3_K_XL" not in quants(choices.candidates)
    assert "HTML" in choices.notes[0]
    with pytest.raises(ModelFileError, match="HTML"):
        gather_candidates(f"hf:{MINISTRAL}:UD-Q3_K_XL")


def test_a_path_is_that_file_alone(header: Path) -> None:
    choices = gather_candidates(str(header))
    (only,) = choices.candidates
    assert only.is_local
    assert only.quant == "Q4_K_M"  # by its header: the name says none
    assert only.model == str(header)
    assert only.context_limit == 262_144
    assert choices.siblings == ()


def test_the_limit_is_the_catalogue_s_where_a_file_claims_more(tmp_path: Path) -> None:
    name = "Mistral-Small-4-119B-2603-UD-IQ3_S.gguf"
    (path,) = write_files(tmp_path / name, build_files("small-4", "iq3_s"))
    (only,) = gather_candidates(str(path)).candidates
    assert only.shape.context_length == 1_048_576
    assert (only.model, only.context_limit) == ("mistral-small-4", 262_144)


def test_the_demo_is_a_candidate_of_its_own() -> None:
    (demo,) = gather_candidates("demo").candidates
    assert demo.model == "demo"
    assert demo.is_local


def test_a_repository_of_the_catalogue_has_its_own_quants_only() -> None:
    choices = gather_candidates("hf:bartowski/mistralai_Mistral-Small-4-119B-2603-GGUF")
    assert quants(choices.candidates) == ["Q4_K_M"]
    assert gather_candidates(f"hf:{UNSLOTH}:iq3_s").quant == "UD-IQ3_S"


def test_a_repository_that_nothing_is_known_of_is_said() -> None:
    with pytest.raises(ModelNotFoundError, match="'hf:some/where' is on this disk") as refusal:
        gather_candidates("hf:some/where")
    assert refusal.value.hint
    with pytest.raises(ModelNotFoundError, match="No quant 'Q9_X'"):
        gather_candidates(f"hf:{UNSLOTH}:Q9_X")


def test_without_the_hub_the_catalogue_s_figures_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LocalMistralError("The Hub can't be reached.")

    monkeypatch.setattr("localmistral.models.remote.remote_candidates", refuse)
    choices = gather_candidates("small-4", uses_hub=True)
    assert choices.notes == ("The Hub can't be reached.",)
    assert choices.candidates == gather_candidates("small-4").candidates
    with pytest.raises(LocalMistralError, match="The Hub can't be reached"):
        gather_candidates("hf:some/where", uses_hub=True)


def test_what_the_hub_says_of_a_repository_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelNotFoundError("It has no such quant.", "It has others.")

    monkeypatch.setattr("localmistral.models.remote.remote_candidates", refuse)
    with pytest.raises(ModelNotFoundError, match="It has no such quant") as refusal:
        gather_candidates(f"hf:{UNSLOTH}:Q9_X", uses_hub=True)
    assert refusal.value.hint == "It has others."
    assert gather_candidates("small-4", uses_hub=True).candidates  # a moved repository, say


def test_what_the_hub_has_counts_by_its_headers_and_commit(
    header: Path, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object, on_note: Callable[[str], None]) -> tuple[RemoteQuant, ...]:
        on_note("Read 9 MiB of headers.")
        encoder = HubFile(path="mmproj-F16.gguf", bytes=7, sha256=HASH)
        return tuple(
            RemoteQuant(
                name=name,
                repository=MINISTRAL,
                commit=COMMIT,
                revision="main",
                files=(HubFile(path=f"{name}/m.gguf", bytes=11, sha256=None),),
                mmproj=encoder,
                shape=read_shape(header),
            )
            for name in ("Q4_K_M", "UD-Q3_K_XL")
        )

    monkeypatch.setattr("localmistral.models.remote.remote_candidates", answer)
    choices = gather_candidates("ministral-3-8b", uses_hub=True)
    assert choices.notes == ("Read 9 MiB of headers.",)
    local, remote = choices.candidates
    assert (local.quant, local.is_local) == ("UD-Q3_K_XL", True)
    assert (remote.quant, remote.is_local, remote.is_estimated) == ("Q4_K_M", False, False)
    assert (remote.model, remote.context_limit) == ("ministral-3-8b", 262_144)
    assert (remote.repository, remote.revision) == (MINISTRAL, COMMIT)
    assert remote.files == (PlannedFile(path="Q4_K_M/m.gguf", bytes=11),)
    assert remote.mmproj == PlannedFile(path="mmproj-F16.gguf", bytes=7, sha256=HASH)


class TestAMachine:
    def test_that_is_typed_whole_is_not_probed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("probed")

        monkeypatch.setattr("localmistral.fit.hardware.probe_machine", refuse)
        machine = current_machine(["24GiB", "rtx-4090"], "64GiB")
        assert [gpu.total_bytes >> 30 for gpu in machine.gpus] == [24, 24]
        assert machine.ram.total_bytes == 64 << 30
        assert not machine.is_real
        assert current_machine([], "64GiB", cpu_only=True).gpus == ()

    def test_with_typed_cards_keeps_this_one_s_memory(self) -> None:
        machine, real = current_machine(["24GiB"]), current_machine()
        assert machine.ram.total_bytes == real.ram.total_bytes
        assert len(machine.gpus) == 1
        assert real.is_real

    def test_without_cards_keeps_this_one_s_memory(self) -> None:
        assert current_machine(cpu_only=True).gpus == ()

    def test_that_contradicts_itself_is_refused(self) -> None:
        with pytest.raises(UsageError):
            current_machine(["24GiB"], "64GiB", cpu_only=True)


class TestASavedPlan:
    @pytest.fixture
    def saved(self, header: Path, tmp_path: Path) -> tuple[Path, Plan]:
        plan = plan_model(str(header), PlanRequest(context=8192), TWO_3090)
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(plan_to_json(plan)), encoding="utf-8")
        return path, plan

    def write(self, path: Path, plan: Plan) -> Path:
        path.write_text(json.dumps(plan_to_json(plan)), encoding="utf-8")
        return path

    def test_is_loaded_as_it_was(self, saved: tuple[Path, Plan]) -> None:
        path, plan = saved
        assert load_plan(path, TWO_3090) == plan

    def test_for_more_cards_is_refused(self, saved: tuple[Path, Plan]) -> None:
        path, plan = saved
        used = replace(plan.placement, tensor_split=(0, 35))
        self.write(path, replace(plan, placement=used))
        with pytest.raises(LocalMistralError, match=r"is for 2 cards.* use 1 here"):
            load_plan(path, current_machine(["3090"], "64GiB"))

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_has_an_entry_for_each_card_that_is_here(
        self, count: int, saved: tuple[Path, Plan]
    ) -> None:
        path, plan = saved
        used = replace(plan.placement, tensor_split=(35, 0), gpu_layers=35)
        self.write(path, replace(plan, placement=used))
        loaded = load_plan(path, current_machine([f"{count}x3090"], "64GiB"))
        assert loaded.placement.tensor_split == (35, 0, 0)[:count]
        assert len(loaded.devices) == count + 1
        assert (loaded.devices[0], loaded.devices[-1]) == (plan.devices[0], plan.devices[-1])
        assert all(device.used_bytes == 0 for device in loaded.devices[2:-1])

    def test_whose_file_has_gone_or_changed_is_refused(self, saved: tuple[Path, Plan]) -> None:
        path, plan = saved
        gone = replace(plan.files[0], path=str(path.with_name("gone.gguf")))
        changed = replace(plan.files[0], bytes=plan.files[0].bytes + 1)
        for file in (gone, changed, replace(gone, path="\x00")):
            self.write(path, replace(plan, files=(file,)))
            with pytest.raises(ModelNotFoundError, match="not on this disk with its") as refusal:
                load_plan(path, TWO_3090)
            assert refusal.value.hint == "localmistral list"

    def test_of_a_model_that_was_fetched_since_finds_it(
        self, on_disk: Path, tmp_path: Path
    ) -> None:
        plan = plan_model("ministral-3-8b:Q4_K_M", PlanRequest(), TWO_3090)
        path = self.write(tmp_path / "plan.json", plan)
        with pytest.raises(ModelNotFoundError) as refusal:
            load_plan(path, TWO_3090)
        assert refusal.value.hint == "localmistral pull ministral-3-8b:Q4_K_M"
        on_disk.rename(on_disk.with_name("Ministral-3-8B-Instruct-2512-Q4_K_M.gguf"))
        loaded = load_plan(path, TWO_3090)
        assert loaded.is_local
        assert Path(loaded.files[0].path).is_file()
        assert replace(loaded, files=plan.files, is_local=False) == plan
