"""Videos with wrong headers, or that hang or exhaust memory: each is listed with a reason."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import broken_videos
import pytest
from clips import make_video

from data_sharding import pipeline
from data_sharding.make_sample import Sample, SampleOptions, open_sample_pool
from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.shards.format import REJECTED_NAME
from svfap_dist.video.probe import Limits, Rejected

NUM_GOOD = 12
QUICK = Limits(seconds=3, seconds_per_mib=0)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Good videos with broken ones of every kind among them, and why those are left out."""
    root = tmp_path_factory.mktemp("broken")
    reasons = broken_videos.make_all(root / "bad")
    for number in range(NUM_GOOD):
        make_video(root / f"good/{number}.mp4", 70 + number, seed=number)
    return root, reasons


@pytest.mark.parametrize("profile", ["source", "train"])
def test_every_kind_of_broken_video_is_listed_and_nothing_hangs(
    broken: tuple[Path, dict[str, str]], tmp_path: Path, profile: str
) -> None:
    root, reasons = broken
    started = time.monotonic()
    summary = pipeline.shard(
        "folder", str(root), str(tmp_path), profile=profile, limits=QUICK, workers=2
    )
    rows = [json.loads(row) for row in (tmp_path / REJECTED_NAME).read_text().splitlines()]
    found = {os.path.basename(row["where"]): row["reason"] for row in rows}
    assert found == reasons
    assert all(row["detail"] for row in rows)
    assert (summary.num_samples, sum(summary.rejected.values())) == (NUM_GOOD, len(reasons))
    assert pipeline.verify(str(tmp_path)).num_samples == NUM_GOOD
    # Two hang, each is given two chances of three seconds; the rest is a busy machine's share.
    assert time.monotonic() - started < 60


def video(key: str, read: Callable[[], bytes], num_bytes: int = 0) -> SourceVideo:
    return SourceVideo(key, read, {}, key, num_bytes=num_bytes)


def good(key: str) -> SourceVideo:
    return video(key, functools.partial(make_video, None, 61))


def results(limits: Limits, *videos: SourceVideo) -> list[str]:
    pool = open_sample_pool(SampleOptions(limits=limits))
    try:
        found = [result for _, result in pool.map(videos)]
    finally:
        pool.close()
    return [r.reason if isinstance(r, Rejected) else f"good {r.key}" for r in found]


def test_a_video_that_crashes_its_process_costs_itself_alone() -> None:
    deadly = video("deadly", functools.partial(os._exit, 9))
    assert results(QUICK, good("a"), deadly, good("b")) == ["good a", "crashed", "good b"]


def crash_once(state: Path) -> bytes:
    if not state.exists():
        state.touch()
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
    return make_video(None, 61)


def test_a_process_that_was_killed_says_nothing_of_the_video(tmp_path: Path) -> None:
    unlucky = video("unlucky", functools.partial(crash_once, tmp_path / "state"))
    assert results(QUICK, unlucky) == ["good unlucky"]


def test_memory_has_a_limit() -> None:
    greedy = video("greedy", functools.partial(bytes, 4 << 30))
    limits = Limits(memory_bytes=2 << 30)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert results(limits, greedy, good("a")) == ["out_of_memory", "good a"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert max(after - before, 0) * 1024 < 2 << 30


def test_time_is_given_by_size() -> None:
    def results_of(num_bytes: int) -> list[str]:
        slow = video("slow", functools.partial(sleep_then_read, 1.5), num_bytes)
        return results(Limits(seconds=1, seconds_per_mib=4), slow)

    assert results_of(0) == ["hung"]
    assert results_of(8 << 20) == ["good slow"]


def sleep_then_read(seconds: float) -> bytes:
    time.sleep(seconds)
    return make_video(None, 61)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(pixels=64 * 48 - 1), "too_large"),
        (Limits(duration=2), "too_long"),
        (Limits(file_bytes=1000), "too_big"),
        (Limits(pixels=64 * 48, duration=3, file_bytes=10**6), "good a"),
    ],
)
def test_limits_hold_and_leave_the_rest(limits: Limits, reason: str) -> None:
    assert results(limits, good("a")) == [reason]


def test_a_consumer_that_leaves_ends_the_processes_and_they_serve_again() -> None:
    pool = open_sample_pool(SampleOptions(limits=Limits(seconds=50)))
    stuck = video("stuck", functools.partial(time.sleep, 600))
    each = pool.map([good("a"), stuck, good("b")])
    started = time.monotonic()
    assert isinstance(next(each)[1], Sample)
    each.close()
    assert time.monotonic() - started < 40
    assert [type(result) for _, result in pool.map([good("c")])] == [Sample]
    pool.close()


def test_too_big_files_are_not_even_read(tmp_path: Path) -> None:
    unread = functools.partial(storage.read_bytes, str(tmp_path / "absent.mp4"))
    assert results(Limits(file_bytes=10), video("a", unread, num_bytes=11)) == ["too_big"]
