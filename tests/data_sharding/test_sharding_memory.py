"""Memory does not grow with the number of videos: from the walk through a bucket to the groups."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """if True:
    import sys
    from data_sharding.plan import Plan
    from data_sharding.sources.listing import Found, Listing, as_videos

    def peak(count):
        names = (f"id{n * 7919 % count:06d}/{n % 10}/{n:07d}" for n in range(count))
        listing = Listing((f"{name}.mp4", 0) for name in names)
        found = (Found(path, size, path[:-4], {"n": path}) for path, size in listing)
        with Plan(0, 1000, 1 << 30) as plan:
            plan.read(as_videos("/data", found))
            plan.digest({})
            assert sum(len(group.keys) for group in plan.new_groups(0)) == count
        # Not `ru_maxrss`, which a process has from the one that started it.
        return next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line)

    print(*map(peak, map(int, sys.argv[1:])))
"""


@pytest.mark.parametrize(
    ("few", "many"), [(5_000, 50_000), pytest.param(20_000, 200_000, marks=pytest.mark.slow)]
)
def test_ten_times_the_videos_take_the_same_memory(few: int, many: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(few), str(many)]
    peaks = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    small, large = (int(peak) / 1024 for peak in peaks)  # MiB
    assert large - small < 6, f"{small:.0f} MiB for {few}, {large:.0f} MiB for {many} videos"
