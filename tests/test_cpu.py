"""Processors by what their systems write of them."""

from __future__ import annotations

from pathlib import Path

from localmistral.fit.probes.cpu import parse_cpuinfo, parse_sysctl, read_cpu

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Core(TM) i9-14900K CPU
flags\t\t: fpu pni ssse3 fma f16c avx avx2 bmi2 avx_vnni
bugs\t\t: none

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm sve\nHardware\t: Ampere Altra\n"
MAC = """machdep.cpu.brand_string: Apple M4 Max
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""


def test_the_first_processor_of_cpuinfo_speaks_for_all() -> None:
    name, features = parse_cpuinfo(INTEL)
    assert name == "Intel Core i9-14900K"
    assert features == ("sse3", "ssse3", "avx", "f16c", "fma", "bmi2", "avx2", "avx_vnni")


def test_arm_has_instruction_sets_of_its_own() -> None:
    name, features = parse_cpuinfo(ARM)
    assert name == "Ampere Altra"
    assert features == ("neon", "fp16_va", "dotprod", "matmul_int8", "sve")


def test_macos_says_it_with_sysctl() -> None:
    assert parse_sysctl(MAC) == ("Apple M4 Max", ("neon", "dotprod", "matmul_int8"))


def test_nothing_written_is_nothing_known(tmp_path: Path) -> None:
    assert parse_cpuinfo("") == parse_cpuinfo("\0\n::\n") == ("", ())
    assert parse_sysctl("") == ("", ())
    name, features = read_cpu(tmp_path)
    assert isinstance(name, str)
    assert features == ()


def test_this_machine_has_a_processor() -> None:
    name, _ = read_cpu()
    assert name
