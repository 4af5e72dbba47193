"""Plans as JSON: exact both ways, and anything else refused in a sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.errors import LocalMistralError
from localmistral.fit.placement import Placement
from localmistral.fit.plan import (
    KV_TYPES,
    SPLIT_MODES,
    Alternative,
    DeviceMemory,
    Plan,
    PlannedFile,
    Prediction,
)
from localmistral.fit.plan_json import MAX_PLAN_BYTES, plan_from_json, plan_to_json, read_plan

BYTES = st.integers(0, 2**48)
SPEEDS = st.floats(0, 1e5)
TEXTS = st.text(max_size=20)
SIZES = dict.fromkeys(
    ("budget_bytes", "weights_bytes", "mmproj_bytes", "kv_bytes", "compute_bytes"), BYTES
)


def files() -> st.SearchStrategy[PlannedFile]:
    return st.builds(PlannedFile, path=TEXTS, bytes=BYTES, sha256=st.none() | st.just("a" * 64))


def alternatives() -> st.SearchStrategy[Alternative]:
    counts = dict.fromkeys(("context", "gpu_bytes", "ram_bytes", "download_bytes"), BYTES)
    speeds = {f"{part}_tokens_per_second": SPEEDS for part in ("decode", "prefill")}
    texts = dict.fromkeys(("change", "model", "quant", "kv_type"), TEXTS)
    return st.builds(Alternative, **counts, **speeds, **texts)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    split = tuple(draw(st.lists(st.integers(0, 40), max_size=4)))
    return Plan(
        model=draw(TEXTS),
        quant=draw(TEXTS),
        repository=draw(st.none() | TEXTS),
        revision=draw(st.none() | TEXTS),
        files=tuple(draw(st.lists(files(), min_size=1, max_size=3))),
        context=256 * draw(st.integers(1, 4096)),
        parallel=draw(st.integers(1, 64)),
        kv_type=draw(st.sampled_from(KV_TYPES)),
        placement=Placement(
            gpu_layers=sum(split),
            tensor_split=split,
            cpu_expert_layers=tuple(sorted(draw(st.sets(st.integers(0, 87), max_size=5)))),
            split_mode=draw(st.sampled_from(SPLIT_MODES)),
        ),
        flash_attention=draw(st.booleans()),
        batch=draw(st.integers(1, 4096)),
        ubatch=draw(st.integers(1, 4096)),
        threads=draw(st.integers(0, 256)),
        mmap=draw(st.booleans()),
        repack=draw(st.booleans()),
        devices=tuple(
            draw(st.builds(DeviceMemory, name=TEXTS, **SIZES)) for _ in range(len(split) + 1)
        ),
        predicted=Prediction(
            depth=draw(st.integers(0, 2**24)),
            decode_tokens_per_second=draw(SPEEDS),
            prefill_tokens_per_second=draw(SPEEDS),
        ),
        reasons=tuple(draw(st.lists(TEXTS, max_size=3))),
        alternatives=tuple(draw(st.lists(alternatives(), max_size=2))),
        is_estimated=draw(st.booleans()),
        is_local=draw(st.booleans()),
    )


SAMPLE = Plan(
    model="m",
    quant="Q8_0",
    repository=None,
    revision=None,
    files=(PlannedFile(path="m.gguf", bytes=10), PlannedFile(path="mmproj.gguf", bytes=5)),
    context=32768,
    parallel=1,
    kv_type="f16",
    placement=Placement(gpu_layers=37, tensor_split=(20, 17), cpu_expert_layers=(0, 1, 8)),
    flash_attention=True,
    batch=2048,
    ubatch=512,
    threads=8,
    mmap=True,
    repack=False,
    devices=tuple(
        DeviceMemory(
            name=name,
            budget_bytes=9,
            weights_bytes=4,
            mmproj_bytes=1,
            kv_bytes=1,
            compute_bytes=1,
        )
        for name in ("GPU 0", "GPU 1", "CPU")
    ),
    predicted=Prediction(
        depth=4096, decode_tokens_per_second=41.25, prefill_tokens_per_second=1000.0
    ),
    reasons=("Because.",),
)
DOCUMENT = plan_to_json(SAMPLE)


@given(plans())
def test_a_plan_comes_back_from_its_json_as_it_was(plan: Plan) -> None:
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_the_document_has_the_promised_keys() -> None:
    assert DOCUMENT.keys() >= {
        "model",
        "quant",
        "files",
        "download_bytes",
        "context",
        "kv_type",
        "split_mode",
        "gpu_layers",
        "tensor_split",
        "cpu_expert_layers",
        "flash_attention",
        "batch",
        "ubatch",
        "threads",
        "devices",
        "predicted",
        "reasons",
        "alternatives",
    }
    assert DOCUMENT["download_bytes"] == 15
    assert DOCUMENT["files"][0] == {"path": "m.gguf", "bytes": 10, "sha256": None}
    assert DOCUMENT["devices"][2] == {
        "name": "CPU",
        "budget_bytes": 9,
        "weights_bytes": 4,
        "mmproj_bytes": 1,
        "kv_bytes": 1,
        "compute_bytes": 1,
    }
    assert DOCUMENT["predicted"] == {
        "depth": 4096,
        "decode_tokens_per_second": 41.25,
        "prefill_tokens_per_second": 1000.0,
    }


OPTIONAL = ("download_bytes", "embeddings")


def test_a_plan_saved_before_embedding_models_is_one_of_a_model_that_writes() -> None:
    older = {key: value for key, value in DOCUMENT.items() if key != "embeddings"}
    assert not plan_from_json(older).only_embeds


@pytest.mark.parametrize("key", [key for key in DOCUMENT if key not in OPTIONAL])
def test_a_document_without_one_of_its_fields_is_refused_by_name(key: str) -> None:
    document = {name: value for name, value in DOCUMENT.items() if name != key}
    with pytest.raises(LocalMistralError, match=f"it has no {key}"):
        plan_from_json(document)


WELCOME = [
    *(
        (key, True)
        for key in ("flash_attention", "mmap", "repack", "local", "estimated", "embeddings")
    ),
    *((key, "\x00x") for key in ("model", "quant", "repository", "revision")),
]
WRONG = [
    (key, wrong)
    for key in DOCUMENT
    for wrong in ({"a": 1}, -1, 1.5, True, "\x00x", [None], [[1]])
    if key != "download_bytes" and (key, wrong) not in WELCOME
]


@pytest.mark.parametrize(("key", "wrong"), WRONG)
def test_a_field_of_another_type_is_refused(key: str, wrong: Any) -> None:
    with pytest.raises(LocalMistralError, match=r"^the document is no plan of localmistral: "):
        plan_from_json({**DOCUMENT, key: wrong})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"gpu_layers": 36}, "its tensor_split has 37 layers, not 36"),
        ({"tensor_split": [37]}, "it has 3 devices for 1 cards and the CPU"),
        ({"context": 1000}, "its context 1000 is no multiple of 256"),
        ({"context": 0}, "its context is 0, not 256 or more"),
        ({"kv_type": "q3_0"}, "its kv_type is 'q3_0', not one of f32, f16"),
        ({"split_mode": "row"}, "its split_mode is 'row', not one of none, layer, tensor"),
        ({"cpu_expert_layers": [1, 1]}, "its cpu_expert_layers don't ascend"),
        ({"files": []}, "it names no files"),
        ({"files": [{"path": "x", "bytes": "1", "sha256": None}]}, r"files\[0\].bytes is \"1\""),
        ({"threads": 2**64}, "its threads is 18446744073709551616"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LocalMistralError, match=complaint):
        plan_from_json({**DOCUMENT, **change})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, "\udcff"])
def test_a_file_that_is_something_else_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(LocalMistralError, match=r"^other\.json is no plan of localmistral") as no:
        read_plan(path)
    assert "plan MODEL --json" in no.value.hint


def test_a_model_given_as_the_plan_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.truncate(MAX_PLAN_BYTES + 1)
    with pytest.raises(LocalMistralError, match=r"model\.gguf is no plan.* it has 4,194,305 bytes"):
        read_plan(path)


def test_a_missing_plan_and_a_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(LocalMistralError, match=r"The plan none\.json can't be read"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(LocalMistralError, match="can't be read"):
        read_plan(tmp_path)


def test_a_saved_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = replace(SAMPLE, reasons=("Größe “ß”.",))
    path.write_text(json.dumps(plan_to_json(plan), ensure_ascii=False), encoding="utf-8")
    assert read_plan(path) == plan
    path.write_text(json.dumps({**DOCUMENT, "later": 1}), encoding="utf-8")
    assert read_plan(path) == SAMPLE, "a field of a later version is no fault"
