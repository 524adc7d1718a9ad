"""Which backend decodes the clips of a run.

Backends return the same frames, but round colors differently, so a run keeps one for life:

- A name in `decode.backend` always wins.
- `auto` is resolved by rank 0 when a run starts (`choose_backend`). If only one backend can decode
  the data set's codec on this machine, as on a CPU with H.264, it is that one. Otherwise each
  decodes a few samples, and the fastest is chosen.
- The name is then part of the resolved recipe in every checkpoint (`pin_backend`). A resumed run
  measures nothing, so its bits depend neither on timing noise nor on the machine; where its
  backend is not available, that is an error.

Outside of runs `auto` is the default backend.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from svfap_dist.config import Config
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import Sample, SampleReader
from svfap_dist.video.backends import BACKENDS, DEFAULT, available, capabilities, open_decoder
from svfap_dist.video.frames import BatchDecoder, Decoder, VideoRequest
from svfap_dist.video.views import Crop

log = logging.getLogger(__name__)

_SAMPLES = 8  # that are probed
_SECONDS = 1.0  # that each backend is timed, at least


def decoder_of(config: Config) -> Decoder:
    """Return this process's decoder of the backend that a recipe names.

    Args:
        config: the recipe.

    Raises:
        ConfigError: it is not installed.
    """
    pipelines = config.decode.pipelines
    threads = -(-config.data.decode_threads // pipelines)
    return open_decoder(config.decode.backend, _device(config), threads, pipelines)


def batch_decoder_of(config: Config) -> BatchDecoder:
    """Return the decoder of a recipe whose backend is batched.

    Args:
        config: the recipe.

    Raises:
        ConfigError: it is not installed.
    """
    assert capabilities(config.decode.backend).batched
    return cast(BatchDecoder, decoder_of(config))


def with_backend(config: Config, name: str) -> Config:
    """Return a recipe with another backend.

    Args:
        config: the recipe.
        name: a row of `BACKENDS`.
    """
    return config.model_copy(update={"decode": config.decode.model_copy(update={"backend": name})})


def pin_backend(config: Config, tables: dict[str, Any]) -> Config:
    """Return the recipe of a resumed run with the run's own backend in place of `auto`.

    Args:
        config: the recipe as the user gives it now.
        tables: the run's own resolved recipe; `auto` in it is from before there was a choice.
    """
    before = tables["decode"]["backend"]
    if config.decode.backend != "auto":
        return config
    return with_backend(config, DEFAULT if before == "auto" else before)


def check_backend(config: Config, url: str, manifest: Manifest) -> None:
    """Check that the backend that a recipe names decodes a data set.

    Whether it is installed is checked on the machines that train.

    Args:
        config: the recipe.
        url: of the shards.
        manifest: theirs.

    Raises:
        ConfigError: it does not.
    """
    name = config.decode.backend
    row = capabilities(name)
    if row.codecs.get(_device(config), frozenset()) is None:
        return  # whatever FFmpeg decodes: nothing to read
    for codec in sorted({sample.info.codec for sample in _samples(url, manifest)}):
        if not row.decodes(codec, _device(config)):
            raise ConfigError(
                f"Backend {name} does not decode {codec} on this device",
                where=f"decode.backend = {name}",
                found=f"{url} has {codec} videos, and cluster.use_gpu = {config.cluster.use_gpu}",
                do=f"set decode.backend={DEFAULT}, or cluster.use_gpu=true on machines with a GPU",
            )


def choose_backend(config: Config, url: str, manifest: Manifest) -> str:
    """Return the backend for a run that starts.

    Args:
        config: the recipe.
        url: of the shards.
        manifest: theirs.

    Returns:
        The one that the recipe names; for `auto`, the fastest here. A task's clips are augmented
        on the host, so its `auto` is the default.

    Raises:
        ConfigError: the named one does not decode the data set.
        ShardError, StorageError: the samples cannot be read.
    """
    if config.decode.backend != "auto":
        check_backend(config, url, manifest)
        return config.decode.backend
    samples, device = _samples(url, manifest), _device(config)
    if config.task is not None or not samples:
        return DEFAULT
    able = [set(available(sample.info.codec, device)) for sample in samples]
    names = [name for name in BACKENDS if all(name in names for names in able)]
    if len(names) < 2:
        return names[0] if names else DEFAULT
    rates = measure_backends(config, samples, names)
    chosen = max(rates, key=lambda name: rates[name])
    figures = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    log.info("Decoding with %s: clips/s on %s with %s.", chosen, device, figures)
    return chosen


def measure_backends(
    config: Config, samples: Sequence[Sample], names: Sequence[str]
) -> dict[str, float]:
    """Return the clips per second of backends for one rank; 0 where one fails.

    On the host: of all decode threads, from CPU seconds, so that other load does not count; color
    conversion is the device's. Batched: by the clock.

    Args:
        config: the recipe.
        samples: of the data set; each backend must have their codecs.
        names: the backends.
    """
    requests = _requests(config, samples)

    def rate_of(name: str) -> float:
        choice = with_backend(config, name)
        if capabilities(name).batched:
            return _rate(lambda: _decode_batch(choice, requests), time.perf_counter)
        decode = decoder_of(choice)
        rate = _rate(
            lambda: [decode(r.video, r.info, r.numbers) for r in requests], time.process_time
        )
        return rate * config.data.decode_threads

    return {name: len(requests) * rate_of(name) for name in names}


def _decode_batch(config: Config, requests: Sequence[VideoRequest]) -> None:
    batch = batch_decoder_of(config).decode_batch(requests, config.data.frame_size)
    batch.clips[0, 0, 0, 0, 0].item()  # waits for the device
    for error in batch.bad.values():
        raise error


def _rate(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return calls per second; 0 if it fails. The first call, which initializes, is not timed."""
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
    """Return windows spread over the samples, enough to keep all pipelines busy."""
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
    """Read the first readable samples of a data set."""
    reader = SampleReader(url, manifest, range_bytes=1)
    found = [reader.read(index) for index in range(min(_SAMPLES, manifest.num_samples))]
    return [sample for sample in found if isinstance(sample, Sample)]


def _device(config: Config) -> str:
    return "cuda" if config.cluster.use_gpu else "cpu"
