"""Other ways to store videos for training, beside the one that is used: `bench decode --layouts`.

Each row is the profile `train` with one setting changed: how often there is a key frame, whether
frames lie phase by phase, quality and effort; and two things that the profile does not do: HEVC,
and reading through a container. All rows take turns in one run, against the same baseline.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.video.frame import PictureType
from av.video.stream import VideoStream

from data_sharding.transcode import TrainProfile, transcode
from svfap_dist.bench import decode
from svfap_dist.bench.decode import FRAMES, STRIDE, Video
from svfap_dist.progress import say
from svfap_dist.video.info import stored_position

_PROFILES = {
    "as used": TrainProfile(),
    "crf 21": TrainProfile(crf=21),
    "crf 23": TrainProfile(crf=23),
    "crf 27": TrainProfile(crf=27),
    "preset veryfast": TrainProfile(preset="veryfast"),
    "preset slower": TrainProfile(preset="slower"),
    "intra only": TrainProfile(group=1),
    "groups of 8": TrainProfile(group=8),
    "groups of 16": TrainProfile(group=16),
    "groups of 32": TrainProfile(group=32),
    "groups of 50": TrainProfile(group=50),
    "in the order shown": TrainProfile(phases=1),
}
_NEARLY_LOSSLESS = TrainProfile(crf=8)  # what HEVC is made from


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to store videos."""

    layout: str
    clips_per_cpu_second: float
    ratio: float  # to the baseline
    kilobytes: float  # of a video, mean
    bytes_ratio: float  # to the source
    psnr_db: float
    encode_seconds: float  # CPU-seconds of a video, mean


@dataclasses.dataclass(frozen=True)
class Layouts:
    """The table."""

    videos: int
    source_rgb: float
    rows: list[Row]

    def lines(self) -> list[str]:
        """For people: Markdown."""
        head = "| stored as | clips per CPU-second | to source | kB | to source | dB | CPU-s |"
        rows = [
            f"| {row.layout} | {row.clips_per_cpu_second:.0f} | {row.ratio:.1f} | "
            f"{row.kilobytes:.1f} | {row.bytes_ratio:.2f} | {row.psnr_db:.1f} | "
            f"{row.encode_seconds:.2f} |"
            for row in self.rows
        ]
        first = f"{self.videos} videos; source, RGB by to_ndarray: {self.source_rgb:.1f}"
        return [first, head, "|---" * 7 + "|", *rows]


def run(folder: str = "", rounds: int = 7) -> Layouts:
    """Measure all layouts on the videos below `folder`, or on synthetic faces.

    Raises: ConfigError if there is no usable video.
    """
    sources = decode.load(folder)
    made: dict[str, list[Video]] = {}
    seconds: dict[str, float] = {}
    for name, profile in _PROFILES.items():
        made[name], seconds[name] = _made(name, sources, lambda v, p=profile: transcode(*v, p))
    made["HEVC, crf 25"], seconds["HEVC, crf 25"] = _made("HEVC", sources, _hevc)
    variants = {name: _reader(decode.planes, videos) for name, videos in made.items()}
    through = "as used, through the container"
    variants[through] = _reader(_by_container, made["as used"])
    made[through], seconds[through] = made["as used"], seconds["as used"]
    baseline = {"source": _reader(decode.by_to_ndarray, sources)}
    rates = decode.measure(sources, baseline | variants, rounds)
    return Layouts(
        len(sources),
        rates["source"],
        [
            Row(
                name,
                rates[name],
                rates[name] / rates["source"],
                decode.bytes_of(videos) / len(videos) / 1000,
                decode.bytes_of(videos) / decode.bytes_of(sources),
                decode.psnr(sources, videos),
                seconds[name],
            )
            for name, videos in made.items()
        ],
    )


def _reader(
    read: Callable[[Video, int], object], videos: Sequence[Video]
) -> Callable[[decode.Starts], int]:
    return lambda starts: decode.each(read, videos, starts)


def _made(
    name: str, sources: Sequence[Video], make: Callable[[Video], Video]
) -> tuple[list[Video], float]:
    say(f"Encoding: {name} ...")
    begin = time.process_time()
    videos = [make(video) for video in sources]
    return videos, (time.process_time() - begin) / len(videos)


def _by_container(video: Video, start: int) -> list[list[np.ndarray]]:
    """A window of a transcoded video, read as any player reads it."""
    data, info = video
    order = info.layout
    assert order is not None
    assert order.phases == STRIDE
    first = stored_position(start, info.num_frames, order.phases)
    got = []
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        tick = stream.time_base
        assert tick is not None
        container.seek(int(first / info.fps / tick), stream=stream)
        for frame in container.decode(stream):
            if round(float((frame.pts or 0) * tick) * info.fps) >= first:
                got.append([np.array(cast(bytes, plane)) for plane in frame.planes])
                if len(got) == FRAMES:
                    break
    return got


def _hevc(video: Video) -> Video:
    """The video as HEVC with the key frames that the profile `train` has: bare packets."""
    data, info = transcode(*video, _NEARLY_LOSSLESS)
    order = info.layout
    assert order is not None
    with av.open(io.BytesIO(data), "r") as container:
        frames = list(container.decode(video=0))
    keys = {
        stored_position(number, info.num_frames, order.phases)
        for number in range(info.num_frames)
        if number // order.phases % order.group == 0
    }
    settings = "pools=none:frame-threads=1:bframes=0:scenecut=0:keyint=-1:info=0:log-level=none"
    options = {"crf": "25", "preset": "medium", "tune": "fastdecode", "forced-idr": "1"}
    with av.open(io.BytesIO(), "w", format="mp4") as container:
        rate = Fraction(info.fps).limit_denominator(1_000_000)
        options |= {"x265-params": settings}
        stream = cast(VideoStream, container.add_stream("libx265", rate=rate, options=options))
        stream.width, stream.height, stream.pix_fmt = info.width, info.height, "yuv420p"
        packets = []
        for position, frame in enumerate(frames):
            frame.pts, frame.time_base = position, 1 / rate
            frame.pict_type = PictureType.I if position in keys else PictureType.P
            packets += stream.encode(frame)
        packets = [bytes(cast(bytes, packet)) for packet in [*packets, *stream.encode()]]
        header = base64.b64encode(stream.codec_context.extradata or b"").decode()
    sizes = tuple(map(len, packets))
    order = dataclasses.replace(order, codec_header=header, first_byte=0, packet_sizes=sizes)
    return b"".join(packets), dataclasses.replace(info, codec="hevc", layout=order)
