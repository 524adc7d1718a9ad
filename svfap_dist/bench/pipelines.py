"""The ways from stored videos to clips that `bench data` compares, each in a process of its own.

In: a `Spec`. Out: `Rate`s, wall time and CPU time of the process and all below it. Ours is the
loader of a rank. The others cut clips of the same shape: `decode_only` with our decoder, from
memory, as fast as the cores can; the public pipelines as they are mostly written: a container
opened per clip, decoded from its start to the end of a random window, RGB by PyAV's `to_ndarray`,
one random crop, resized by torch, batched by torch's DataLoader.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from svfap_dist import storage
from svfap_dist.allocator import keep_freed_memory
from svfap_dist.config import Config
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.reader import Sample, SampleReader

_MOST_IN_MEMORY = 256  # samples that decode_only goes round
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Spec:
    """url: shards. batches: how many are timed, after `warm_up` others. cores: processes that
    decode; files: folder of videos, for the DataLoader over files."""

    config: Config
    url: str
    batches: int
    warm_up: int
    cores: int
    files: str = ""


@dataclasses.dataclass(frozen=True)
class Rate:
    """clips in `seconds` of wall time and `cpu_seconds` of all processes of the pipeline."""

    clips: int
    seconds: float
    cpu_seconds: float
    rss_slope_bytes: float = 0.0  # per batch, all processes of the pipeline together

    @property
    def per_second(self) -> float:
        return self.clips / self.seconds

    @property
    def per_cpu_second(self) -> float:
        return self.clips / self.cpu_seconds


def joined(rates: Sequence[Rate]) -> Rate:
    """The rate of several runs together; of what memory grew by, the median."""
    return Rate(
        sum(rate.clips for rate in rates),
        sum(rate.seconds for rate in rates),
        sum(rate.cpu_seconds for rate in rates),
        statistics.median(rate.rss_slope_bytes for rate in rates),
    )


def measure(pipeline: Callable[[Spec], Rate], spec: Spec) -> Rate:
    """Run a pipeline in a fresh process, which may have processes of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(pipeline, spec).result()


def ours(spec: Spec) -> Rate:
    """The loader of one rank, from the store to batches."""
    from svfap_dist.data.loader import ClipLoader
    from svfap_dist.distributed import World

    manifest = shard_format.load_manifest(spec.url)
    loader = ClipLoader(spec.config, spec.url, manifest, World(0, 0, 1, 1))
    return _timed(loader.batches(0, 1 << 40), spec)


def plain_webdataset(spec: Spec) -> Rate:
    """webdataset from the same store, PyAV, torch's DataLoader."""
    import torch.utils.data
    from webdataset.compat import WebDataset

    manifest = shard_format.load_manifest(spec.url)
    urls = [storage.join(spec.url, shard.name) for shard in manifest.shards]
    urls = urls if storage.is_remote(spec.url) else [f"file:{url}" for url in urls]
    data = WebDataset(urls, resampled=True, shardshuffle=False, empty_check=False)
    clips: Any = data.shuffle(100).map(_PublicDecoder(spec.config))
    batch_size = spec.config.train.global_batch_size
    loader = torch.utils.data.DataLoader(
        clips, batch_size=batch_size, num_workers=spec.cores, worker_init_fn=_teach_s3
    )
    return _timed(loader, spec)


def dataloader_files(spec: Spec) -> Rate:
    """torch's DataLoader over a folder of video files on the local disk, PyAV."""
    import torch.utils.data

    paths = sorted(str(path) for path in Path(spec.files).iterdir())
    batch_size = spec.config.train.global_batch_size
    data: Any = _Files(paths, _PublicDecoder(spec.config))
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=1 << 40)
    loader = torch.utils.data.DataLoader(
        data, batch_size=batch_size, sampler=sampler, num_workers=spec.cores
    )
    return _timed(loader, spec)


def decode_only(spec: Spec) -> Rate:
    """As many processes as cores, each cutting clips out of samples that are in its memory."""
    share = dataclasses.replace(spec, batches=-(-spec.batches // spec.cores))
    with ProcessPoolExecutor(spec.cores, mp_context=get_context("spawn")) as pool:
        rates = list(pool.map(_decode_from_memory, [share] * spec.cores))
    clips, seconds = sum(rate.clips for rate in rates), max(rate.seconds for rate in rates)
    return Rate(clips, seconds, sum(rate.cpu_seconds for rate in rates))


def write_files(url: str, folder: str) -> None:
    """The videos of a data set as files, as they lie in public data sets."""
    manifest = shard_format.load_manifest(url)
    reader = SampleReader(url, manifest)
    os.makedirs(folder)
    for index in range(manifest.num_samples):
        sample = reader.read(index)
        if isinstance(sample, Sample):
            Path(folder, f"{index:06d}.mp4").write_bytes(sample.video)


def _decode_from_memory(spec: Spec) -> Rate:
    import torch

    from svfap_dist.data.clips import random_cut
    from svfap_dist.rng import Stream
    from svfap_dist.video.color import to_rgb

    torch.set_num_threads(1)  # there is a process for each core
    keep_freed_memory()  # as decode workers do
    manifest = shard_format.load_manifest(spec.url)
    reader = SampleReader(spec.url, manifest)
    count = min(manifest.num_samples, _MOST_IN_MEMORY)
    samples = [sample for i in range(count) if isinstance(sample := reader.read(i), Sample)]
    batch_size = spec.config.train.global_batch_size
    repeats, colours = spec.config.data.repeated_sampling, spec.config.data.colors

    def batches() -> Iterator[int]:
        rounds = itertools.cycle(samples)
        for number in itertools.count():
            for row in range(batch_size // repeats):
                sample, window = next(rounds), Stream(number, row)
                crops = [Stream(number, row, repeat) for repeat in range(repeats)]
                frames, cuts = random_cut(sample.video, sample.info, spec.config, window, crops)
                if colours != "device":
                    for cut in cuts:
                        to_rgb(frames, cut, spec.config.data.frame_size)
            yield number

    return _timed(batches(), spec)


class _PublicDecoder:
    """A clip as public pipelines decode it; may be sent to a DataLoader's worker."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, sample: dict[str, Any]) -> Any:
        """uint8 [F, S, S, 3] of a sample's `mp4`."""
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


class _Files:
    """Decoded files by number."""

    def __init__(self, paths: list[str], decode: _PublicDecoder) -> None:
        self._paths, self._decode = paths, decode

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        return self._decode({"mp4": Path(self._paths[index]).read_bytes()})


def _teach_s3(_: int) -> None:
    """webdataset knows no S3."""
    from webdataset.gopen import gopen_schemes

    gopen_schemes["s3"] = _open_remote


def _open_remote(url: str, mode: str = "rb", bufsize: int = 8192, **_: object) -> Any:
    fs, path = storage.filesystem(url)
    return fs.open(path, mode)


def _timed(endless: Iterable[object], spec: Spec) -> Rate:
    """Take batches and time those after the warm-up; work for batches to come is counted, too, as
    is work done for these in the warm-up not."""
    batches = iter(endless)
    for _ in range(spec.warm_up):
        next(batches)
    resident: list[int] = []
    every = max(spec.batches // 1000, 1)
    began, cpu_began = time.perf_counter(), _cpu_seconds()
    for number in range(spec.batches):
        next(batches)
        if number % every == 0:
            resident.append(_resident_bytes())
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu_began
    steps = np.arange(len(resident)) * every
    slope = float(np.polyfit(steps, resident, 1)[0]) if len(resident) > 2 else 0.0
    return Rate(spec.batches * spec.config.train.global_batch_size, seconds, cpu, slope)


def _processes() -> list[list[str]]:
    """Fields of /proc/PID/stat, from the state on, of this process and all below it."""
    children: dict[int, list[int]] = {}
    fields: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields[int(path.parent.name)] = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has ended
    for pid, values in fields.items():
        children.setdefault(int(values[1]), []).append(pid)
    found, pending = [], [os.getpid()]
    while pending:
        pid = pending.pop()
        found.append(fields[pid])
        pending += children.get(pid, [])
    return found


def _cpu_seconds() -> float:
    """CPU time of this process and all below it, those that have ended included."""
    return sum(sum(map(int, values[11:15])) for values in _processes()) / _TICKS


def _resident_bytes() -> int:
    return sum(int(values[21]) for values in _processes()) * _PAGE
