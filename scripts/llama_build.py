"""Decides how llama.cpp is built on this machine, and reads what a failed build says.

Standard library only. Builds nothing, installs nothing and knows no paths of the repository.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NAMES = {"cpu": "CPU", "cuda": "CUDA", "metal": "Metal"}
MINUTES = {"cpu": "5-10", "cuda": "15-40", "metal": "5-10"}
STANDARD_TOOLKIT_FOLDERS = ("/usr/local/cuda/bin",)

# Run by the Python that has llama-cpp-python. The RPC backend makes llama_supports_gpu_offload()
# true on a machine without any GPU, so CUDA is told by its library file.
FEATURE_PROBE = """
import pathlib, llama_cpp
files = (pathlib.Path(llama_cpp.__file__).parent / "lib").iterdir()
print("loads")
print("rpc" if llama_cpp.llama_supports_rpc() else "")
print("cuda" if any("ggml-cuda" in file.name for file in files) else "")
"""

NETWORK_HINT = "Check the network (and HTTPS_PROXY, if you need one), then run this again."
CMAKE_HINT = "Install CMake and run this again."
CUDA_HINT = "Mend the CUDA toolkit, or build without it: set LOCALMISTRAL_BUILD=cpu"
COMPILER_HINTS = {
    "linux": "Install a C++ compiler: sudo apt install build-essential "
    "(Fedora: sudo dnf install gcc-c++)",
    "darwin": "Install a C++ compiler: xcode-select --install",
    "win32": "Install a C++ compiler: Visual Studio Build Tools with the workload "
    "'Desktop development with C++'",
}
# (text in the log, what it means); causes stand before what follows from them.
FAILURES = (
    ("No space left on device", "disk"),
    ("nvcc fatal", "cuda"),
    ("CMAKE_CUDA_COMPILER", "cuda"),
    ("CUDA Toolkit not found", "cuda"),
    ("Killed signal", "memory"),
    ("CMAKE_CXX_COMPILER", "compiler"),
    ("CMAKE_C_COMPILER", "compiler"),
    ("CMake must be installed", "cmake"),
    ("Could not find CMake", "cmake"),
    ("Failed to establish a new connection", "network"),
    ("Could not fetch URL", "network"),
    ("Read timed out", "network"),
    ("No matching distribution found", "network"),
    ("ensurepip is not", "venv"),
    ("No module named ensurepip", "venv"),
)


class SetupError(Exception):
    """The environment can't be made; `hint` is what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


# Plain frozen dataclasses in these scripts: slots and kw_only would keep Python 3.9 from getting
# as far as the sentence that says which Python is needed.
@dataclass(frozen=True)
class Build:
    """How llama.cpp is built: `kind` is cpu, cuda or metal; `reason` is for the user."""

    kind: str
    reason: str


def find_toolkit(
    environ: Mapping[str, str], standard: tuple[str, ...] = STANDARD_TOOLKIT_FOLDERS
) -> str:
    """Path of nvcc, or an empty string."""
    homes = [environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if environ.get(name)]
    folders = [environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes), *standard]
    return shutil.which("nvcc", path=os.pathsep.join(folders)) or ""


def has_driver() -> bool:
    """Whether NVIDIA's driver library loads: what a CUDA build needs to be loaded itself."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def choose_build(
    requested: str, *, platform: str, toolkit: str, driver: bool, installed: str = ""
) -> Build:
    """The build for this machine.

    `requested` is auto, cpu or cuda; `toolkit` the path of nvcc or empty. `installed` is the kind
    made earlier: a CUDA build stays one when only nvcc has gone from PATH.
    Raises SetupError for a request that can't work.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise SetupError(
            f"LOCALMISTRAL_BUILD={requested} is not known.", "Set it to auto, cpu or cuda."
        )
    if requested == "cuda" and not driver:
        raise SetupError(
            "LOCALMISTRAL_BUILD=cuda is set, but no NVIDIA driver is here, and a CUDA build "
            "can't be loaded without one.",
            "Install the driver, or set LOCALMISTRAL_BUILD=cpu",
        )
    if requested != "auto":
        return Build(requested, f"as LOCALMISTRAL_BUILD={requested} asks")
    if platform == "darwin":
        return Build("metal", "the Mac's own GPU")
    if driver and (toolkit or installed == "cuda"):
        return Build("cuda", "NVIDIA toolkit and driver found")
    if toolkit:
        return Build("cpu", "CUDA toolkit found, but no NVIDIA driver")
    if driver:
        return Build("cpu", "NVIDIA driver found, but no CUDA toolkit: install it to use the GPU")
    return Build("cpu", "no NVIDIA toolkit or driver found")


def cmake_args(kind: str, user_args: str, *, platform: str) -> str:
    """CMAKE_ARGS for llama.cpp; the user's own come last, so that they win."""
    flags = ["-DGGML_RPC=ON"]
    if kind == "cuda":
        flags.append("-DGGML_CUDA=on")
    if kind == "cpu" and platform == "darwin":
        flags.append("-DGGML_METAL=off")  # there it would be on by itself
    return " ".join([*flags, user_args]).strip()


def build_fault(kind: str, user_args: str, features: frozenset[str]) -> str:
    """What is wrong with the library as installed; empty when it is what was asked for.

    `features` are the words that FEATURE_PROBE printed. With flags of the user's own, a backend
    more than expected is no fault.
    """
    if "loads" not in features:
        return "can't be loaded"
    if "rpc" not in features:
        return "lacks the RPC backend"
    if kind == "cuda" and "cuda" not in features:
        return "lacks the CUDA backend"
    if kind == "cpu" and "cuda" in features and not user_args:
        return "is a CUDA build"
    return ""


def progress_note(line: str, kind: str, elapsed_s: float) -> str:
    """What one line of pip's output is worth telling the user; mostly nothing.

    pip repeats "still running" every minute of a build when it doesn't write to a terminal.
    """
    if "Building wheel for llama" not in line:
        return ""
    if "started" in line:
        backend = "" if kind == "cpu" else f" with {NAMES[kind]}"
        minutes = MINUTES[kind]
        return f"Building llama.cpp from source{backend}: {minutes} minutes on 2 cores, once."
    if "still running" in line:
        return f"  still building, {max(1, round(elapsed_s / 60))} min so far"
    return ""


def failure_hint(log: str, *, platform: str, python: tuple[int, int]) -> str:
    """What to do about a failed command, by what its output says."""
    cause = next((cause for text, cause in FAILURES if text in log), "")
    return {
        "disk": "Free some disk space (about 2 GB are needed) and run this again.",
        "cuda": CUDA_HINT,
        "memory": "Memory ran out: set CMAKE_BUILD_PARALLEL_LEVEL=1 and run this again.",
        "compiler": COMPILER_HINTS.get(platform, "Install a C++ compiler and run this again."),
        "cmake": CMAKE_HINT,
        "network": NETWORK_HINT,
        "venv": "Debian and Ubuntu keep venv in a package of its own: "
        "sudo apt install python{}.{}-venv".format(*python),
    }.get(cause, "")
