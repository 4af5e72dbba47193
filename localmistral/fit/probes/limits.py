"""What a container or a batch system leaves of the machine: cgroup limits, CPU affinity.

Both generations of cgroups, with limits of every group above this process. Systems without
cgroups have none. The parsers are pure; `root` is where /proc and /sys are.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from localmistral.fit.probes.system_files import read_number, read_text

_NO_LIMIT = 2**60
"""Version 1 writes a number near 2^63 where there is no limit."""
_MEMORY_FILES: dict[int, tuple[tuple[str, ...], str, str]] = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}
"""By version: files of the limits and of the usage, and the row of memory.stat for page cache."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None is no limit. `cpus` is the quota in CPUs, `allowed_cpus` how many the affinity names.

    `memory_free_bytes` is what the tightest group may still take, its page cache counted as free.
    """

    cpus: float | None = None
    allowed_cpus: int | None = None
    memory_bytes: int | None = None
    memory_free_bytes: int | None = None


def read_limits(root: Path = Path("/")) -> Limits:
    """The limits of this process; files that are missing or can't be read limit nothing."""
    quotas: list[float] = []
    memory: list[tuple[int, int]] = []
    for version, folder in _list_groups(root):
        quota = _read_quota(version, folder)
        limit = _read_memory(version, folder)
        quotas += [] if quota is None else [quota]
        memory += [] if limit is None else [limit]
    return Limits(
        cpus=min(quotas, default=None),
        allowed_cpus=count_allowed_cpus(),
        memory_bytes=min((limit for limit, _ in memory), default=None),
        memory_free_bytes=min((free for _, free in memory), default=None),
    )


def count_allowed_cpus() -> int | None:
    """Logical CPUs that this process may run on; None where the system doesn't say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return None


def read_thread_variables() -> dict[str, str]:
    """The variables of OpenMP that are set and change how many threads compute, or where."""
    return {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}


def count_cores(physical: int, limits: Limits) -> int:
    """Cores to compute with: the physical ones, as far as quota and affinity go."""
    quota = physical if limits.cpus is None else math.ceil(limits.cpus)
    allowed = physical if limits.allowed_cpus is None else limits.allowed_cpus
    return max(1, min(physical, quota, allowed))


def _list_groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Folders of the groups this process is in, and of those above, as (version, folder)."""
    mounts = parse_mounts(read_text(root / "proc/self/mountinfo"))
    for version, controllers, group in parse_membership(read_text(root / "proc/self/cgroup")):
        for mount in mounts:
            if mount.version != version or not _serves(mount, controllers):
                continue
            top = root / mount.folder.lstrip("/")
            for part in _below(group, mount.group):
                yield version, top / part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    version: int
    group: str
    folder: str
    controllers: frozenset[str]


def parse_mounts(mountinfo: str) -> tuple[_Mount, ...]:
    """The cgroup mounts of /proc/self/mountinfo."""
    mounts = []
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not separator or len(fields) < 5 or len(kind) < 3 or not kind[0].startswith("cgroup"):
            continue
        mounts.append(
            _Mount(
                version=2 if kind[0] == "cgroup2" else 1,
                group=fields[3],
                folder=fields[4],
                controllers=frozenset(kind[2].split(",")),
            )
        )
    return tuple(mounts)


def parse_membership(text: str) -> tuple[tuple[int, frozenset[str], str], ...]:
    """The groups of /proc/self/cgroup as (version, controllers, path)."""
    lines = (line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2)
    return tuple(
        (1 if controllers else 2, frozenset(controllers.split(",")), path)
        for _, controllers, path in lines
    )


def _serves(mount: _Mount, controllers: frozenset[str]) -> bool:
    return mount.version == 2 or bool(mount.controllers & controllers & {"cpu", "memory"})


def _below(group: str, mounted: str) -> Sequence[str]:
    """Folders under the mount point from the group up to the mount's own, as far as visible.

    A container sees its own group as the root of the mount, whatever path the host gave it.
    """
    path = PurePosixPath(group)
    inside = path.is_relative_to(mounted) and ".." not in path.parts
    relative = path.relative_to(mounted) if inside else PurePosixPath()
    return [str(part) for part in (relative, *relative.parents)]


def _read_quota(version: int, folder: Path) -> float | None:
    if version == 2:
        quota, _, period = read_text(folder / "cpu.max").partition(" ")
    else:
        quota = read_text(folder / "cpu.cfs_quota_us")
        period = read_text(folder / "cpu.cfs_period_us")
    if not (quota.isascii() and quota.isdigit() and period.isascii() and period.isdigit()):
        return None  # "max", "-1", or no such file
    return int(quota) / int(period) if int(quota) and int(period) else None


def _read_memory(version: int, folder: Path) -> tuple[int, int] | None:
    """Limit and what is left of it, in bytes; None without a limit."""
    limit_names, usage_name, cache_name = _MEMORY_FILES[version]
    limits = [read_number(folder / name) for name in limit_names]
    limit = min((number for number in limits if number is not None), default=_NO_LIMIT)
    if limit >= _NO_LIMIT:
        return None
    usage = read_number(folder / usage_name) or 0
    cache = _parse_stat(read_text(folder / "memory.stat")).get(cache_name, 0)
    return limit, max(0, limit - max(0, usage - cache))


def _parse_stat(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
