"""The number of CPUs that this process may use, by its affinity mask and its container's quota.

A container with a quota of two CPUs sees all CPUs of the machine; a thread for each would only be
throttled. The quota is the smallest of the process's cgroup (v1 or v2) and its ancestors.
"""

from __future__ import annotations

import os
from pathlib import Path

_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def visible_cpus() -> int:
    """Return the number of CPUs in the affinity mask, or of the machine where there is no mask."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_cpus() -> int:
    """Return the number of CPUs of the machine."""
    return os.cpu_count() or 1


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use, at least 1."""
    quota = cpu_quota()
    return max(1, visible_cpus() if quota is None else min(visible_cpus(), int(quota)))


def cpu_quota(groups: Path = _GROUPS, mount: Path = _MOUNT) -> float | None:
    """Return the CPU quota of the cgroup, in CPUs; None without a limit.

    Args:
        groups: File that lists the cgroups of this process.
        mount: Mount point of the cgroup file systems.
    """
    quotas = [quota for folder in _folders(groups, mount) if (quota := _quota_of(folder))]
    return min(quotas, default=None)


def load_average() -> float:
    """Return the machine's load average over the last minute; 0 if it is unknown."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return 0.0


def is_machine_busy() -> bool:
    """Return whether the load average is above half of the CPUs.

    False for a process that may use only a part of the machine: the load may be on other parts.
    """
    return usable_cpus() == machine_cpus() and load_average() > machine_cpus() / 2


def _folders(groups: Path, mount: Path) -> set[Path]:
    """Return the folders of the process's cgroups and of their ancestors.

    Inside a container a path may be the host's, so that only the mount point itself exists.
    """
    try:
        rows = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except (OSError, ValueError):
        return set()
    found = set()
    for _, controllers, path in (row for row in rows if len(row) == 3):
        if controllers in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            top = mount / controllers if controllers else mount
            inner = top / path.lstrip("/")
            found |= {top, inner, *(p for p in inner.parents if p.is_relative_to(top))}
    return found


def _quota_of(folder: Path) -> float | None:
    """Return the quota in the files of a cgroup (v1 or v2), None if there is none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
