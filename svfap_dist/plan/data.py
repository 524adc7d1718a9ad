"""What a clip costs on its way from the store to a ready batch, measured on the recipe's shards.

In: a recipe with data.url. Out: `DataCost`, by the loader that trains, in a process of its own
with nothing else to do: CPU-seconds, not wall time, since it is cores that the trainer must share.
"""

from __future__ import annotations

import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor

from svfap_dist import storage
from svfap_dist.bench import pipelines
from svfap_dist.config import Config
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import open_data

_CLIPS = 192  # that are timed, at least
_FEWEST_BATCHES = 4
_READ_BYTES, _READS, _READERS = 8 << 20, 16, 8


@dataclasses.dataclass(frozen=True)
class DataCost:
    """cpu_seconds: per clip. clip_bytes: of the shards, per clip. storage_rate: bytes per second
    that this machine read from the store."""

    samples: int
    profile: str
    cpu_seconds: float
    clip_bytes: float
    storage_rate: float


def measure(config: Config, on_gpu: bool) -> DataCost:
    """Read and decode some of the recipe's clips.

    on_gpu: colours are converted there, if the recipe leaves that open.

    Raises: ShardError, StorageError, ConfigError: as training would.
    """
    manifest = open_data(config, config.data.url)
    rate = pipelines.measure(pipelines.ours, _spec(config, on_gpu))
    total = sum(shard.num_bytes for shard in manifest.shards)
    return DataCost(
        samples=manifest.num_samples,
        profile=manifest.profile,
        cpu_seconds=rate.cpu_seconds / rate.clips,
        clip_bytes=total / manifest.num_samples / config.data.repeated_sampling,
        storage_rate=_storage_rate(config.data.url, manifest),
    )


def _spec(config: Config, on_gpu: bool) -> pipelines.Spec:
    """The recipe on one rank of this machine: the smallest batch that its lanes allow."""
    cores = len(os.sched_getaffinity(0))
    batch = config.data.num_lanes * config.data.repeated_sampling
    wish = config.data.colors
    data = {
        "decode_workers": min(config.data.decode_workers, cores),
        "decode_threads": min(config.data.decode_threads, 2 * cores),
        "colors": "device" if wish == "auto" and on_gpu else wish,
    }
    small = config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "decode": config.decode.model_copy(update={"backend": "pyav"}),
            "train": config.train.model_copy(update={"global_batch_size": batch}),
            "cluster": config.cluster.model_copy(update={"use_gpu": False}),
        }
    )
    batches = max(_FEWEST_BATCHES, -(-_CLIPS // batch))
    return pipelines.Spec(small, config.data.url, batches, warm_up=2, cores=cores)


def _storage_rate(url: str, manifest: Manifest) -> float:
    """Bytes per second of a few reads at a time, all over the shards."""
    shards = manifest.shards
    reads = [(shards[i * len(shards) // _READS], i) for i in range(_READS)]

    def read(number: int) -> int:
        shard, turn = reads[number]
        start = turn * _READ_BYTES % max(shard.num_bytes - _READ_BYTES, 1)
        return len(storage.read_range(storage.join(url, shard.name), start, start + _READ_BYTES))

    read(0)  # the first opens the connection
    began = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        total = sum(pool.map(read, range(_READS)))
    return total / (time.perf_counter() - began)
