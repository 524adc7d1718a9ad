"""The table of decode backends, and what each can do.

`pyav` decodes on the CPU whatever FFmpeg decodes. `dali` decodes on the GPU, whose decoding units
leave the cores free; on a CPU it has a few codecs only, for tests. Backends keep the contract of
`frames.Decoder` and return the same frames, but not the same bits, since they round colors
differently: a run never changes its backend (`data.decoding`).

To add a backend, write one file with a factory and add one row here. The rest of the code asks the
row what the backend can do, and never compares names.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from svfap_dist.errors import ConfigError

if TYPE_CHECKING:
    from svfap_dist.video.frames import Decoder, Frames
    from svfap_dist.video.info import VideoInfo

DEFAULT = "pyav"  # right everywhere, without a measurement


@dataclasses.dataclass(frozen=True)
class Backend:
    """What a decode backend can do: a row of `BACKENDS`."""

    factory: str  # "module:attribute" of a function (device, *, threads, pipelines) -> `Decoder`
    decodes_on: Literal["host", "device"]  # host: by threads or workers; device: in the rank
    # FFmpeg's names of its codecs, by device of the rank ("cpu", "cuda"); None: all of FFmpeg's.
    codecs: Mapping[str, frozenset[str] | None]
    batched: bool = False  # the decoder is a `BatchDecoder`, which makes RGB clips on the device
    gives_planes: bool = False  # returns YUV planes, so that the device can convert colors
    module: str = ""  # an import it needs beyond the project's dependencies
    install: str = ""  # the command that installs it

    @property
    def is_installed(self) -> bool:
        """Return whether its module can be imported, without importing it."""
        try:
            return not self.module or importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # the package that would contain it
            return False

    def decodes(
        self,
        codec: str,
        device: str,
        pixel_format: str = "yuv420p",
        gpu: tuple[int, int] | None = None,
    ) -> bool:
        """Return whether it decodes such videos, installed or not.

        Args:
            codec: FFmpeg's name.
            device: device of the rank, "cpu" or "cuda".
            pixel_format: FFmpeg's name; the default is 8-bit 4:2:0.
            gpu: the device's CUDA compute capability; None: unknown, so no more than all can do.
        """
        names = self.codecs.get(device, frozenset())
        if names is None or device == "cpu":
            return names is None or codec in names
        return codec in names and nvdec_decodes(codec, pixel_format, gpu or _OLDEST_GPU)


# The compute capability from which decoding units (NVDEC) decode what not all of them decode:
# NVIDIA's NVDEC Video Decoder application note, SDK 13.0, table 1. What is not listed, none does.
_OLDEST_GPU, NEWEST_GPU = (7, 0), (12, 0)
_NVDEC: dict[tuple[str, str], tuple[int, int]] = {
    **{(codec, "yuv420p"): _OLDEST_GPU for codec in ("h264", "hevc", "vp8", "vp9")},
    ("mpeg4", "yuv420p"): _OLDEST_GPU,
    **{("h264", name): (10, 0) for name in ("yuv420p10le", "yuv422p", "yuv422p10le")},
    **{("hevc", name): _OLDEST_GPU for name in ("yuv420p10le", "yuv420p12le")},
    **{("hevc", name): (7, 5) for name in ("yuv444p", "yuv444p10le", "yuv444p12le")},
    **{("hevc", name): (10, 0) for name in ("yuv422p", "yuv422p10le", "yuv422p12le")},
    **{("vp9", name): (7, 5) for name in ("yuv420p10le", "yuv420p12le")},
    **{("av1", name): (8, 6) for name in ("yuv420p", "yuv420p10le")},
}
_WITHOUT_AV1 = {(9, 0)}  # newer than the first with AV1


def nvdec_decodes(codec: str, pixel_format: str, gpu: tuple[int, int]) -> bool:
    """Return whether the decoding units of a GPU decode such videos.

    Args:
        codec: FFmpeg's name.
        pixel_format: FFmpeg's name.
        gpu: the device's CUDA compute capability.
    """
    if codec == "av1" and gpu in _WITHOUT_AV1:
        return False
    oldest = _NVDEC.get((codec, pixel_format.replace("yuvj", "yuv")))  # yuvj: full range
    return oldest is not None and gpu >= oldest


# DALI 2.4, documentation of fn.decoders.video. NVDEC decodes MJPEG, but DALI on a GPU refuses it.
_DALI_CPU = frozenset({"vp8", "vp9", "mjpeg"})
_DALI_GPU = frozenset({"vp8", "vp9", "av1", "mpeg4", "h264", "hevc"})

BACKENDS: dict[str, Backend] = {
    "pyav": Backend(
        "svfap_dist.video.pyav:open_decoder",
        decodes_on="host",
        codecs={"cpu": None, "cuda": None},
        gives_planes=True,
    ),
    "dali": Backend(
        "svfap_dist.video.dali:DaliDecoder",
        decodes_on="device",
        codecs={"cpu": _DALI_CPU, "cuda": _DALI_GPU},
        batched=True,
        module="nvidia.dali",
        install="pip install svfap-dist[gpu]",
    ),
}


# Decoding units (NVDEC) of GPUs, by a word of CUDA's name; from NVIDIA's Video Encode and Decode
# GPU Support Matrix.
_DECODING_UNITS = {
    **{"B200": 7, "GH200": 7, "H200": 7, "H100": 7},
    **{"A100": 5, "A30": 4, "A40": 2, "A10": 2},
    **{"L40S": 3, "L40": 3, "L4": 4, "T4": 2, "V100": 1},
}
_UNKNOWN_UNITS = 4


def decoding_units(device_name: str) -> int:
    """Return how many videos a GPU decodes at a time.

    Args:
        device_name: as CUDA calls it, e.g. "NVIDIA H100 80GB HBM3".
    """
    words = re.split(r"[^A-Z0-9]+", device_name.upper())
    return next(
        (_DECODING_UNITS[word] for word in words if word in _DECODING_UNITS), _UNKNOWN_UNITS
    )


def capabilities(name: str) -> Backend:
    """Return the row of a backend.

    Args:
        name: as in `decode.backend`; "auto" is the default backend until a run has chosen.
    """
    return BACKENDS[DEFAULT if name == "auto" else name]


def host_backend(name: str) -> str:
    """Return a backend that decodes on the host: this one if it does, else the default.

    Args:
        name: as in `decode.backend`.
    """
    return name if capabilities(name).decodes_on == "host" else DEFAULT


def available(
    codec: str, device: str, pixel_format: str = "yuv420p", gpu: tuple[int, int] | None = None
) -> list[str]:
    """Return the installed backends that decode such videos.

    Args:
        codec: FFmpeg's name.
        device: device of the rank, "cpu" or "cuda".
        pixel_format: FFmpeg's name; the default is 8-bit 4:2:0.
        gpu: the device's CUDA compute capability; None: unknown.
    """
    rows = {name: row for name, row in BACKENDS.items() if row.is_installed}
    return [name for name, row in rows.items() if row.decodes(codec, device, pixel_format, gpu)]


@functools.cache
def open_decoder(name: str, device: str = "cpu", threads: int = 1, pipelines: int = 1) -> Decoder:
    """Return this process's decoder of a backend.

    Args:
        name: as in `decode.backend`.
        device: device of the rank, "cpu" or "cuda".
        threads: CPU threads of each pipeline.
        pipelines: pipelines that share a batch.

    Raises:
        ConfigError: it is not installed.
    """
    row = capabilities(name)
    if not row.is_installed:
        where, found = f"decode.backend = {name}", f"no module {row.module}"
        advice = f"install it with `{row.install}`, or set decode.backend={DEFAULT}"
        raise ConfigError("Decode backend is not installed", where, found, advice)
    module, _, attribute = row.factory.partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    return factory(device, threads=threads, pipelines=pipelines)


def decode(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> Frames:
    """Decode frames with the default backend.

    Args:
        video: bytes of the whole file.
        info: what is known about it.
        numbers: frame numbers from 0; at least one, in any order, repeats allowed.

    Raises:
        DecodeError: a frame cannot be decoded.
    """
    return open_decoder(DEFAULT)(video, info, numbers)
