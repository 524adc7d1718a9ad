"""Measure how fast videos are decoded, and choose a run's decode backend by that.

In: decoders and windows of videos. Out: `Rate`s. On the host the CPU time counts, because decoders
share the cores; a batched decoder works on the device and is timed by the clock. Color conversion
of YUV planes is not part of it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import cast

from svfap_dist.config import Config
from svfap_dist.data import decoding
from svfap_dist.errors import DecodeError
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.profiling.timing import Rate, repeat
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import Sample
from svfap_dist.video.backends import BACKENDS, DEFAULT, available, capabilities
from svfap_dist.video.frames import BatchDecoder, Decoder, VideoRequest
from svfap_dist.video.info import Crop, clip_frames

log = logging.getLogger(__name__)

_SECONDS = 1.0  # for which each backend is timed, at least


def time_decoder(decoder: Decoder, requests: Sequence[VideoRequest], min_seconds: float) -> Rate:
    """Return the rate of a decoder in this thread, after a warm-up.

    Args:
        decoder: on the host.
        requests: windows of videos, decoded one after the other.
        min_seconds: CPU seconds for which requests are repeated.

    Raises:
        DecodeError: a video is bad.
    """

    def decode() -> int:
        for request in requests:
            decoder(request.video, request.info, request.numbers)
        return len(requests)

    decode()
    return repeat(decode, min_seconds, time.process_time)


def time_batch_decoder(
    decoder: BatchDecoder, batches: Sequence[Sequence[VideoRequest]], size: int, min_seconds: float
) -> Rate:
    """Return the rate of a batched decoder, after a warm-up.

    Args:
        decoder: on the device.
        batches: that are decoded in turn.
        size: pixels of each side of a clip.
        min_seconds: wall time for which batches are repeated.

    Raises:
        DecodeError: a video is bad.
    """
    turns = itertools.cycle(batches)

    def decode() -> int:
        requests = next(turns)
        batch = decoder.decode_batch(requests, size)
        for error in batch.bad.values():
            raise error
        batch.clips[-1, -1, -1, -1, -1].item()  # waits for the device
        return len(requests)

    decode()
    return repeat(decode, min_seconds)


def choose_backend(config: Config, url: str, manifest: Manifest) -> str:
    """Return the backend for a run that starts.

    Args:
        config: the recipe.
        url: of the shards.
        manifest: theirs.

    Returns:
        The one that the recipe names; for `auto`, the fastest here, or the default where decode
        workers augment a task's clips.

    Raises:
        ConfigError: the named one does not decode the data set.
        ShardError, StorageError: the samples cannot be read.
    """
    if config.decode.backend != "auto":
        decoding.check_backend(config, url, manifest)
        return config.decode.backend
    samples, device = decoding.first_samples(url, manifest), decoding.rank_device(config)
    on_host = config.task is not None and not config.augments_on_device
    if on_host or not samples:
        return DEFAULT
    kinds = [decoding.codec_and_pixel_format(sample) for sample in samples]
    gpu = decoding.compute_capability()
    able = [set(available(codec, device, pixels, gpu)) for codec, pixels in kinds]
    names = [name for name in BACKENDS if all(name in names for names in able)]
    if config.data.still_motion:  # which a batched one would have to add on the device
        names = [name for name in names if not capabilities(name).batched]
    if len(names) < 2:
        return names[0] if names else DEFAULT
    rates = _measure_backends(config, samples, names)
    chosen = max(rates, key=lambda name: rates[name])
    figures = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    log.info("Decoding with %s: clips/s on %s with %s.", chosen, device, figures)
    return chosen


def _measure_backends(
    config: Config, samples: Sequence[Sample], names: Sequence[str]
) -> dict[str, float]:
    """Return clips per second of backends for a rank with all its decoders; 0: it failed."""
    requests = _spread_windows(config, samples)
    # With worker processes the threads only fetch; and more than the cores decode no faster.
    at_a_time = config.data.decode_workers or config.data.decode_threads
    decoders = min(at_a_time, usable_cpus())

    def rate_of(name: str) -> float:
        choice = decoding.with_backend(config, name)
        try:
            decoder = decoding.decoder_of(choice)
            if capabilities(name).batched:
                batched, size = cast(BatchDecoder, decoder), config.data.frame_size
                return time_batch_decoder(batched, [requests], size, _SECONDS).per_second
            rate = time_decoder(decoder, requests, _SECONDS)
        except (DecodeError, RuntimeError):
            return 0.0
        return rate.per_cpu_second * decoders

    return {name: rate_of(name) for name in names}


def _spread_windows(config: Config, samples: Sequence[Sample]) -> list[VideoRequest]:
    """Return windows all over the samples, enough to keep all pipelines busy."""
    requests, pipelines = [], decoding.pipelines_of(config)
    for turn, sample in itertools.product(range(pipelines), samples):
        info = sample.info
        start = max(info.num_frames - config.window, 0) * turn // pipelines
        shape = config.data
        numbers = clip_frames(start, shape.num_frames, shape.sampling_rate, info.num_frames)
        crop = Crop(0, 0, info.height, info.width)
        requests.append(VideoRequest(sample.video, info, numbers, [crop]))
    return requests
