"""From a plan to its files on this disk: what is asked, what is moved, what is said instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from gguf_writer import tiny_llama
from hub import Hub, Stored, running_hub
from sample_repositories import (
    NEMO,
    SMALL_4,
    check_refusal,
    isolate,
    nemo,
    run_cli,
    shard_path,
    small_4,
    weights,
)

from localmistral.errors import DownloadError, LocalMistralError, ModelNotFoundError
from localmistral.fetching import (
    Download,
    ensure_local,
    name_on_hub,
    prepare_plan,
    refuse_absent,
    refuse_to_ask,
)
from localmistral.fit.plan import Plan, PlannedFile, PlanRequest
from localmistral.models.hub import OnProgress
from localmistral.planning import current_machine, plan_model

DEMO = Path(__file__).resolve().parent.parent / "localmistral" / "data" / "demo.gguf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        isolate(monkeypatch, tmp_path, hub.endpoint)
        yield hub


class Person:
    """Stands for whoever is asked, and for whoever watches."""

    def __init__(self, *, agrees: bool = True) -> None:
        self.agrees = agrees
        self.asked: list[Download] = []
        self.watched: list[str] = []
        self.notes: list[str] = []

    def confirm(self, download: Download) -> None:
        self.asked.append(download)
        if not self.agrees:
            raise refuse_to_ask(download)

    @contextmanager
    def show_transfer(self, name: str) -> Iterator[OnProgress]:
        self.watched.append(name)
        yield lambda _: None


def make_plan(name: str, *, quant: str | None = None, vision: bool = True) -> Plan:
    machine = current_machine(["24GiB"], "64GiB")
    request = PlanRequest(quant=quant, vision=vision)
    return plan_model(name, request, machine, uses_hub=True)


def bring(plan: Plan, person: Person) -> Path:
    local = ensure_local(
        plan,
        confirm=person.confirm,
        show_transfer=person.show_transfer,
        on_note=person.notes.append,
    )
    assert local.complete
    return local.path


def test_a_plans_files_are_asked_for_once_and_brought(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    plan = make_plan("small-4:UD-Q4_K_XL")
    person = Person()
    path = bring(plan, person)
    assert path.name.endswith("UD-Q4_K_XL-00001-of-00003.gguf")
    (download,) = person.asked
    assert download.name == "mistral-small-4:UD-Q4_K_XL"
    assert [file.path for file in download.files] == [
        *(shard_path("UD-Q4_K_XL", n) for n in (1, 2, 3)),
        "mmproj-F16.gguf",
    ]
    assert download.bytes == download.missing_bytes == sum(file.bytes for file in plan.files)
    before = hub.sent_bytes()
    again = make_plan("small-4:UD-Q4_K_XL")
    assert again.is_local
    assert bring(again, person) == path
    assert (len(person.asked), hub.sent_bytes()) == (1, before)


def test_of_two_quants_that_share_shards_the_one_that_was_fetched_is_found(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    for quant in ("UD-Q4_K_M", "UD-Q4_K_XL", "UD-Q4_K_M"):
        path = bring(make_plan(f"small-4:{quant}"), Person())
        assert path.as_posix().endswith(shard_path(quant, 1))


def test_an_incomplete_model_is_called_so_where_it_cannot_be_fetched(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    path = bring(make_plan("small-4:UD-Q4_K_XL"), Person())
    Path(str(path).replace("00001-of", "00002-of")).resolve().unlink()
    for is_offline in (True, False):
        error = refuse_absent("small-4", is_offline=is_offline)
        assert "is incomplete on this disk (shard 2 of 3 is missing), and" in error.message
    assert "'nemo' isn't on this disk, and" in refuse_absent("nemo", is_offline=True).message


def test_without_links_nothing_that_is_here_is_asked_for_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    hub.publish(NEMO, nemo())
    plan, person = make_plan(f"hf:{NEMO}:Q8_0"), Person()
    bring(plan, person)
    bring(plan, person)
    assert len(person.asked) == 1


def test_a_plan_without_vision_brings_no_encoder(hub: Hub) -> None:
    hub.publish(SMALL_4, small_4())
    person = Person()
    bring(make_plan("small-4:UD-IQ3_S", vision=False), person)
    assert [file.path.rpartition("/")[2] for file in person.asked[0].files] == [
        "Mistral-Small-4-119B-2603-UD-IQ3_S.gguf"
    ]


def test_a_no_moves_nothing_and_says_what_to_type(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    plan = make_plan(f"hf:{NEMO}:Q8_0")
    before = hub.sent_bytes()
    with pytest.raises(LocalMistralError, match="downloaded") as caught:
        bring(plan, Person(agrees=False))
    assert caught.value.hint == f"localmistral pull hf:{NEMO}:Q8_0 --yes"
    assert hub.sent_bytes() == before


def test_a_plan_of_estimates_gets_the_files_that_are_there_now(hub: Hub) -> None:
    machine = current_machine(["24GiB"], "64GiB")
    plan = plan_model("small-4:UD-Q4_K_XL", PlanRequest(), machine)
    assert plan.is_estimated
    commit = hub.publish(SMALL_4, small_4())
    download = prepare_plan(plan)
    assert download.commit == commit
    assert download.bytes < 1 << 20
    assert download.files[-1].path == "mmproj-F16.gguf"


def test_a_plan_gets_the_content_it_was_made_for_though_the_repository_moved_on(hub: Hub) -> None:
    first = hub.publish(NEMO, nemo())
    plan = make_plan(f"hf:{NEMO}:Q8_0")
    changed = {**nemo(), "Nemo-Q8_0.gguf": Stored(content=weights(tiny_llama(), 9))}
    hub.publish(NEMO, changed)
    person = Person()
    assert bring(plan, person).read_bytes() == nemo()["Nemo-Q8_0.gguf"].content
    assert (person.asked[0].commit, person.asked[0].revision) == (first, None)
    assert "has changed since" in person.notes[0]


def test_a_new_commit_with_the_same_files_is_the_one_that_is_fetched(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    plan = make_plan(f"hf:{NEMO}:Q8_0")
    second = hub.publish(NEMO, {**nemo(), "README.md": Stored(content=b"hi", lfs=False)})
    download = prepare_plan(plan)
    assert (download.commit, download.revision) == (second, "main")


def test_planned_files_that_have_gone_are_said(hub: Hub) -> None:
    hub.publish(NEMO, nemo())
    plan = make_plan(f"hf:{NEMO}:Q8_0")
    file = PlannedFile(path="/nowhere/model.gguf", bytes=1)
    gone = replace(plan, is_local=True, files=(file,))
    with pytest.raises(ModelNotFoundError, match="no longer where they were"):
        bring(gone, Person())
    by_hand = replace(plan, repository=None, files=(file,))
    with pytest.raises(ModelNotFoundError, match="isn't on this disk or on the Hub"):
        bring(by_hand, Person())


def test_a_hub_that_is_gone_by_then_is_an_error_before_anyone_is_asked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(NEMO, nemo())
    plan = make_plan(f"hf:{NEMO}:Q8_0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    person = Person()
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        bring(plan, person)
    assert person.asked == []


def test_names_are_the_shortest_that_mean_just_that() -> None:
    assert name_on_hub(SMALL_4, "UD-IQ3_S") == "mistral-small-4:UD-IQ3_S"
    assert name_on_hub(SMALL_4, "Q9_9") == f"hf:{SMALL_4}:Q9_9"
    assert name_on_hub("a/b", "UD-IQ3_S") == "hf:a/b:UD-IQ3_S"


# The whole way, by the commands that load.

TOY = "someone/Toy-GGUF"
QUESTION = ("--effort", "none", "--max-tokens", "4", "--context", "1024", "hello")


def test_a_script_that_runs_an_absent_model_is_told_the_command(hub: Hub) -> None:
    hub.publish(TOY, {"Toy-Q8_0.gguf": Stored(content=DEMO.read_bytes())})
    done = run_cli("run", "-m", f"hf:{TOY}", *QUESTION)
    check_refusal(done, 1, "isn't on this disk", f"localmistral pull hf:{TOY} --yes")
    known = run_cli("run", "-m", "ministral-3-3b:Q4_K_M", *QUESTION)
    check_refusal(known, 1, " GiB", "localmistral pull ministral-3-3b:Q4_K_M --yes")


@pytest.mark.slow
def test_a_yes_brings_an_absent_model_and_runs_it(hub: Hub, tmp_path: Path) -> None:
    hub.publish(TOY, {"Toy-Q8_0.gguf": Stored(content=DEMO.read_bytes())})
    done = run_cli("run", "-m", f"hf:{TOY}:Q8_0", "--yes", *QUESTION)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    before = hub.sent_bytes()
    again = run_cli("run", "-m", f"hf:{TOY}", *QUESTION)
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    assert hub.sent_bytes() == before
    (row,) = json.loads(run_cli("list", "--json").stdout)
    assert row["complete"]
    if sys.platform == "linux":  # elsewhere, what is remembered lies in other folders
        (used,) = (tmp_path / "state" / "localmistral" / "used").iterdir()
        said_s = datetime.fromisoformat(row["last_used"]).timestamp()
        assert abs(said_s - used.stat().st_mtime) < 0.001


@pytest.mark.slow
@pytest.mark.parametrize("option", [True, False])
def test_offline_an_absent_model_fails_with_the_reason_and_a_present_one_runs(
    option: bool, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(TOY, {"Toy-Q8_0.gguf": Stored(content=DEMO.read_bytes())})
    assert run_cli("pull", f"hf:{TOY}:Q8_0", "--yes").returncode == 0
    seen = len(hub.seen)
    if not option:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = ("--offline",) if option else ()
    there = run_cli("run", "-m", f"hf:{TOY}:Q8_0", *offline, *QUESTION)
    assert there.returncode == 0, there.stderr
    absent = run_cli("run", "-m", "small-4:UD-IQ3_S", "--yes", *offline, *QUESTION)
    check_refusal(absent, 1, "isn't on this disk", "HF_HUB_OFFLINE")
    assert len(hub.seen) == seen
