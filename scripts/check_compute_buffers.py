"""Compare predicted compute buffers with llama.cpp's own dry loads, over random placements.

    python scripts/check_compute_buffers.py [--cases 200] [--seed 1] [--model small-4]

Devices are RPC servers on loopback; RPC pipelines by itself, since its devices have events. Half of
the cases run with devices that, like CUDA's, compute with weights in RAM when a batch is large:
ggml asks a device for that (`offload_op`), and the question is answered here in its place. What
only CUDA does beside, f16 copies of a quantised cache, no RPC device can show.
Prints the residuals by kind of placement, and every case that is off by more than the aim.
"""

import argparse
import ctypes
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# the servers and the GGUF writer are the tests' own
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from make_header_gguf import MODELS, build_files, write_files
from rpc_servers import RpcProcess, start_rpc

from localmistral.engine import EngineSettings
from localmistral.engine.dry_load import dry_load
from localmistral.fit.machine import GIB, MIB, Cpu, Gpu, Machine, Ram
from localmistral.fit.memory import measure
from localmistral.fit.placement import Placement
from localmistral.fit.plan import Load
from localmistral.models.gguf import read_shape

MOST_UNDER_BYTES = MIB
MOST_OVER_SHARE = 0.1
MOST_OVER_SHARE_COPIED = 0.19
"""Where a card copies experts from RAM: a plan counts the copy beside all else, to be safe."""
LIKE_CUDA = "vulkan"
"""The planner's name for a backend that pipelines and offloads, and makes no f16 copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model on so many cards; `split` are layers per card, the output counted as one."""

    model: str
    split: tuple[int, ...]
    context: int = 32768
    parallel: int = 1
    ubatch: int = 512
    kv_type: str = "f16"
    experts: tuple[int, ...] = ()
    flash_attention: bool = True
    backend: str = "rpc"

    @property
    def placement(self) -> Placement:
        return Placement(
            gpu_layers=sum(self.split), tensor_split=self.split, cpu_expert_layers=self.experts
        )

    @property
    def kind(self) -> str:
        whole = sum(self.split) > MODELS[self.model].layer_count
        place = "experts in RAM" if self.experts else "whole" if whole else "layers in RAM"
        return f"{self.model}, {place}, {self.backend}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Bytes of the compute buffers of the cards, predicted and as llama.cpp says."""

    case: Case
    predicted: tuple[int, ...]
    actual: tuple[int, ...]

    @property
    def most_under_bytes(self) -> int:
        return max(a - p for p, a in zip(self.predicted, self.actual, strict=True))

    @property
    def most_over_share(self) -> float:
        pairs = zip(self.predicted, self.actual, strict=True)
        return max((p - a) / max(a, MIB) for p, a in pairs)

    @property
    def is_within_aim(self) -> bool:
        is_copied = bool(self.case.experts) and self.case.backend == LIKE_CUDA
        most_over = MOST_OVER_SHARE_COPIED if is_copied else MOST_OVER_SHARE
        return self.most_under_bytes <= MOST_UNDER_BYTES and self.most_over_share <= most_over


def predict(path: Path, case: Case) -> tuple[int, ...]:
    """The planner's bytes for the compute buffer of each card."""
    card = Gpu(
        name="card",
        total_bytes=1024 * GIB,
        free_bytes=1024 * GIB,
        bandwidth=1e12,
        flops=1e14,
        backend=case.backend,
    )
    machine = Machine(
        gpus=(card,) * len(case.split),
        ram=Ram(total_bytes=1024 * GIB, available_bytes=1024 * GIB),
        cpu=Cpu(name="cpu", cores=8),
    )
    load = Load(
        cells=case.context * case.parallel,
        sequences=case.parallel,
        kv_type=case.kv_type,
        ubatch=case.ubatch,
        flash_attention=case.flash_attention,
    )
    rows = measure(read_shape(path), machine, case.placement, load)
    return tuple(row.compute_bytes for row in rows[:-1])


def load_dry(path: Path, case: Case, devices: Sequence[str]) -> tuple[int, ...]:
    """llama.cpp's bytes for the compute buffer of each card; runs where the devices are."""
    offload_large_batches(devices, is_on=case.backend == LIKE_CUDA)
    used = devices[: len(case.split)]
    settings = EngineSettings(
        context=case.context,
        parallel=case.parallel,
        ubatch=case.ubatch,
        kv_type=case.kv_type,
        flash_attention=case.flash_attention,
        gpu_layers=sum(case.split),
        tensor_split=case.split,
        cpu_expert_layers=case.experts,
        devices=tuple(used),
        threads=1,
        repack=False,  # repacked weights are never computed with on a card
    )
    report = dry_load([path], settings)
    return tuple(report.find(name).compute_bytes for name in used)


class _Tensor(ctypes.Structure):
    """The beginning of ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
    )


_MIN_BATCH = 32
_OFFLOAD_OP_SLOT = 11
"""Of ggml_backend_device_i, which a device begins with."""


def _is_large(_device: int, tensor: "ctypes._Pointer[_Tensor]") -> bool:
    """ggml-cuda.cu's answer: whether the operation's batch is large enough to copy weights."""
    from localmistral.engine.backends import base, declare

    name = declare(base, "ggml_op_name", ctypes.c_char_p, ctypes.c_int)(tensor[0].op)
    rows = tensor[0].ne
    if name == b"GET_ROWS":
        return False
    if name == b"MUL_MAT":
        return bool(rows[1] >= _MIN_BATCH)
    if name in (b"MUL_MAT_ID", b"ROPE", b"ROPE_BACK"):
        return bool(rows[2] >= _MIN_BATCH)
    return bool(rows[1] * rows[2] * rows[3] >= _MIN_BATCH)


_offload_op = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.POINTER(_Tensor))(_is_large)


def offload_large_batches(devices: Sequence[str], *, is_on: bool) -> None:
    """Have RPC devices compute with weights in RAM as CUDA devices do, or not."""
    from localmistral.engine.backends import find_device

    address = ctypes.cast(_offload_op, ctypes.c_void_p).value if is_on else None
    for name in devices:
        functions = ctypes.cast(find_device(name), ctypes.POINTER(ctypes.c_void_p))
        functions[_OFFLOAD_OP_SLOT] = address


def draw_case(source: random.Random, models: Sequence[str]) -> Case:
    """Any placement that a planner may come to."""
    model = source.choice(models)
    layers, limit = MODELS[model].layer_count, context_limit(model)
    cards = source.choice((1, 2, 2, 3, 4))
    total = source.choice((layers + 1, layers + 1, source.randint(layers // 3, layers)))
    cuts = sorted(source.sample(range(1, total), cards - 1))
    ends = zip([0, *cuts], [*cuts, total], strict=True)
    experts: tuple[int, ...] = ()
    if model == "small-4" and source.random() < 0.5:
        experts = tuple(sorted(source.sample(range(layers), source.choice((1, 4, 12, layers)))))
    return Case(
        model=model,
        split=tuple(end - start for start, end in ends),
        context=min(limit, source.choice((8, 20, 32, 64, 96, 128, 256)) * 1024),
        parallel=source.choice((1, 1, 2, 3, 8)),
        ubatch=source.choice((128, 256, 512, 1024, 2048)),
        kv_type=source.choice(("f16", "q8_0", "q4_0")),
        experts=experts,
        backend=source.choice(("rpc", LIKE_CUDA)),
    )


def context_limit(model: str) -> int:
    metadata = MODELS[model].metadata
    return int(metadata[f"{metadata['general.architecture']}.context_length"])


def compare(rpc: RpcProcess, path: Path, case: Case) -> Outcome:
    actual = rpc.call(load_dry, path, case, rpc.devices)
    return Outcome(case=case, predicted=predict(path, case), actual=actual)


def show(outcomes: Iterable[Outcome]) -> None:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.case.kind, []).append(outcome)
    print("| placement | cases | most under, MiB | most over, % |\n|---|---|---|---|")
    for kind, found in sorted(groups.items()):
        under = max(outcome.most_under_bytes for outcome in found) / MIB
        over = max(outcome.most_over_share for outcome in found)
        print(f"| {kind} | {len(found)} | {under:.2f} | {100 * over:.2f} |")
        for outcome in found:
            if not outcome.is_within_aim:
                print(f"  {outcome}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", choices=sorted(MODELS), action="append", dest="models")
    options = parser.parse_args()
    source = random.Random(options.seed)
    models = options.models or sorted(MODELS)
    cases = [draw_case(source, models) for _ in range(options.cases)]
    with tempfile.TemporaryDirectory() as folder, start_rpc(4) as rpc:
        paths = {
            model: write_files(Path(folder) / f"{model}.gguf", build_files(model, "q4_K"))[0]
            for model in models
        }
        outcomes = [compare(rpc, paths[case.model], case) for case in cases]
    show(outcomes)
    return 0 if all(outcome.is_within_aim for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
