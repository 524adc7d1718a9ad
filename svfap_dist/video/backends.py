"""Which backend turns videos into frames.

`pyav` decodes on the CPU whatever FFmpeg decodes. `dali` decodes on the GPU, whose decoding units
leave the cores alone; on a CPU it knows a few codecs only and is there for tests. Both keep the
contract of `frames.Decoder` and give the same frames, but not the same bits, since they round
colours differently. So a run keeps one backend all its life:

- Naming one in `decode.backend` always wins.
- `auto` is settled by rank 0 when a run begins (`choose`). If only one backend can decode the data
  set's codec on this machine, as on a CPU with H.264, it is that one. Otherwise each decodes a few
  samples, and the faster is taken.
- The name then stands in the resolved recipe of every checkpoint. A run that is resumed takes it
  from there and measures nothing, so its bits do not depend on how a measurement came out today,
  nor on the machine; if that backend is not to be had there, it says so instead of taking another.

Outside of runs `auto` is `pyav`: right everywhere, and nothing needs to be measured first.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from svfap_dist.config import Config
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.progress import say
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import Sample, SampleReader
from svfap_dist.video import dali as decode_dali
from svfap_dist.video import packets
from svfap_dist.video import pyav as decode_cpu
from svfap_dist.video.dali import DaliDecoder, VideoRequest
from svfap_dist.video.frames import Decoder, Frames
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.region import Crop

Backend = str
BACKENDS: tuple[Backend, ...] = ("pyav", "dali")

_SAMPLES = 8  # that are looked at
_SECONDS = 1.0  # that each backend is measured, at least


def backend(config: Config) -> Decoder:
    """The decoder that `decode.backend` names.

    Raises: ConfigError if it is DALI, and DALI is not installed.
    """
    return dali(config) if config.decode.backend == "dali" else pyav


def pyav(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> Frames:
    """The `Decoder` on the CPU: by the packets' places where the shard states them, otherwise
    through the container."""
    source = decode_cpu if info.layout is None else packets
    return source.decode(video, info, numbers)


def dali(config: Config) -> DaliDecoder:
    """This process's DALI decoder for its device; also decodes whole batches.

    Raises: ConfigError if DALI is not installed.
    """
    threads = -(-config.data.decode_threads // config.decode.pipelines)
    return _dali(_device(config), config.decode.pipelines, threads)


@functools.cache
def _dali(device: str, pipelines: int, threads: int) -> DaliDecoder:
    return DaliDecoder(device, pipelines=pipelines, threads=threads)


def available(codec: str, device: str) -> list[Backend]:
    """Backends of this machine that decode a codec (FFmpeg's name), for frames that are wanted on
    `device`: "cpu" or "cuda"."""
    with_dali = decode_dali.is_installed() and decode_dali.decodes(codec, device)
    return ["pyav", "dali"] if with_dali else ["pyav"]


def named(config: Config, name: Backend) -> Config:
    """The recipe with this backend in the place of `auto`."""
    return config.model_copy(update={"decode": config.decode.model_copy(update={"backend": name})})


def as_before(config: Config, tables: dict[str, Any]) -> Config:
    """The recipe of a run that goes on, with the backend of the run's own resolved recipe in the
    place of `auto`. (`auto` there is from before there was a choice: it was pyav.)"""
    before = tables["decode"]["backend"]
    if config.decode.backend != "auto":
        return config
    return named(config, "pyav" if before == "auto" else before)


def check(config: Config, url: str, manifest: Manifest) -> None:
    """Check that a backend which the recipe names decodes this data set; whether it is installed is
    seen on the machines that train.

    Raises: ConfigError.
    """
    if config.decode.backend != "dali":
        return
    for codec in sorted({sample.info.codec for sample in _samples(url, manifest)}):
        if not decode_dali.decodes(codec, _device(config)):
            raise ConfigError(
                f"DALI does not decode {codec} on this device",
                where="decode.backend = dali",
                found=f"{url} has {codec} videos, and cluster.use_gpu = {config.cluster.use_gpu}",
                do="set decode.backend=pyav, or cluster.use_gpu=true on machines with a GPU",
            )


def choose(config: Config, url: str, manifest: Manifest) -> Backend:
    """The backend for a run that begins: the one that is named; for `auto`, the fastest here, but
    pyav for a task.

    Raises: ConfigError if the one that is named does not decode the data set; ShardError and
    StorageError from reading.
    """
    if config.decode.backend != "auto":
        check(config, url, manifest)
        return config.decode.backend
    if config.task is not None:  # whose clips are augmented on the host
        return "pyav"
    samples, device = _samples(url, manifest), _device(config)
    usable = [available(sample.info.codec, device) for sample in samples]
    if not usable or any("dali" not in names for names in usable):
        return "pyav"
    rates = measure(config, samples)
    chosen = max(rates, key=lambda name: rates[name])
    figures = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    say(f"Decoding with {chosen}: clips/s on {device} with {figures}.")
    return chosen


def measure(config: Config, samples: Sequence[Sample]) -> dict[Backend, float]:
    """Clips per second of each backend for one rank; both must be able to decode the samples.

    pyav: what its decode threads could give, from CPU seconds, so that what else a machine does
    does not count; planes, since the device converts colours. dali: batches, by the clock.
    """
    requests = _requests(config, samples)

    def with_pyav() -> None:
        for request in requests:
            pyav(request.video, request.info, request.numbers)

    def with_dali() -> None:
        batch = dali(config).decode_batch(requests, config.data.frame_size)
        batch.clips[0, 0, 0, 0, 0].item()  # waits for the device
        for error in batch.bad.values():
            raise error

    pyav_rate = _rate(with_pyav, time.process_time) * config.data.decode_threads
    return {
        "pyav": len(requests) * pyav_rate,
        "dali": len(requests) * _rate(with_dali, time.perf_counter),
    }


def _rate(work: Callable[[], None], clock: Callable[[], float]) -> float:
    """Calls per second; 0 if it fails. The first call, which sets things up, does not count."""
    try:
        work()
        began, calls = clock(), 0
        while clock() - began < _SECONDS:
            work()
            calls += 1
    except (DecodeError, RuntimeError):
        return 0.0
    return calls / (clock() - began)


def _requests(config: Config, samples: Sequence[Sample]) -> list[VideoRequest]:
    """Windows all over the samples, as many as keep all pipelines busy."""
    requests = []
    for turn, sample in itertools.product(range(config.decode.pipelines), samples):
        info = sample.info
        start = (info.num_frames - config.window) * turn // config.decode.pipelines
        numbers = range(start, start + config.window, config.data.sampling_rate)
        requests.append(
            VideoRequest(sample.video, info, numbers, [Crop(0, 0, info.height, info.width)])
        )
    return requests


def _samples(url: str, manifest: Manifest) -> list[Sample]:
    """The first readable samples of a data set."""
    reader = SampleReader(url, manifest, range_bytes=1)
    found = [reader.read(index) for index in range(min(_SAMPLES, manifest.num_samples))]
    return [sample for sample in found if isinstance(sample, Sample)]


def _device(config: Config) -> str:
    return "cuda" if config.cluster.use_gpu else "cpu"
