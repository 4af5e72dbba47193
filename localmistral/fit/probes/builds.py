"""Which build of llama-cpp-python a machine's cards need, as a command to paste.

Its authors keep ready wheels in an index of their own, a folder for each backend; where none fits,
the same package is built from source with the maker's toolkit. Installs nothing itself.
"""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from localmistral.fit.probes.found import FoundCard

WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"
CUDA_WHEELS = ((13, 2), (13, 0), (12, 5), (12, 4), (12, 3), (12, 2), (12, 1), (11, 8))
"""Newest first. A driver runs what was built for its own CUDA version or an older one."""
_OLDEST_CAPABILITY = {13: (7, 5), 12: (6, 0), 11: (6, 0)}
"""By CUDA's generation, the oldest cards that its wheels are built for."""
BACKENDS = {"nvidia": "CUDA", "amd": "ROCm or Vulkan", "intel": "Vulkan"}
"""What llama.cpp is built with for a maker's cards, for people."""
_PACKAGE = "llama-cpp-python"


def mending_command(
    cards: Sequence[FoundCard],
    *,
    cuda: tuple[int, int] | None = None,
    system: str | None = None,
    has_rocm: bool | None = None,
) -> str:
    """What to run so that llama.cpp can use `cards`, all of one maker.

    `cuda` is the newest version that the driver runs. `system` and `has_rocm` are this machine's
    unless given.
    """
    system = system or platform.system()
    vendor = cards[0].vendor
    if vendor == "nvidia":
        wheel = choose_cuda_wheel(cuda, [card.compute_capability for card in cards])
        return _install(wheel) if wheel else _build("-DGGML_CUDA=on", system)
    has_rocm = Path("/opt/rocm").is_dir() if has_rocm is None else has_rocm
    if vendor == "amd" and has_rocm and system == "Linux":
        return _build("-DGGML_HIP=on", system)
    return _install("vulkan")


def rebuilding_command() -> str:
    """What to run to have llama.cpp built anew for the processor of this machine."""
    return (
        f"{_python()} -m pip install --force-reinstall --no-cache-dir --no-binary {_PACKAGE} "
        f"{_PACKAGE}"
    )


def choose_cuda_wheel(
    cuda: tuple[int, int] | None, capabilities: Sequence[tuple[int, int] | None]
) -> str | None:
    """The folder of the newest wheels that driver and cards can run; None if there is none."""
    oldest = min((capability for capability in capabilities if capability), default=None)
    for version in CUDA_WHEELS:
        fits_cards = oldest is None or oldest >= _OLDEST_CAPABILITY[version[0]]
        if cuda is not None and version <= cuda and fits_cards:
            return f"cu{version[0]}{version[1]}"
    return None


def _install(folder: str) -> str:
    return (
        f"{_python()} -m pip install --force-reinstall --no-cache-dir --prefer-binary {_PACKAGE} "
        f"--extra-index-url {WHEELS}/{folder}"
    )


def _build(option: str, system: str) -> str:
    """From source, in the words of the system's usual shell."""
    install = f"{_python()} -m pip install --force-reinstall --no-cache-dir {_PACKAGE}"
    if system == "Windows":
        return f'$env:CMAKE_ARGS="{option}"; & {install}'
    return f'CMAKE_ARGS="{option}" {install}'


def _python() -> str:
    """The interpreter that this program runs in: any other pip would mend something else."""
    python = sys.executable or "python"
    return subprocess.list2cmdline([python]) if sys.platform == "win32" else shlex.quote(python)
