"""Measure what a clip costs on its way from the store to a ready batch.

In: a recipe with data. Out: rates of the loader that trains, in a process of its own with
nothing else to do, and of raw reads. CPU seconds count, because the trainer shares the cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.data.batch import ClipBatch
from svfap_dist.data.loader import ClipLoader
from svfap_dist.data.read_ahead import bytes_of_pass
from svfap_dist.distributed import World
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.profiling.timing import Rate, call_in_new_process, seconds_of, time_batches
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.mixture import load_training_manifest, open_training_data
from svfap_dist.video.backends import host_backend

_MIN_CLIPS, _MIN_BATCHES, _WARM_UP = 192, 4, 2
_READ_BYTES, _READS, _READERS = 8 << 20, 16, 8


@dataclasses.dataclass(frozen=True)
class LoaderRun:
    """A measurement of one rank's loader."""

    config: Config  # recipe, with a batch for one rank
    url: str  # shards
    batches: int  # that are timed
    warm_up: int  # batches before them


@dataclasses.dataclass(frozen=True)
class RankCost:
    """What a rank's own process does for a clip, in microseconds of CPU time."""

    thread_us: float  # the training thread, to take the next batch
    process_us: float  # all threads of the process; decode workers and feeders are others


@dataclasses.dataclass(frozen=True)
class DataCost:
    """Costs of the recipe's data."""

    manifest: Manifest  # of the data set
    cpu_seconds: float  # per clip
    clip_bytes: float  # read for a clip: the parts of its sample with its frames
    storage_rate: float  # bytes per second that this machine read from the store


def time_loader(run: LoaderRun) -> Rate:
    """Return the rate of one rank's loader, from the store to batches.

    Args:
        run: recipe, shards and number of batches.
    """
    manifest = load_training_manifest(run.config, run.url)
    loader = ClipLoader(run.config, run.url, manifest, World(0, 0, 1, 1))
    fetched: list[int] = []
    stop = max(loader.steps_per_epoch, run.warm_up + run.batches)  # no reads of another pass

    def batches() -> Iterator[ClipBatch]:
        for batch in loader.batches(0, stop):
            fetched.append(batch.bytes_fetched)
            yield batch

    rate = time_batches(batches(), run.batches, run.config.train.global_batch_size, run.warm_up)
    timed = sum(fetched[run.warm_up :])
    return dataclasses.replace(rate, bytes_fetched=timed, all_bytes_fetched=sum(fetched))


def measure_rank_cost(run: LoaderRun) -> RankCost:
    """Return what batches cost the process that trains, in a new process with nothing else to do.

    Args:
        run: recipe, shards and number of batches.
    """
    return call_in_new_process(_rank_cost, run)


def _rank_cost(run: LoaderRun) -> RankCost:
    manifest = load_training_manifest(run.config, run.url)
    loader = ClipLoader(run.config, run.url, manifest, World(0, 0, 1, 1))
    with contextlib.closing(loader.batches(0, run.warm_up + run.batches)) as batches:
        for _ in range(run.warm_up):
            next(batches)
        thread, process = time.thread_time(), time.process_time()
        clips = sum(len(next(batches).frames) for _ in range(run.batches))
        thread, process = time.thread_time() - thread, time.process_time() - process
    return RankCost(thread / clips * 1e6, process / clips * 1e6)


def measure_data(config: Config, on_gpu: bool) -> DataCost:
    """Read and decode some of the recipe's clips on this machine's CPUs.

    Args:
        config: recipe with data.url.
        on_gpu: whether the run converts colors on a GPU, if the recipe leaves that open.

    Raises:
        ConfigError, ShardError, StorageError: as training would.
    """
    manifest = open_training_data(config)
    rate = call_in_new_process(time_loader, _one_rank(config, on_gpu))
    read = bytes_of_pass(config, manifest)
    return DataCost(
        manifest=manifest,
        cpu_seconds=rate.cpu_seconds / rate.clips,
        clip_bytes=read / manifest.num_samples / config.data.repeated_sampling,
        storage_rate=_storage_rate(config.data.url, manifest),
    )


def _one_rank(config: Config, on_gpu: bool) -> LoaderRun:
    """Return the recipe for one rank of this machine: the smallest batch that its lanes allow."""
    cores = usable_cpus()
    batch = config.data.num_lanes * config.data.repeated_sampling
    colors = config.data.colors
    data = {
        "feeders": min(config.data.feeders, 1),
        "decode_workers": min(config.data.decode_workers, cores),
        "decode_threads": min(config.data.decode_threads, 2 * cores),
        "colors": "device" if colors == "auto" and on_gpu else colors,
    }
    decode = {"backend": host_backend(config.decode.backend)}
    sections = {
        "data": config.data.model_copy(update=data),
        "decode": config.decode.model_copy(update=decode),
        "train": config.train.model_copy(update={"global_batch_size": batch}),
        "cluster": config.cluster.model_copy(update={"use_gpu": False}),
    }
    small = config.model_copy(update=sections)
    return LoaderRun(small, config.data.url, max(_MIN_BATCHES, -(-_MIN_CLIPS // batch)), _WARM_UP)


def _storage_rate(url: str, manifest: Manifest) -> float:
    """Return bytes per second of a few concurrent reads all over the shards."""
    shards = manifest.shards

    def read(number: int) -> int:
        shard = shards[number * len(shards) // _READS]
        start = number * _READ_BYTES % max(shard.num_bytes - _READ_BYTES, 1)
        return len(storage.read_range(storage.join(url, shard.name), start, start + _READ_BYTES))

    sizes: list[int] = []
    read(0)  # the first one opens the connection
    with ThreadPoolExecutor(_READERS) as pool:
        seconds = seconds_of(lambda: sizes.extend(pool.map(read, range(_READS))))
    return sum(sizes) / seconds
