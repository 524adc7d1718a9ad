"""Make shards: one group of videos each, in this process, by worker processes or by Ray tasks.

In: a job and its groups. Out: a tally per group, in the order of completion. A group needs nothing
but its videos and the job's options, and making it is idempotent. Pipes and Ray transfer lists of
videos and tallies; workers read the videos and write the shards, with at most one group per worker
in memory. A group whose worker dies is retried a few times. Workers are spawned, not forked: a
forked copy of an S3 client hangs.

The machines of a Ray cluster need this package, and the input and the output under the same names;
tasks get this process's credentials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from data_sharding import markers
from data_sharding.make_sample import Sample, SampleOptions, open_sample_pool
from data_sharding.markers import Marker, Tally
from data_sharding.pack import pack
from data_sharding.plan import Group
from svfap_dist.errors import ClusterError, SvfapError
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.parallel.processes import CrashedError, ProcessPool, as_completed, ordered_map
from svfap_dist.parallel.ray_connection import connected_to_ray, inherited_variables
from svfap_dist.video.probe import Rejected

_ATTEMPTS = 3  # to make a group
_VIDEOS_PER_PROCESS = 8  # a process takes some tenths of a second to start
_COUNT_SECONDS = 1.0  # between two counts of a Ray task, and to wait for their sum


@dataclasses.dataclass(frozen=True)
class ShardJobSpec:
    """What all shards of a data set have in common: where they go and how they are made."""

    url: str
    options: SampleOptions
    options_digest: str


class ShardMaker:
    """Makes one shard after the other; a context manager, picklable before its first use.

    Args:
        job: What all shards have in common.
        processes: How many make samples.
    """

    def __init__(self, job: ShardJobSpec, processes: int = 1) -> None:
        self._job, self._pool = job, open_sample_pool(job.options, processes)

    def __enter__(self) -> ShardMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def __call__(
        self, group: Group, on_video: Callable[[Tally], None] = lambda tally: None
    ) -> Tally:
        """Read, probe, transcode and pack the videos of a group; upload the shard, then its marker.

        Args:
            group: The videos.
            on_video: Called after each video with the tally so far.
        """
        tally = Tally()
        rejected: list[dict[str, str]] = []

        def samples() -> Iterator[Sample]:
            for video, result in results:
                tally.count(result)
                on_video(tally)
                if isinstance(result, Rejected):
                    row = {"key": video.key, "where": video.where}
                    rejected.append({**row, "reason": result.reason, "detail": result.detail})
                else:
                    yield result

        job = self._job
        with contextlib.closing(self._pool.map(group.videos)) as results:
            entry = pack(samples(), job.url, group.name, job.options.num_parts)
        digest = markers.group_digest(group, job.options_digest)
        marker = Marker(digest, entry, tally, tuple(rejected), group.keys, group.digests)
        markers.store_marker(job.url, group.number, marker)
        return tally


def make_here(
    job: ShardJobSpec,
    groups: Iterable[Group],
    num_groups: int,
    num_videos: int,
    workers: int | None,
    on_video: Callable[[Tally], None],
) -> Generator[Tally]:
    """Make shards on this machine: several at a time, or one by one with all processes.

    Args:
        job: What all shards have in common.
        groups: Taken as the workers get to them.
        num_groups: How many there are.
        num_videos: How many videos they have.
        workers: Processes in all; None: by the number of CPUs and videos.
        on_video: Called with the tally of the shards in progress, as videos are finished.

    Raises:
        ClusterError: A group's worker died again and again.
    """
    if workers is None:
        workers = min(usable_cpus(), num_videos // _VIDEOS_PER_PROCESS)
    at_a_time = max(min(workers, num_groups), 1)
    processes = max(workers // at_a_time, 1)
    if at_a_time > 1:
        yield from make_by_processes(job, groups, at_a_time, processes, on_video)
        return
    with ShardMaker(job, processes) as maker:
        for group in groups:
            yield _with_retries(functools.partial(maker, on_video=on_video), group)


def make_by_processes(
    job: ShardJobSpec,
    groups: Iterable[Group],
    workers: int,
    processes: int = 1,
    on_video: Callable[[Tally], None] = lambda tally: None,
) -> Generator[Tally]:
    """Make shards by worker processes.

    Args:
        job: What all shards have in common.
        groups: Taken as the workers get to them.
        workers: Processes that make a shard each at a time.
        processes: Processes of each worker that make samples.
        on_video: Called about once a second with the tally of the shards under way.

    Raises:
        ClusterError: A group's worker died again and again.
    """
    counts = _SharedCounts(workers)
    make = functools.partial(_make_counted, ShardMaker(job, processes), counts.values)
    pool = ProcessPool(make, workers, seconds=None, may_have_children=True)

    def make_one(group: Group) -> Tally:
        with counts.row() as row:
            return _with_retries(lambda group: pool((row, group)), group)

    tallies = ordered_map(
        make_one,
        groups,
        threads=workers,
        limit=workers,
        in_order=False,
        stop=pool.kill,
        on_wait=lambda: on_video(counts.tally()),
    )
    with contextlib.closing(pool), contextlib.closing(tallies):  # `tallies` is closed first
        yield from (tally for _, tally in tallies)


class _SharedCounts:
    """Counts of finished videos per shard in progress, in memory shared with the workers.

    Args:
        workers: Number of shards that are made at a time.
    """

    def __init__(self, workers: int) -> None:
        self.values: Any = multiprocessing.get_context("spawn").RawArray("q", 2 * workers)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for row in range(workers):
            self._free.put(row)

    @contextlib.contextmanager
    def row(self) -> Iterator[int]:
        """Reserve a row of counts for a shard and yield its number; the counts start at zero."""
        row = self._free.get()
        try:
            yield row
        finally:
            self.values[2 * row : 2 * row + 2] = [0, 0]
            self._free.put(row)

    def tally(self) -> Tally:
        """Return the counts of all shards in progress."""
        return _as_tally(sum(self.values[::2]), sum(self.values[1::2]))


def _as_tally(num_samples: int, num_rejected: int) -> Tally:
    """Return a tally of counts only, without the reasons of rejections."""
    return Tally(num_samples, reasons={"": num_rejected})


def _make_counted(maker: ShardMaker, values: Any, request: tuple[int, Group]) -> Tally:
    """Make a shard in a worker process, counting its videos in a row of `_SharedCounts`."""
    row, group = request

    def count(tally: Tally) -> None:
        values[2 * row : 2 * row + 2] = [tally.num_samples, tally.num_rejected]

    return maker(group, count)


def make_by_ray(
    job: ShardJobSpec,
    groups: Iterable[Group],
    address: str,
    workers: int | None,
    on_video: Callable[[Tally], None] = lambda tally: None,
) -> Generator[Tally]:
    """Make shards by Ray tasks, which Ray starts again elsewhere when their machine is lost.

    Args:
        job: What all shards have in common.
        groups: Taken as the cluster gets to them.
        address: Address of the cluster; "local" starts one on this machine.
        workers: Shards made at a time; None: one per CPU of the cluster.
        on_video: Called about once a second with the tally of the shards under way.

    Raises:
        ClusterError: There is no cluster, or a group's task was lost again and again.
    """
    cpus = workers or usable_cpus()
    fix = "check --ray and the cluster's token, or use --workers"
    with connected_to_ray(address, num_cpus=cpus, fix=fix):
        import ray
        from ray.exceptions import RayError

        # Ray counts retries, not attempts: of tasks that died or raised one of its own errors.
        environment = {"env_vars": inherited_variables()}
        task = ray.remote(num_cpus=1, max_retries=_ATTEMPTS - 1, runtime_env=environment)(_make)
        counts: Any = ray.remote(num_cpus=0, max_restarts=-1)(_PostedCounts).remote()
        job_ref = ray.put(job)
        tasks: dict[Future[Tally], tuple[Group, Any]] = {}

        def start(group: Group) -> Future[Tally]:
            ref = task.remote(job_ref, group, counts)
            tasks[future := ref.future()] = group, ref
            return future

        def limit() -> int:  # a cluster may grow and shrink
            return workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)

        def show() -> None:
            numbers = [group.number for group, _ in tasks.values()]
            with contextlib.suppress(RayError):  # without a count, only the progress is stale
                on_video(_as_tally(*ray.get(counts.sum.remote(numbers), timeout=_COUNT_SECONDS)))

        try:
            for group, future in as_completed(start, groups, limit, show):
                del tasks[future]
                try:
                    yield future.result()
                except RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, SvfapError):
                        raise cause from error
                    raise _worker_died(group, str(error).strip().splitlines()[-1]) from error
        finally:
            for _, ref in tasks.values():
                ray.cancel(ref, force=True)


class _PostedCounts:
    """Ray actor that collects the counts of finished videos per shard from the tasks."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, int]] = {}

    def post(self, group: int, num_samples: int, num_rejected: int) -> None:
        """Replace the counts of a shard."""
        self._rows[group] = num_samples, num_rejected

    def sum(self, groups: list[int]) -> tuple[int, int]:
        """Return the samples and rejected videos of these shards, and drop the others' counts."""
        self._rows = {group: self._rows[group] for group in groups if group in self._rows}
        return sum(row[0] for row in self._rows.values()), sum(r[1] for r in self._rows.values())


def _make(job: ShardJobSpec, group: Group, counts: Any) -> Tally:
    """Make a shard in a Ray task, posting counts to the actor `_PostedCounts`."""
    latest = 0.0

    def post(tally: Tally) -> None:
        nonlocal latest
        if time.monotonic() - latest >= _COUNT_SECONDS:
            latest = time.monotonic()
            counts.post.remote(group.number, tally.num_samples, tally.num_rejected)

    with ShardMaker(job) as maker:
        return _with_retries(functools.partial(maker, on_video=post), group)


def _with_retries(make: Callable[[Group], Tally], group: Group) -> Tally:
    """Make a group, again if the worker died or the error is retryable."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return make(group)
        except CrashedError as error:
            if attempt == _ATTEMPTS:
                raise _worker_died(group, str(error)) from error
        except SvfapError as error:
            if attempt == _ATTEMPTS or not error.retryable:
                raise
    raise AssertionError


def _worker_died(group: Group, found: str) -> ClusterError:
    what = f"A worker process died {_ATTEMPTS} times over the same shard"
    where = f"{group.name}, videos {group.keys[0]} to {group.keys[-1]}"
    do = "check whether the machine is short of memory, then run the same command again"
    return ClusterError(what, where, found, do)
