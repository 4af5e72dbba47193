"""How many bytes llama.cpp put where, read from the log of a load.

The log rounds to 0.01 MiB, so a figure is right to about 5 KB a line. Knows nothing of plans.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from localmistral.engine.backends import CPU
from localmistral.engine.library import LogLine

_SIZE = re.compile(
    r"^\w+: +(?P<buffer>\S.*?) +(?:DSV4 \w+ )?(?P<part>model|KV|RS|state|compute|output) "
    r"buffer size = +(?P<mib>[\d.]+) MiB"
)
_COPIES = re.compile(r"sched copies = (\d+)")
_LAYER = re.compile(r"^load_tensors: layer +\d+ assigned to device (\S+?),")
_PARTS = {
    "model": "weights", "KV": "kv", "RS": "kv", "state": "kv", "compute": "compute",
    "output": "output",
}  # fmt: skip
_RESERVED = ("compute", "output")
"""Parts that are logged anew when they are made anew: the last line holds, others add up."""
_MAPPED = "CPU_Mapped"
_META = "Meta("
"""What llama.cpp calls all devices together in split mode tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBuffers:
    """Bytes on one device, by what they are for.

    On the CPU, mmap'ed weights count with the whole stretch of the file from the first to the
    last tensor used, which may hold other devices' tensors too; without mmap they are exact.
    `output_bytes` are the logits that the program reads. In split mode tensor every device has
    the figures of the one with the most: llama.cpp tells no other.
    """

    name: str
    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load took, per device in the order asked for, the CPU last.

    `layer_devices` has an entry a layer and one for the output ("Meta()" in split mode tensor).
    `graph_copies` is above 1 where llama.cpp runs the devices as a pipeline, with as many copies
    of the inputs. `is_mapped`: the CPU's weights are stretches of mmap'ed files.
    """

    buffers: tuple[DeviceBuffers, ...]
    layer_devices: tuple[str, ...]
    graph_copies: int
    is_mapped: bool

    def find(self, name: str) -> DeviceBuffers:
        """The bytes on the device of that name, zeros where nothing is."""
        found = (buffers for buffers in self.buffers if buffers.name == name)
        return next(found, DeviceBuffers(name=name))

    @property
    def kv_bytes(self) -> int:
        """The cache's, of all devices."""
        return sum(buffers.kv_bytes for buffers in self.buffers)

    @property
    def is_offloaded(self) -> bool:
        """Whether anything but the CPU computes."""
        return any(device != CPU for device in self.layer_devices)


def read_report(lines: Iterable[LogLine], devices: Mapping[str, str]) -> LoadReport:
    """The report of the log of one load; `devices` maps names to those of their buffers."""
    texts = [text for _, text in lines]
    layers = [found[1] for text in texts if (found := _LAYER.match(text))]
    copies = [int(found[1]) for text in texts if (found := _COPIES.search(text))]
    buffers = _read_sizes(texts)
    sums: dict[tuple[str, str], float] = {}
    for (buffer, part), mib in buffers.items():
        for device in find_owners(buffer, devices):
            sums[device, part] = sums.get((device, part), 0.0) + mib
    names = dict.fromkeys([*devices, *(device for device, _ in sums)])
    names.pop(CPU, None)
    return LoadReport(
        buffers=tuple(_collect(name, sums) for name in (*names, CPU)),
        layer_devices=tuple(layers),
        graph_copies=copies[-1] if copies else 1,
        is_mapped=any(buffer == _MAPPED for buffer, _ in buffers),
    )


def _read_sizes(texts: Iterable[str]) -> dict[tuple[str, str], float]:
    """MiB by the buffer's name and the part."""
    sizes: dict[tuple[str, str], float] = {}
    for text in texts:
        if found := _SIZE.match(text):
            key = found["buffer"], _PARTS[found["part"]]
            before = 0.0 if key[1] in _RESERVED else sizes.get(key, 0.0)
            sizes[key] = before + float(found["mib"])
    return sizes


def _collect(name: str, mib: Mapping[tuple[str, str], float]) -> DeviceBuffers:
    sizes = {f"{part}_bytes": round(mib.get((name, part), 0.0) * 2**20) for part in _PARTS.values()}
    return DeviceBuffers(name=name, **sizes)


def find_owners(buffer: str, devices: Mapping[str, str]) -> tuple[str, ...]:
    """The device of a buffer, or all devices for those of split mode tensor.

    `CUDA0` and `MTL0_Mapped` are devices', `CUDA_Host` and `CPU_REPACK` the CPU's; what is nobody's
    keeps its own name.
    """
    if buffer.startswith(_META):
        return tuple(devices)
    for device, own in devices.items():
        if buffer == own or buffer.startswith(own + "_"):
            return (device,)
    is_ram = buffer == CPU or buffer.startswith(CPU + "_") or buffer.endswith("_Host")
    return (CPU,) if is_ram else (buffer,)
