"""The processor: its name and the instruction sets that llama.cpp's kernels ask for.

Linux by /proc/cpuinfo, macOS by sysctl, Windows by the registry and the kernel. The parsers are
pure. Knows no cache sizes and doesn't tell fast cores from slow ones.
"""

import ctypes
import importlib
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from localmistral.fit.probes.system_files import read_text

X86_FEATURES = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "bmi2": "bmi2",
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512": "avx512f",
    "avx512_vbmi": "avx512vbmi",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
}
"""Our names, which are llama.cpp's in small letters, by the flags of /proc/cpuinfo."""
ARM_FEATURES = {
    "neon": "asimd",
    "fp16_va": "asimdhp",
    "dotprod": "asimddp",
    "matmul_int8": "i8mm",
    "sve": "sve",
    "sme": "sme",
}
_MACOS_FEATURES = {
    "neon": "hw.optional.AdvSIMD",
    "fp16_va": "hw.optional.arm.FEAT_FP16",
    "dotprod": "hw.optional.arm.FEAT_DotProd",
    "matmul_int8": "hw.optional.arm.FEAT_I8MM",
    "sme": "hw.optional.arm.FEAT_SME",
    "avx2": "hw.optional.avx2_0",
    "avx512": "hw.optional.avx512f",
    "fma": "hw.optional.fma",
}
_WINDOWS_FEATURES = {"sse3": 13, "ssse3": 36, "avx": 39, "avx2": 40, "avx512": 41, "dotprod": 43}
"""winnt.h: PF_..._INSTRUCTIONS_AVAILABLE, for IsProcessorFeaturePresent."""
_REGISTRY_KEY = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
_TIMEOUT_S = 5


def read_cpu(root: Path = Path("/")) -> tuple[str, tuple[str, ...]]:
    """Name and instruction sets of this machine's processor; empty where nothing is known."""
    system = platform.system()
    if system == "Windows":
        name, features = _read_windows()
    elif system == "Darwin":
        name, features = parse_sysctl(_run_sysctl())
    else:
        name, features = parse_cpuinfo(read_text(root / "proc/cpuinfo"))
    return name or platform.processor() or platform.machine(), features


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and features of /proc/cpuinfo, x86 or ARM; the first processor speaks for all."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or fields.get("hardware") or fields.get("cpu model") or ""
    if "flags" in fields:
        return _tidy(name), _translate(X86_FEATURES, set(fields["flags"].split()))
    return _tidy(name), _translate(ARM_FEATURES, set(fields.get("features", "").split()))


def parse_sysctl(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and features of the output of macOS's `sysctl machdep.cpu.brand_string hw.optional`."""
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    present = {key for key, value in fields.items() if value.strip() == "1"}
    return fields.get("machdep.cpu.brand_string", "").strip(), _translate(_MACOS_FEATURES, present)


def _translate(names: Mapping[str, str], present: set[str]) -> tuple[str, ...]:
    return tuple(ours for ours, theirs in names.items() if theirs in present)


def _tidy(name: str) -> str:
    """Without the marks of trade and the filling."""
    for mark in ("(R)", "(TM)", "(tm)", " CPU", " Processor"):
        name = name.replace(mark, "")
    return " ".join(name.split())


def _run_sysctl() -> str:
    command = ["/usr/sbin/sysctl", "machdep.cpu.brand_string", "hw.optional"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _read_windows() -> tuple[str, tuple[str, ...]]:
    # By name: type checkers know these modules on Windows only.
    registry = importlib.import_module("winreg")
    is_present = ctypes.CDLL("kernel32").IsProcessorFeaturePresent
    features = tuple(name for name, number in _WINDOWS_FEATURES.items() if is_present(number))
    try:
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, _REGISTRY_KEY) as key:
            return _tidy(str(registry.QueryValueEx(key, "ProcessorNameString")[0])), features
    except OSError:
        return "", features
