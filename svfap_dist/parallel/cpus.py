"""The CPUs that this process may use: those of its affinity mask, within its container's quota.

A container with a quota of two CPUs shows all of the machine's; threads for all of them would only
take turns. The quota is that of the control group, version 1 or 2, or of any group above it.
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
    """Return the CPU time per second that the control group may use, None without a limit.

    Args:
        groups: File with the groups of this process.
        mount: Folder of the control groups.
    """
    quotas = [quota for folder in _folders(groups, mount) if (quota := _quota_of(folder))]
    return min(quotas, default=None)


def busy_cpus() -> float:
    """Return how many CPUs of the machine were busy in the last minute; 0 if it is unknown."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return 0.0


def _folders(groups: Path, mount: Path) -> set[Path]:
    """Return the folders of the process's groups, and of all groups above them.

    Inside a container a path may be the host's, so that only the mount itself exists.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return set()
    found = set()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            top = mount / controllers if controllers else mount
            inner = top / path.lstrip("/")
            found |= {top, inner, *(p for p in inner.parents if p.is_relative_to(top))}
    return found


def _quota_of(folder: Path) -> float | None:
    """Return the quota in a group's files of either version, None if there is none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None
