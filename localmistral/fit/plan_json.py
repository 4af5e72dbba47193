"""A Plan as JSON and back, exactly: `plan --json` writes it, `--plan FILE` reads it.

Reading is strict about everything a load depends on. Knows no machine: whether a plan fits the one
at hand is for others to see.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from localmistral.errors import LocalMistralError
from localmistral.fit.placement import Placement
from localmistral.fit.plan import (
    CONTEXT_MULTIPLE,
    KV_TYPES,
    SPLIT_MODES,
    Alternative,
    DeviceMemory,
    Plan,
    PlannedFile,
    Prediction,
)

MAX_PLAN_BYTES = 4 << 20
"""Plans take some 10 kB; a file beyond this is something else, a model perhaps."""
_PLANS_COME_FROM = "Write one with: localmistral plan MODEL --json > FILE"

_T = TypeVar("_T")
_FLAT = (
    "model",
    "quant",
    "repository",
    "revision",
    "context",
    "parallel",
    "kv_type",
    "flash_attention",
    "batch",
    "ubatch",
    "threads",
    "mmap",
    "repack",
)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan in plain types, in the order in which a person would read it.

    `files` holds the image encoder's, if it is part of the plan; `download_bytes` is their sum,
    also where they are on the disk already (`local`). `embeddings`: that is all the model makes.
    """
    placement = plan.placement
    flat = {name: getattr(plan, name) for name in _FLAT}
    return {
        "model": flat.pop("model"),
        "quant": flat.pop("quant"),
        "repository": flat.pop("repository"),
        "revision": flat.pop("revision"),
        "files": [asdict(file) for file in plan.files],
        "download_bytes": sum(file.bytes for file in plan.files),
        "local": plan.is_local,
        "estimated": plan.is_estimated,
        "embeddings": plan.only_embeds,
        **flat,
        "split_mode": placement.split_mode,
        "gpu_layers": placement.gpu_layers,
        "tensor_split": list(placement.tensor_split),
        "cpu_expert_layers": list(placement.cpu_expert_layers),
        "devices": [asdict(device) for device in plan.devices],
        "predicted": asdict(plan.predicted),
        "reasons": list(plan.reasons),
        "alternatives": [asdict(alternative) for alternative in plan.alternatives],
    }


def read_plan(path: Path) -> Plan:
    """A saved plan; LocalMistralError in one sentence for a file that isn't one."""
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise _refusal(path.name, f"it has {path.stat().st_size:,} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).rstrip(".")
        raise LocalMistralError(
            f"The plan {path.name} can't be read: {reason}.", _PLANS_COME_FROM
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise _refusal(path.name, "it isn't JSON") from error
    return plan_from_json(document, path.name)


def plan_from_json(document: Any, name: str = "the document") -> Plan:
    """The plan that `plan_to_json` made `document` of; `name` is for the error's sentence."""
    top = _Object(document, "", name)
    placement = Placement(
        gpu_layers=top.count("gpu_layers"),
        tensor_split=top.counts("tensor_split"),
        cpu_expert_layers=top.counts("cpu_expert_layers"),
        split_mode=top.choice("split_mode", SPLIT_MODES),
    )
    plan = Plan(
        model=top.text("model"),
        quant=top.text("quant"),
        repository=top.optional_text("repository"),
        revision=top.optional_text("revision"),
        files=tuple(_file(item) for item in top.objects("files")),
        context=top.count("context", minimum=CONTEXT_MULTIPLE),
        parallel=top.count("parallel", minimum=1),
        kv_type=top.choice("kv_type", KV_TYPES),
        placement=placement,
        flash_attention=top.take("flash_attention", bool),
        batch=top.count("batch", minimum=1),
        ubatch=top.count("ubatch", minimum=1),
        threads=top.count("threads"),
        mmap=top.take("mmap", bool),
        repack=top.take("repack", bool),
        devices=tuple(_device(item) for item in top.objects("devices")),
        predicted=_prediction(top.object("predicted")),
        reasons=tuple(top.texts("reasons")),
        alternatives=tuple(_alternative(item) for item in top.objects("alternatives")),
        is_estimated=top.take("estimated", bool),
        is_local=top.take("local", bool),
        # plans saved before there were such models don't say
        only_embeds="embeddings" in top.values and top.take("embeddings", bool),
    )
    _check(plan, top)
    return plan


def _check(plan: Plan, top: "_Object") -> None:
    """What the parts must have in common for a load to be possible."""
    split, layers = plan.placement.tensor_split, plan.placement.cpu_expert_layers
    if sum(split) != plan.placement.gpu_layers:
        top.fail(f"its tensor_split has {sum(split)} layers, not {plan.placement.gpu_layers}")
    if len(plan.devices) != len(split) + 1:
        top.fail(f"it has {len(plan.devices)} devices for {len(split)} cards and the CPU")
    if plan.context % CONTEXT_MULTIPLE:
        top.fail(f"its context {plan.context} is no multiple of {CONTEXT_MULTIPLE}")
    if list(layers) != sorted(set(layers)):
        top.fail("its cpu_expert_layers don't ascend")
    if not plan.files:
        top.fail("it names no files")


class _Object:
    """A JSON object whose fields are taken by name and type."""

    def __init__(self, values: Any, where: str, name: str) -> None:
        self.where, self.name = where, name
        if not isinstance(values, dict):
            self.fail(f"{where or 'it'} is no JSON object")
        self.values: dict[str, Any] = values

    def fail(self, problem: str) -> NoReturn:
        raise _refusal(self.name, problem)

    def take(self, key: str, kind: type[_T]) -> _T:
        path = f"{self.where}.{key}" if self.where else key
        if key not in self.values:
            self.fail(f"it has no {path}")
        value = self.values[key]
        # bool is an int to Python, and a whole number may stand for a float.
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.fail(f"its {path} is {json.dumps(value):.40}, not of type {kind.__name__}")
        return value

    def text(self, key: str) -> str:
        return self.take(key, str)

    def optional_text(self, key: str) -> str | None:
        return None if self.values.get(key, "") is None else self.text(key)

    def count(self, key: str, *, minimum: int = 0) -> int:
        value = self.take(key, int)
        if not minimum <= value < 1 << 63:
            self.fail(f"its {key} is {value}, not {minimum} or more")
        return value

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in known:
            self.fail(f"its {key} is {value[:40]!r}, not one of {', '.join(known)}")
        return value

    def speed(self, key: str) -> float:
        value = self.take(key, float)
        if not 0 <= value < float("inf"):
            self.fail(f"its {key} is {value}")
        return value

    def counts(self, key: str) -> tuple[int, ...]:
        items = self.take(key, list)
        return tuple(_Object({key: item}, "", self.name).count(key) for item in items)

    def texts(self, key: str) -> tuple[str, ...]:
        items = self.take(key, list)
        return tuple(_Object({key: item}, "", self.name).text(key) for item in items)

    def object(self, key: str) -> "_Object":
        return _Object(self.take(key, dict), key, self.name)

    def objects(self, key: str) -> list["_Object"]:
        items = self.take(key, list)
        return [_Object(item, f"{key}[{n}]", self.name) for n, item in enumerate(items)]


def _file(item: _Object) -> PlannedFile:
    return PlannedFile(
        path=item.text("path"), bytes=item.count("bytes"), sha256=item.optional_text("sha256")
    )


def _device(item: _Object) -> DeviceMemory:
    sizes = [field.name for field in fields(DeviceMemory) if field.name != "name"]
    return DeviceMemory(name=item.text("name"), **{key: item.count(key) for key in sizes})


def _prediction(item: _Object) -> Prediction:
    return Prediction(
        depth=item.count("depth"),
        decode_tokens_per_second=item.speed("decode_tokens_per_second"),
        prefill_tokens_per_second=item.speed("prefill_tokens_per_second"),
    )


def _alternative(item: _Object) -> Alternative:
    return Alternative(
        change=item.text("change"),
        model=item.text("model"),
        quant=item.text("quant"),
        context=item.count("context"),
        kv_type=item.text("kv_type"),
        decode_tokens_per_second=item.speed("decode_tokens_per_second"),
        prefill_tokens_per_second=item.speed("prefill_tokens_per_second"),
        gpu_bytes=item.count("gpu_bytes"),
        ram_bytes=item.count("ram_bytes"),
        download_bytes=item.count("download_bytes"),
    )


def _refusal(name: str, problem: str) -> LocalMistralError:
    return LocalMistralError(f"{name} is no plan of localmistral: {problem}.", _PLANS_COME_FROM)
