"""Which backend turns videos into frames.

`pyav` decodes on the CPU whatever FFmpeg decodes; `dali` decodes on the GPU, on whose decoding
units (NVDEC) the CPU's cores have no part, or, for tests, on the CPU the few codecs that DALI has
there. Both keep the contract of `frames.Decoder` and give the same frames, but not the same bits:
they round colours differently. So a run has one backend for its whole life.

`decode.backend` names it. `auto` is settled once per run, by rank 0 at its start (`choose`): where
only one backend can decode the data set's codec on this machine, it is that; otherwise both decode
a few of its samples, and the one that gives more clips per second is taken. The name goes into the
run's resolved recipe and so into its checkpoints, and a run that is resumed takes it from there
without measuring again: however the measurement would come out today, the bits stay. Naming a
backend always wins. Outside of runs `auto` is `pyav`, which needs no measurement to be right.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Sequence

from svfap_dist.config import Config
from svfap_dist.data import decode_cpu
from svfap_dist.data.frames import Decoder, Frames
from svfap_dist.data.stream import Sample, SampleReader
from svfap_dist.errors import ConfigError
from svfap_dist.progress import say
from svfap_dist.shard_format import Manifest, VideoInfo

# What DALI 2.4 decodes; names as FFmpeg (and so the shards) have them.
_DALI_CODECS = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "cuda": frozenset({"vp8", "vp9", "mjpeg", "av1", "mpeg4", "h264", "hevc"}),
}
_SAMPLES_LOOKED_AT = 8
_SECONDS_PER_MEASUREMENT = 1.0


def backend(config: Config) -> Decoder:
    """The decoder that `decode.backend` names.

    Raises: ConfigError if it is DALI, which is not installed.
    """
    return dali(config) if config.decode.backend == "dali" else pyav


def pyav(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> Frames:
    """The `Decoder` on the CPU: straight to the packets where the shard says where they lie."""
    if info.order is not None:
        from svfap_dist.data import decode_packets

        return decode_packets.decode(video, info, numbers)
    return decode_cpu.decode(video, info, numbers)
