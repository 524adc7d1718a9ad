"""The bytes of a video -> the planes of its frames, cut, resized and at a constant rate.

Frames stay in the planes they are decoded to: no conversion of colours costs quality, and what the
source says about its colours is said again. Frame i is the one on the screen at i / fps, as it is
when the source is read in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import IO, Any, Literal, NamedTuple, cast

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from data_sharding.transcode.profile import refused
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import open_video, video_stream
from svfap_dist.video.region import Crop

_BT601_NAMES = {2, 5, 6}  # of FFmpeg: unspecified, which its converters take so, and two names


class Colours(NamedTuple):
    """What a video's numbers mean."""

    matrix: Literal["bt601", "bt709"]
    full_range: bool


def spool_planes(
    data: bytes, info: VideoInfo, crop: Crop, size: int | None, spool: IO[bytes]
) -> Colours:
    """Write all frames, cut and resized, one after the other: planes y, u, v of each."""
    colours: Colours | None = None
    layout = VideoReformatter()
    scaler = VideoReformatter()
    for frame in _at_constant_rate(data, info):
        if (frame.width, frame.height) != (info.width, info.height):
            found = f"a frame of {frame.width}x{frame.height} among {info.width}x{info.height}"
            raise refused("undecodable", found)
        planar, seen = _planar(frame, layout)
        if seen != (colours := colours or seen):
            raise refused("undecodable", f"colours change from {colours} to {seen}")
        cut = _cut(planar, crop)
        if size is not None:
            cut = scaler.reformat(
                cut, width=size, height=size, interpolation=Interpolation.BICUBIC, threads=1
            )
        spool.write(cut.to_ndarray().tobytes())  # [H * 3 / 2, W]
    assert colours is not None, "there is at least one frame"
    return colours


def _at_constant_rate(data: bytes, info: VideoInfo) -> Iterator[av.VideoFrame]:
    """Frames 0 .. num_frames - 1: of those decoded, the one on the screen at i / fps, or nearest to
    it where the rate is constant (time stamps are rounded)."""
    period = 1 / Fraction(info.fps).limit_denominator(1_000_000)
    slack = period / 2 if info.constant_frame_rate else Fraction(1, 10_000)
    number, shown, time = 0, None, Fraction(0)
    for time, frame in _decoded(data):
        while shown is not None and number < info.num_frames and time > number * period + slack:
            yield shown
            number += 1
        shown = frame
    if shown is None:
        raise refused("undecodable", "no frame came out of the decoder")
    last = (info.num_frames - 1) * period
    if last > time + (slack if info.constant_frame_rate else max(period, _duration(shown))):
        found = f"last frame at {float(time):.3f} s of {float(last):.3f} s"
        raise refused("undecodable", found)
    for _ in range(number, info.num_frames):
        yield shown


def _decoded(data: bytes) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """All frames, with the seconds after the stream's first frame at which they are shown."""
    with open_video(data) as container:
        stream = video_stream(container)
        if stream is None:
            raise refused("undecodable", "no video stream")
        stream.codec_context.thread_count = 1
        tick, origin, previous = stream.time_base, None, -1
        assert tick is not None
        for count, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise refused("undecodable", f"frame {count} is damaged")
            time = frame.pts
            if container.format.name == "avi":  # has no times of presentation, only of decoding
                time = previous + 1 if frame.dts is None else frame.dts
            elif time is None:
                raise refused("undecodable", f"frame {count} has no time stamp")
            previous = time
            origin = time if origin is None else origin
            yield (time - origin) * tick, frame


def _duration(frame: av.VideoFrame) -> Fraction:
    return frame.duration * frame.time_base if frame.time_base else Fraction(0)


def _planar(frame: av.VideoFrame, layout: VideoReformatter) -> tuple[av.VideoFrame, Colours]:
    """The frame as 4:2:0 planes of 8 bits, untouched where it is that already."""
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    if frame.format.is_rgb:
        converted = layout.reformat(
            frame,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        return converted, Colours("bt601", False)
    if frame.colorspace not in {*_BT601_NAMES, Colorspace.ITU709}:
        frame = layout.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1
        )
        return frame, Colours("bt709", full)
    matrix = "bt709" if frame.colorspace == Colorspace.ITU709 else "bt601"
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        frame = layout.reformat(frame, format="yuvj420p" if full else "yuv420p", threads=1)
    return frame, Colours(matrix, full)


def _cut(frame: av.VideoFrame, crop: Crop) -> av.VideoFrame:
    """The crop, whose numbers are even, of a frame of 4:2:0 planes."""
    planes = []
    for plane, step in zip(frame.planes, (1, 2, 2), strict=True):
        pixels = np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)
        rows = slice(crop.top // step, (crop.top + crop.height) // step)
        columns = slice(crop.left // step, (crop.left + crop.width) // step)
        planes.append(pixels[rows, columns].ravel())
    packed = np.concatenate(planes).reshape(crop.height * 3 // 2, crop.width)
    return av.VideoFrame.from_ndarray(packed, format="yuv420p")
