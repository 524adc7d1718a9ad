"""`svfap bench data`: clips per second from a store to ready batches, against other pipelines.

Ours is the loader of a rank. `decode_only` crops clips out of samples in memory with our decoder,
as fast as the cores can: the upper bound. The public pipelines, webdataset and a DataLoader over
files, are as they are mostly written: a container is opened per clip and decoded from its start to
the end of a random window, RGB by PyAV's `to_ndarray`, one random crop, resized by torch, batched
by torch's DataLoader. All make clips of the same shape, each in a new process, and take turns for
several rounds. Rates per CPU-second count all processes of a pipeline; compare those on a shared
machine.

Fetching is measured only while bytes come from the store. Every round is a new process, which has
nothing cached, and takes at most one pass over the set, if the set is large enough; local shards
are dropped from the page cache before. Where a round needs more passes and the set fits into the
loader's memory, later passes may fetch nothing: the result says so, and for which share of clips.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import logging
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from svfap_dist import storage
from svfap_dist.allocator import keep_freed_memory
from svfap_dist.bench import clip_sets
from svfap_dist.config import Config, recipe
from svfap_dist.data.read_ahead import bytes_of_pass, plan_reads
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.profiling.loader import LoaderRun, time_loader
from svfap_dist.profiling.timing import Rate, call_in_new_process, take_turns, time_batches
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import Sample, SampleReader
from svfap_dist.text_table import format_table

log = logging.getLogger(__name__)

_RECIPE = "svfap_base_voxceleb2"
_HERE = ("cluster.use_gpu=false", "cluster.num_workers=1", "data.num_lanes=8")
_MAX_SAMPLES_IN_MEMORY = 256  # that decode_only cycles through


@dataclasses.dataclass(frozen=True)
class PipelineRun(LoaderRun):
    """A measurement of a pipeline."""

    cores: int = 1  # processes that decode
    files: str = ""  # folder of videos, for the DataLoader over files


@dataclasses.dataclass(frozen=True)
class DataBench:
    """Clips per second of wall time, or of CPU time (`*_per_cpu_second`)."""

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
    share: float  # of decode_only, by CPU time
    rss_slope_bytes: float  # growth of our pipeline's memory per batch, median of the rounds
    bytes: int  # of the set that a pass reads
    cache_bytes: int  # that our pipeline may keep, on the node's disk included
    passes: float  # over the set, of a round
    cached_share: float  # of clips whose bytes may have been kept from an earlier pass
    bytes_fetched_per_clip: float  # from the store
    bytes_read_again: int  # in a round, beyond those of the clips it took; some are read ahead
    # None if public pipelines are left out.
    plain_webdataset: float | None = None
    plain_webdataset_per_cpu_second: float | None = None
    dataloader_files: float | None = None
    dataloader_files_per_cpu_second: float | None = None
    ratio: float | None = None  # to plain_webdataset, by CPU time

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        rates = [
            ("Ours", self.clips_per_second, self.clips_per_cpu_second),
            ("Decoding only", self.decode_only, self.decode_only_per_cpu_second),
            ("webdataset", self.plain_webdataset, self.plain_webdataset_per_cpu_second),
            ("Files", self.dataloader_files, self.dataloader_files_per_cpu_second),
        ]
        rows = [
            (name, f"{wall:.1f} clips/s", f"{cpu:.1f} per CPU-second")
            for name, wall, cpu in rates
            if wall is not None
        ]
        times = "" if self.ratio is None else f", {self.ratio:.1f} times webdataset"
        return [
            f"{self.url} (profile {self.profile}) against {self.source_url}",
            f"{self.cores} decoding processes; {self.batches} batches of {self.batch_size} clips "
            f"in {self.rounds} rounds",
            *format_table(rows, right=(1, 2)),
            f"By CPU time: {self.share:.0%} of decoding only{times}.",
            f"Memory grows by {self.rss_slope_bytes:.0f} bytes per batch.",
            f"Fetched {self.bytes_fetched_per_clip / 1000:.1f} KB per clip; a pass reads "
            f"{self.bytes / 1e6:.0f} MB, {self.bytes_read_again / 1e6:.1f} MB of them ahead or "
            f"again; up to {self.cache_bytes / 1e6:.0f} MB are kept.",
            *([self._warning()] if self.cached_share else []),
        ]

    def _warning(self) -> str:
        return (
            f"Not only fetching was measured: a round takes {self.passes:.1f} passes over a set "
            f"that fits in memory, so up to {self.cached_share:.0%} of the clips were not fetched. "
            "Use a larger set or fewer --steps."
        )


def run(
    url: str = "",
    source_url: str = "",
    overrides: Sequence[str] = (),
    batches: int = 60,
    rounds: int = 3,
    public: bool = True,
) -> DataBench:
    """Measure batches of each pipeline.

    Args:
        url: shards; empty: rendered ones, made for this.
        source_url: shards of the same clips for the public pipelines; empty: those at `url`.
        overrides: `key=value` of the recipe.
        batches: in all rounds together; of public pipelines about a quarter of that.
        rounds: in which the pipelines take turns.
        public: whether to time public pipelines, too.

    Raises:
        ConfigError, ShardError, StorageError: from recipe and shards.
    """
    cores = usable_cpus()
    workers = [f"data.decode_workers={cores}", f"data.decode_threads={2 * cores}"]
    config = recipe.load(_RECIPE, ["train.global_batch_size=32", *_HERE, *workers, *overrides])
    per_round = -(-batches // rounds)
    if public and url and not source_url and shard_format.load_manifest(url).num_parts > 1:
        found = "a sample per phase of a video"
        do = "name shards of profile source with --source, or use --no-public"
        raise ConfigError("Public pipelines cannot cut clips from these shards", url, found, do)
    with tempfile.TemporaryDirectory(prefix="svfap-bench-") as folder:
        if not url:
            log.info("Rendering clips ...")
            clips = config.train.global_batch_size * (per_round + _warm_up(per_round))
            rendered = clip_sets.render(folder, clips // config.data.repeated_sampling)
            url, source_url = rendered.train, rendered.source
        files = os.path.join(folder, "files") if public else ""
        result = _measure(config, url, source_url or url, per_round, rounds, files)
    if result.cached_share:
        log.warning("%s", result._warning())
    return result


def _warm_up(batches: int) -> int:
    return 2 + max(batches // 10, 2)  # uses up what start-up has prepared


def _measure(
    config: Config, url: str, source_url: str, batches: int, rounds: int, files: str
) -> DataBench:
    """Measure that many batches in each round; public pipelines only with a folder for files."""
    manifest = shard_format.load_manifest(url)
    batch_size, cores = config.train.global_batch_size, max(config.data.decode_workers, 1)
    ours = PipelineRun(config, url, batches, _warm_up(batches), cores)
    variants = {
        "ours": lambda _: _time_ours(ours, manifest),
        "decode_only": lambda _: call_in_new_process(_time_decoding, ours),
    }
    if files:
        clip_sets.write_files(source_url, files)
        # A DataLoader delivers in waves, a batch of each worker, and has two of each prepared.
        batches_of_public = max(-(-batches // (4 * cores)), 2) * cores
        public = dataclasses.replace(
            ours, url=source_url, files=files, batches=batches_of_public, warm_up=2 * cores
        )
        variants |= {
            "plain_webdataset": lambda _: call_in_new_process(_time_webdataset, public),
            "dataloader_files": lambda _: call_in_new_process(_time_files, public),
        }
    results = take_turns(variants, rounds, title="Measuring")
    taken = batch_size // config.data.repeated_sampling * (ours.batches + ours.warm_up)
    num_bytes = bytes_of_pass(config, manifest)
    passes, cache_bytes = taken / manifest.num_samples, _cache_bytes(config, manifest)
    fetched = statistics.median(rate.all_bytes_fetched for rate in results["ours"])
    rates = {name: Rate.combine(of_rounds) for name, of_rounds in results.items()}
    rate = rates.pop("ours")
    walls = {name: other.per_second for name, other in rates.items()}
    cpus = {f"{name}_per_cpu_second": other.per_cpu_second for name, other in rates.items()}
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
        **walls,
        **cpus,
        share=rate.per_cpu_second / rates["decode_only"].per_cpu_second,
        ratio=rate.per_cpu_second / rates["plain_webdataset"].per_cpu_second if files else None,
        rss_slope_bytes=rate.rss_slope_bytes,
        bytes=num_bytes,
        cache_bytes=cache_bytes,
        passes=passes,
        cached_share=max(1 - 1 / passes, 0.0) if num_bytes <= cache_bytes else 0.0,
        bytes_fetched_per_clip=rate.bytes_fetched / rate.clips,
        bytes_read_again=max(int(fetched - num_bytes * passes), 0),
    )


def _time_ours(run: PipelineRun, manifest: Manifest) -> Rate:
    """Time the loader, with nothing of local shards in the page cache."""
    if not storage.is_remote(run.url):
        for shard in manifest.shards:
            file = os.open(storage.local_path(storage.join(run.url, shard.name)), os.O_RDONLY)
            os.fsync(file)  # pages that are not on disk yet stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
    return call_in_new_process(time_loader, run)


def _cache_bytes(config: Config, manifest: Manifest) -> int:
    """Return the bytes of shards that our pipeline may keep in memory and on the node's disk."""
    in_memory = plan_reads(config, manifest, World(0, 0, 1, 1)).needed
    return in_memory + (config.data.cache_bytes if config.data.cache_dir else 0)


def _time_webdataset(run: PipelineRun) -> Rate:
    """Time webdataset from the same store with PyAV and torch's DataLoader."""
    import torch.utils.data
    from webdataset.compat import WebDataset

    manifest = shard_format.load_manifest(run.url)
    urls = [storage.join(run.url, shard.name) for shard in manifest.shards]
    urls = urls if storage.is_remote(run.url) else [f"file:{url}" for url in urls]
    data = WebDataset(urls, resampled=True, shardshuffle=False, empty_check=False)
    clips: Any = data.shuffle(100).map(_PublicDecoder(run.config))
    batch_size = run.config.train.global_batch_size
    loader = torch.utils.data.DataLoader(
        clips, batch_size=batch_size, num_workers=run.cores, worker_init_fn=_register_s3
    )
    return time_batches(loader, run.batches, batch_size, run.warm_up)


def _time_files(run: PipelineRun) -> Rate:
    """Time torch's DataLoader over a folder of local video files with PyAV."""
    import torch.utils.data

    paths: Any = sorted(Path(run.files).iterdir())
    batch_size = run.config.train.global_batch_size
    loader = torch.utils.data.DataLoader(
        paths,
        batch_size=batch_size,
        sampler=torch.utils.data.RandomSampler(paths, replacement=True, num_samples=1 << 40),
        num_workers=run.cores,
        collate_fn=functools.partial(_decode_files, _PublicDecoder(run.config)),  # in the workers
    )
    return time_batches(loader, run.batches, batch_size, run.warm_up)


def _time_decoding(run: PipelineRun) -> Rate:
    """Time as many processes as cores, each cropping clips out of samples in its memory."""
    share = dataclasses.replace(run, batches=-(-run.batches // run.cores))
    with ThreadPoolExecutor(run.cores) as threads:
        decode = functools.partial(call_in_new_process, _decode_from_memory)
        rates = list(threads.map(decode, [share] * run.cores))
    clips, seconds = sum(rate.clips for rate in rates), max(rate.seconds for rate in rates)
    return Rate(clips, seconds, sum(rate.cpu_seconds for rate in rates))


def _decode_from_memory(run: PipelineRun) -> Rate:
    import torch

    from svfap_dist.data.clips import plan_clips
    from svfap_dist.data.decoding import decoder_of
    from svfap_dist.video.frames import to_rgb

    torch.set_num_threads(1)  # there is a process for each core
    keep_freed_memory()  # as decode workers do
    manifest = shard_format.load_manifest(run.url)
    reader = SampleReader(run.url, manifest)
    count = min(manifest.num_samples, _MAX_SAMPLES_IN_MEMORY)
    samples = [sample for i in range(count) if isinstance(sample := reader.read(i), Sample)]
    batch_size = run.config.train.global_batch_size
    data, decode = run.config.data, decoder_of(run.config)

    def batches() -> Iterator[int]:
        rounds = itertools.cycle(samples)
        for number in itertools.count():
            for row in range(batch_size // data.repeated_sampling):
                sample = next(rounds)
                crops = [(number, row, repeat) for repeat in range(data.repeated_sampling)]
                numbers, cuts = plan_clips(sample.info, data, (number, row), crops)
                frames = decode(sample.video, sample.info, numbers)
                if data.colors != "device":
                    for cut in cuts:
                        to_rgb(frames, cut, data.frame_size)
            yield number

    return time_batches(batches(), run.batches, batch_size, run.warm_up)


class _PublicDecoder:
    """Decodes a clip as public pipelines do; picklable for a DataLoader's workers."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, sample: dict[str, Any]) -> Any:
        """Return uint8 [F, S, S, 3] of a sample's `mp4`."""
        import av
        import torch

        data = self._config.data
        frames: list[np.ndarray] = []
        with av.open(io.BytesIO(sample["mp4"]), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            start = random.randrange(max(stream.frames - self._config.window + 1, 1))  # noqa: S311
            for number, frame in enumerate(container.decode(stream)):
                if number >= start and (number - start) % data.sampling_rate == 0:
                    frames.append(frame.to_ndarray(format="rgb24"))
                    if len(frames) == data.num_frames:
                        break
        clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        side = int(min(clip.shape[2:]) * random.choice(data.crop_scales))  # noqa: S311
        top = random.randrange(clip.shape[2] - side + 1)  # noqa: S311
        left = random.randrange(clip.shape[3] - side + 1)  # noqa: S311
        clip = clip[:, :, top : top + side, left : left + side]
        size = (data.frame_size, data.frame_size)
        clip = torch.nn.functional.interpolate(clip, size=size, mode="bilinear", antialias=True)
        return clip.permute(0, 2, 3, 1).contiguous()


def _decode_files(decode: _PublicDecoder, paths: Sequence[Path]) -> Any:
    import torch

    return torch.stack([decode({"mp4": path.read_bytes()}) for path in paths])


def _register_s3(_: int) -> None:
    """Let webdataset open s3:// URLs, which it does not support."""
    from webdataset.gopen import gopen_schemes

    gopen_schemes["s3"] = _open_remote


def _open_remote(url: str, mode: str = "rb", bufsize: int = 8192, **_: object) -> Any:
    fs, path = storage.filesystem(url)
    return fs.open(path, mode)
