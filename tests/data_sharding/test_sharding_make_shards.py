"""Several processes make what one makes, whichever of them dies."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import signal
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from clips import make_video

from data_sharding import make_shards, markers
from data_sharding.make_sample import SampleOptions
from data_sharding.make_shards import ShardJobSpec, ShardMaker
from data_sharding.markers import Tally
from data_sharding.plan import Group
from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.errors import ClusterError, StorageError
from svfap_dist.parallel import processes
from svfap_dist.parallel.ray_connection import LOCAL, connected_to_ray
from svfap_dist.video.probe import Limits

LENGTHS = [12, 9, 15, 8, 11, 10]


def video(key: str, read: Callable[[], bytes]) -> SourceVideo:
    return SourceVideo(key, read, {}, key)


def group(number: int, *reads: Callable[[], bytes]) -> Group:
    videos = tuple(video(f"g{number}/v{row}", read) for row, read in enumerate(reads))
    return Group(number, videos, tuple("0" * 16 for _ in videos))


def two_groups() -> list[Group]:
    reads = [functools.partial(bytes, make_video(None, length)) for length in LENGTHS]
    return [group(0, *reads[:3]), group(1, *reads[3:], bytes)]


def order(url: Path) -> ShardJobSpec:
    return ShardJobSpec(str(url), SampleOptions(min_frames=10), "options")


def contents(url: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in url.iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes of the two groups."""
    url = tmp_path_factory.mktemp("alone")
    with ShardMaker(order(url)) as maker:
        first, second = (maker(group) for group in two_groups())
    assert (first.num_samples, first.reasons) == (2, {"too_short": 1})
    assert (second.num_samples, second.reasons) == (2, {"too_short": 1, "empty": 1})
    assert (first.shortest, second.shortest) == (12, 10)
    assert first.seconds == pytest.approx((12 + 15) / 25)
    return contents(url)


def test_processes_make_what_one_process_makes(alone: dict[str, str], tmp_path: Path) -> None:
    tallies = list(
        make_shards.make_by_processes(order(tmp_path), two_groups(), workers=2, processes=2)
    )
    assert sum(tally.num_samples for tally in tallies) == 4
    assert contents(tmp_path) == alone


def wait_for(flag: Path, read: Callable[[], bytes]) -> Callable[[], bytes]:
    """Return a read that waits for a file, without a function that Ray's workers cannot import."""
    content = flag.with_name(uuid.uuid4().hex)
    content.write_bytes(read())
    script = 'until test -e "$0"; do sleep 0.01; done; cat "$1"'
    return functools.partial(subprocess.check_output, ["sh", "-c", script, str(flag), str(content)])


def counted_groups(flag: Path) -> tuple[list[Group], Callable[[markers.Tally], None]]:
    """Two groups whose last videos are there once others of both were counted."""
    waiting = []
    for made in two_groups():
        *ready, last = made.videos
        slow = dataclasses.replace(last, read=wait_for(flag, last.read))
        waiting.append(dataclasses.replace(made, videos=(*ready, slow)))

    def count(tally: markers.Tally) -> None:
        if tally.num_videos >= 2:
            flag.touch()

    return waiting, count


def test_videos_are_counted_while_their_shards_are_made(
    alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_SECONDS_BETWEEN_CALLS", 0.01)
    groups, count = counted_groups(tmp_path / "counted")
    out = tmp_path / "out"
    made = make_shards.make_by_processes(order(out), groups, workers=2, on_video=count)
    assert sum(tally.num_samples for tally in made) == 4
    assert contents(out) == alone


def kill_the_worker_once(state: Path, data: bytes) -> bytes:
    """Read by a process that a worker has started: end that worker, the first time."""
    if not state.exists():
        state.touch()
        os.kill(os.getppid(), signal.SIGKILL)
    return data


def test_a_worker_that_dies_loses_only_its_group_which_is_made_again(
    alone: dict[str, str], tmp_path: Path
) -> None:
    good, other = two_groups()
    deadly = functools.partial(kill_the_worker_once, tmp_path / "state", good.videos[1].read())
    videos = (good.videos[0], video(good.keys[1], deadly), good.videos[2])
    groups = [Group(0, videos, good.digests), other]
    out = tmp_path / "out"
    assert len(list(make_shards.make_by_processes(order(out), groups, workers=2))) == 2
    assert (tmp_path / "state").exists()
    assert contents(out) == alone


def kill_the_worker() -> bytes:
    os.kill(os.getppid(), signal.SIGKILL)
    return b""


def test_a_worker_that_dies_again_and_again_is_told(tmp_path: Path) -> None:
    groups = [group(7, kill_the_worker)]
    with pytest.raises(ClusterError, match=r"died 3 times.*shard-000007, videos g7/v0"):
        list(make_shards.make_by_processes(order(tmp_path), groups, workers=2))
    assert contents(tmp_path) == {}


def test_a_failing_store_stops_and_a_file_that_vanished_does_not(tmp_path: Path) -> None:
    gone = functools.partial(storage.read_bytes, str(tmp_path / "a"))
    folder = functools.partial(storage.read_bytes, str(tmp_path))
    (tally,) = make_shards.make_by_processes(order(tmp_path / "out"), [group(0, gone)], workers=1)
    assert tally.reasons == {"missing": 1}
    assert markers.load_marker(str(tmp_path / "out"), 0).entry is None
    with pytest.raises(StorageError, match="a folder"):
        list(make_shards.make_by_processes(order(tmp_path / "out"), [group(1, folder)], workers=1))
    assert markers.marker_name(1) not in contents(tmp_path / "out")


def test_only_few_groups_are_in_flight(tmp_path: Path) -> None:
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield group(asked, bytes)

    tallies = make_shards.make_by_processes(order(tmp_path), endless(), workers=2)
    for done in range(1, 10):
        next(tallies)
        assert asked - done <= 2
    tallies.close()


def test_only_few_videos_are_in_flight() -> None:
    from data_sharding.make_sample import open_sample_pool

    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield video(str(asked), bytes)

    results = open_sample_pool(SampleOptions(limits=Limits()), 2).map(endless())
    for done in range(1, 30):
        next(results)
        assert asked - done <= 4
    results.close()


@pytest.mark.slow
def test_ray_tasks_make_what_one_process_makes(alone: dict[str, str], tmp_path: Path) -> None:
    groups, count = counted_groups(tmp_path / "counted")
    out = tmp_path / "out"
    made = make_shards.make_by_ray(order(out), groups, "local", workers=2, on_video=count)
    assert sum(tally.num_samples for tally in made) == 4
    assert contents(out) == alone


@pytest.mark.slow
def test_ray_tasks_have_the_credentials_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        make_shards,
        "_make",
        lambda job, group, counts: Tally(reasons={os.environ.get("AWS_PROFILE", ""): 1}),
    )
    with connected_to_ray(LOCAL, num_cpus=1, fix=""):
        monkeypatch.setenv("AWS_PROFILE", "mine")  # after the cluster's processes have started
        made = list(make_shards.make_by_ray(order(tmp_path), [group(0, bytes)], LOCAL, workers=1))
    assert [tally.reasons for tally in made] == [{"mine": 1}]
