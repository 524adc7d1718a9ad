"""Choose the backend that decodes the clips of a run.

Backends return the same frames, but round colors differently, so a run keeps one for life:

- A name in `decode.backend` always wins.
- `auto` is resolved by rank 0 when a run starts (`profiling.decoder`). If only one backend can
  decode the data set's codec on this machine, as on a CPU with H.264, it is that one. Otherwise
  each decodes a few samples, and the fastest is chosen.
- The name is then part of the resolved recipe in every checkpoint (`pin_backend`). A resumed run
  measures nothing, so its bits depend neither on timing noise nor on the machine; where its
  backend is not available, that is an error.

Outside of runs `auto` is the default backend.
"""

from __future__ import annotations

import itertools
from typing import Any

from svfap_dist.config import Config
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import Sample, SampleReader
from svfap_dist.video.backends import (
    DEFAULT,
    NEWEST_GPU,
    capabilities,
    decoding_units,
    open_decoder,
)
from svfap_dist.video.frames import Decoder
from svfap_dist.video.pyav import pixel_format_of

_SAMPLES = 8  # probed for their codecs


def decoder_of(config: Config) -> Decoder:
    """Return this process's decoder of a recipe's backend; a `BatchDecoder` if that is batched.

    Args:
        config: Recipe.

    Raises:
        ConfigError: The backend is not installed.
    """
    pipelines = pipelines_of(config)
    threads = -(-config.data.decode_threads // pipelines)
    return open_decoder(config.decode.backend, rank_device(config), threads, pipelines)


def pipelines_of(config: Config) -> int:
    """Return a recipe's pipelines per device, or as many as this process's GPU has decoding units.

    Args:
        config: Recipe.
    """
    if config.decode.pipelines or rank_device(config) == "cpu":
        return config.decode.pipelines or 1
    import torch

    if not torch.cuda.is_available():
        return 1
    return decoding_units(torch.cuda.get_device_name(torch.cuda.current_device()))


def with_backend(config: Config, name: str) -> Config:
    """Return a recipe with another backend.

    Args:
        config: Recipe.
        name: A row of `BACKENDS`.
    """
    return config.model_copy(update={"decode": config.decode.model_copy(update={"backend": name})})


def pin_backend(config: Config, tables: dict[str, Any]) -> Config:
    """Return the recipe of a resumed run with the run's own backend in place of `auto`.

    Args:
        config: The recipe as the user gives it now.
        tables: The run's own resolved recipe; `auto` in it is from before there was a choice.
    """
    before = tables["decode"]["backend"]
    if config.decode.backend != "auto":
        return config
    return with_backend(config, DEFAULT if before == "auto" else before)


def check_backend(config: Config, url: str, manifest: Manifest) -> None:
    """Check that the backend that a recipe names decodes a data set.

    Whether it is installed, and their GPU can, is checked on the machines that train.

    Args:
        config: Recipe.
        url: Folder or prefix of the shards.
        manifest: The data set.

    Raises:
        ConfigError: It does not decode a codec of the first samples, or would have to move still
            images (data.still_motion).
    """
    name = config.decode.backend
    row = capabilities(name)
    if row.batched and config.data.still_motion:
        found = f"{config.data.still_motion}, with decode.backend = {name}"
        do = f"set decode.backend={DEFAULT}, or data.still_motion=0"
        raise ConfigError(
            "Decode backend does not support data.still_motion", "data.still_motion", found, do
        )
    if row.codecs.get(rank_device(config), frozenset()) is None:
        return  # whatever FFmpeg decodes: nothing to read
    gpu = compute_capability() or NEWEST_GPU
    for codec, pixels in sorted(
        {codec_and_pixel_format(sample) for sample in first_samples(url, manifest)}
    ):
        if not row.decodes(codec, rank_device(config), pixels, gpu):
            what = f"Backend {name} does not decode {codec} on this device"
            found = f"{url or ', '.join(config.data.urls)} has {codec} videos of {pixels}, and "
            found += f"cluster.use_gpu = {config.cluster.on_gpu}"
            do = f"set decode.backend={DEFAULT}, or cluster.use_gpu=true on machines with a GPU"
            raise ConfigError(what, f"decode.backend = {name}", found, do)


def first_samples(url: str, manifest: Manifest) -> list[Sample]:
    """Read the first readable samples of a data set, or of each one of a mixture.

    Args:
        url: Folder or prefix of the shards.
        manifest: The data set.
    """
    reader = SampleReader(url, manifest, range_bytes=1)
    counts = manifest.samples_of_sources
    found = [
        reader.read(first + row)
        for first, count in zip(itertools.accumulate((0, *counts)), counts, strict=False)
        for row in range(min(_SAMPLES, count))
    ]
    return [sample for sample in found if isinstance(sample, Sample)]


def codec_and_pixel_format(sample: Sample) -> tuple[str, str]:
    """Return FFmpeg's names of a sample's codec and pixel format.

    Args:
        sample: A sample of the data set.
    """
    try:
        return sample.info.codec, pixel_format_of(sample.video, sample.info)
    except DecodeError:  # a bad sample, which the run will count
        return sample.info.codec, "yuv420p"


def compute_capability() -> tuple[int, int] | None:
    """Return that of this machine's GPU; None: it has none, as the driver of a run may."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def rank_device(config: Config) -> str:
    """Return the kind of device of a run's ranks: "cpu" or "cuda".

    Args:
        config: Recipe.
    """
    return "cuda" if config.cluster.on_gpu else "cpu"
