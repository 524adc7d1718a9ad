"""`svfap bench data`: clips per second from a store to ready batches, beside other ways.

Ours must come near what the cores can decode when nothing else is asked of them (`decode_only`),
and is compared with plain webdataset and with a DataLoader over files, both as public pipelines are
written. All run by turns in this call, on the same clips, several rounds, since machines get faster
and slower meanwhile. Rates per CPU-second count all processes of a pipeline; on a machine that
others use, they are the ones to compare.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import tempfile
from collections.abc import Sequence

from svfap_dist.bench import pipelines
from svfap_dist.bench.pipelines import Rate, Spec
from svfap_dist.config import Config, recipe
from svfap_dist.progress import Progress
from svfap_dist.shards import format as shard_format

_RECIPE = "svfap_base_voxceleb2"
_HERE = ("cluster.use_gpu=false", "cluster.num_workers=1", "data.num_lanes=8")
_SYNTHETIC = "clips=64,frames=200,size=224"


@dataclasses.dataclass(frozen=True)
class DataBench:
    """What came out. Rates are clips per second of wall time, or of CPU time (`*_per_cpu_second`).

    share: of decode_only; ratio: to plain_webdataset; both by CPU time. rss_slope_bytes: growth of
    our pipeline's memory per batch after the warm-up, median of the rounds.
    """

    url: str
    source_url: str
    profile: str
    cores: int
    batch_size: int
    batches: int
    rounds: int
    clips_per_second: float
    clips_per_cpu_second: float
    decode_only: float
    decode_only_per_cpu_second: float
    plain_webdataset: float
    plain_webdataset_per_cpu_second: float
    dataloader_files: float
    dataloader_files_per_cpu_second: float
    share: float
    ratio: float
    rss_slope_bytes: float

    def lines(self) -> list[str]:
        """For people."""
        rows = [
            ("Ours", self.clips_per_second, self.clips_per_cpu_second),
            ("Decoding only", self.decode_only, self.decode_only_per_cpu_second),
            ("webdataset", self.plain_webdataset, self.plain_webdataset_per_cpu_second),
            ("Files", self.dataloader_files, self.dataloader_files_per_cpu_second),
        ]
        return [
            f"{self.url} (profile {self.profile}) against {self.source_url}",
            f"{self.cores} decoding processes; {self.batches} batches of {self.batch_size} clips "
            f"in {self.rounds} rounds",
            *(
                f"{name:14} {wall:8.1f} clips/s  {cpu:8.1f} per CPU-second"
                for name, wall, cpu in rows
            ),
            f"By CPU time: {self.share:.0%} of decoding only, {self.ratio:.1f} times webdataset.",
            f"Memory grows by {self.rss_slope_bytes:.0f} bytes per batch.",
        ]


def run(
    url: str = "",
    source_url: str = "",
    overrides: Sequence[str] = (),
    batches: int = 60,
    rounds: int = 3,
) -> DataBench:
    """Measure `batches` batches of each way, of public pipelines about a quarter of that.

    Args:
        url: shards; empty: rendered ones, made for this.
        source_url: shards of the same clips for the public pipelines; empty: those at `url`.

    Raises: ConfigError, ShardError, StorageError.
    """
    cores = len(os.sched_getaffinity(0))
    workers = [f"data.decode_workers={cores}", f"data.decode_threads={2 * cores}"]
    config = recipe.load(_RECIPE, ["train.global_batch_size=32", *_HERE, *workers, *overrides])
    with tempfile.TemporaryDirectory(prefix="svfap-bench-") as folder:
        if not url:
            url, source_url = _rendered(folder)
        return _measured(config, url, source_url or url, -(-batches // rounds), rounds, folder)


def _rendered(folder: str) -> tuple[str, str]:
    """Shards of rendered faces, for training and as they come."""
    from data_sharding import pipeline as sharding

    urls = []
    for profile in ("train", "source"):
        urls.append(os.path.join(folder, profile))
        sharding.shard("synthetic", _SYNTHETIC, urls[-1], profile=profile)
    return urls[0], urls[1]


def _measured(
    config: Config, url: str, source_url: str, batches: int, rounds: int, folder: str
) -> DataBench:
    """Measure so many batches in each round."""
    manifest = shard_format.load_manifest(url)
    files = os.path.join(folder, "files")
    pipelines.write_files(source_url, files)
    batch_size, cores = config.train.global_batch_size, max(config.data.decode_workers, 1)
    ahead = 2 + max(batches // 10, 2)  # what starting up has made is used up
    spec = Spec(config, url, batches, ahead, cores)
    # A DataLoader delivers in waves, a batch of each worker, and has two of each made ahead.
    public = dataclasses.replace(
        spec,
        url=source_url,
        files=files,
        batches=max(-(-batches // (4 * cores)), 2) * cores,
        warm_up=2 * cores,
    )
    ways = (pipelines.ours, pipelines.decode_only)
    others = (pipelines.plain_webdataset, pipelines.dataloader_files)
    turns = [way for _ in range(rounds) for way in (*ways, *others)]
    measured = collections.defaultdict[str, list[Rate]](list)
    with Progress("Measuring", len(turns)) as progress:
        for number, way in enumerate(turns, 1):
            rate = pipelines.measure(way, spec if way in ways else public)
            measured[way.__name__].append(rate)
            progress.update(number, note=way.__name__)
    rates = {name: pipelines.joined(of_rounds) for name, of_rounds in measured.items()}
    rate = rates["ours"]
    return DataBench(
        url=url,
        source_url=source_url,
        profile=manifest.profile,
        cores=cores,
        batch_size=batch_size,
        batches=batches * rounds,
        rounds=rounds,
        clips_per_second=rate.per_second,
        clips_per_cpu_second=rate.per_cpu_second,
        decode_only=rates["decode_only"].per_second,
        decode_only_per_cpu_second=rates["decode_only"].per_cpu_second,
        plain_webdataset=rates["plain_webdataset"].per_second,
        plain_webdataset_per_cpu_second=rates["plain_webdataset"].per_cpu_second,
        dataloader_files=rates["dataloader_files"].per_second,
        dataloader_files_per_cpu_second=rates["dataloader_files"].per_cpu_second,
        share=rate.per_cpu_second / rates["decode_only"].per_cpu_second,
        ratio=rate.per_cpu_second / rates["plain_webdataset"].per_cpu_second,
        rss_slope_bytes=rate.rss_slope_bytes,
    )
