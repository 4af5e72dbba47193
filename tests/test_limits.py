"""Limits of containers, from trees of files as kernels lay them out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localmistral.fit.machine import GIB
from localmistral.fit.probes.limits import (
    Limits,
    count_cores,
    parse_membership,
    parse_mounts,
    read_limits,
    read_thread_variables,
)

V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = """31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 /docker/ab /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/ab /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
NO_LIMIT = "9223372036854771712"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def measures(limits: Limits) -> tuple[float | None, int | None, int | None]:
    return limits.cpus, limits.memory_bytes, limits.memory_free_bytes


def test_a_container_of_version_two_has_its_limits_at_the_root(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\nfile x\n",
        },
    )
    assert measures(read_limits(root)) == (1.5, 8 * GIB, 6 * GIB)


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/user.slice/job\n",
            "sys/fs/cgroup/user.slice/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/user.slice/memory.high": f"{4 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{4 * GIB + 5}\n",
            "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/job/memory.max": f"{16 * GIB}\n",
        },
    )
    assert measures(read_limits(root)) == (2.0, 4 * GIB, 0)


def test_a_container_of_version_one_sees_its_group_as_the_root(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/mountinfo": V1_MOUNTS,
            "proc/self/cgroup": "4:memory:/docker/ab\n1:cpu,cpuacct:/docker/ab\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
        },
    )
    assert measures(read_limits(root)) == (4.0, 2 * GIB, 2 * GIB)


def test_numbers_that_mean_no_limit_are_none(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/mountinfo": V1_MOUNTS,
            "proc/self/cgroup": "4:memory:/docker/ab\n1:cpu,cpuacct:/docker/ab\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{NO_LIMIT}\n",
        },
    )
    assert measures(read_limits(root)) == (None, None, None)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/mountinfo": "", "proc/self/cgroup": ""},
        {"proc/self/mountinfo": "x - \n- cgroup\n1 2 3 4 - cgroup2\n", "proc/self/cgroup": "::\nx"},
        {"proc/self/mountinfo": V2_MOUNT, "proc/self/cgroup": "0::/../../elsewhere\n"},
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "0 0\n",
            "sys/fs/cgroup/memory.max": "many\n",
        },
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max/is-a-folder": "",
        },
    ],
)
def test_files_that_are_missing_or_odd_limit_nothing(tmp_path: Path, files: dict[str, str]) -> None:
    assert measures(read_limits(write(tmp_path, files))) == (None, None, None)


def test_a_path_that_climbs_out_of_the_tree_is_not_followed(tmp_path: Path) -> None:
    root = write(
        tmp_path / "root",
        {"proc/self/mountinfo": V2_MOUNT, "proc/self/cgroup": "0::/../../../outside\n"},
    )
    write(tmp_path, {"outside/memory.max": "5"})
    assert read_limits(root).memory_bytes is None


def test_membership_and_mounts_are_read_apart() -> None:
    assert [(version, path) for version, _, path in parse_membership("4:memory:/a:b\n0::/c\n")] == [
        (1, "/a:b"),
        (2, "/c"),
    ]
    assert [mount.folder for mount in parse_mounts(V1_MOUNTS)] == [
        "/sys/fs/cgroup/cpu,cpuacct",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/unified",
    ]


@pytest.mark.parametrize(
    ("physical", "limits", "cores"),
    [
        (8, Limits(), 8),
        (8, Limits(cpus=2.5), 3),
        (8, Limits(cpus=0.1), 1),
        (8, Limits(allowed_cpus=4), 4),
        (8, Limits(cpus=6, allowed_cpus=16), 6),
        (0, Limits(), 1),
    ],
)
def test_cores_are_what_quota_and_affinity_leave(physical: int, limits: Limits, cores: int) -> None:
    assert count_cores(physical, limits) == cores


def test_variables_that_bind_threads_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_THREAD_LIMIT", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert read_thread_variables() == {}
    monkeypatch.setenv("OMP_THREAD_LIMIT", "2")
    assert read_thread_variables() == {"OMP_THREAD_LIMIT": "2"}


def test_this_process_can_be_looked_at() -> None:
    limits = read_limits()
    assert limits.cpus is None or limits.cpus > 0
    assert limits.allowed_cpus is None or 1 <= limits.allowed_cpus <= (os.cpu_count() or 1)
