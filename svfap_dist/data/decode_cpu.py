"""Video bytes to frames on the CPU, with PyAV.

In: a sample's compressed video and which frames of it. Out: those frames as uint8 RGB. Frames are
named by time and not by counting packets, so that after a seek the same frames come out as when
decoding from the start. With a constant rate, frame i is the one whose time is nearest to i / fps;
with a variable rate it is the one on the screen at i / fps. Times count from the stream's first
frame.

One call uses one thread: the loader decodes many videos side by side. Only what lies between the
key frame before the window and the window's end is decoded, and only wanted frames become RGB. One
single-threaded converter serves all frames of a call: PyAV's `to_ndarray(format=...)` sets one up
for every frame, with threads, which costs several times what the conversion itself does.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from svfap_dist.errors import DecodeError
from svfap_dist.shard_format import VideoInfo

TimedFrame = tuple[Fraction, av.VideoFrame]  # seconds after the stream's first frame
_LEAVE_OUT = "leave this video out when sharding"


class TooShortError(DecodeError):
    """The video ends before a wanted frame."""


class WrongSizeError(DecodeError):
    """The frames are not of the size that the shard states."""


def decode(video: bytes, start: int, num_frames: int, stride: int, info: VideoInfo) -> np.ndarray:
    """Frames start, start + stride, ... in presentation order: uint8 RGB [num_frames, H, W, 3].

    Args:
        video: a whole video file.
        start: number of the first frame, from 0.
        stride: frames from one wanted frame to the next.
        info: what the shard says about the video.

    Raises: DecodeError, or its kinds TooShortError and WrongSizeError, if one cannot be had.
    """
    period = 1 / Fraction(info.fps).limit_denominator(1_000_000)  # 29.97.. -> 30000 / 1001
    moments = [(start + k * stride) * period for k in range(num_frames)]
    frames = np.empty((num_frames, info.height, info.width, 3), np.uint8)
    converter = VideoReformatter()
    try:
        for k, frame in enumerate(_wanted(video, moments, period, info)):
            _check_frame(frame, info)
            frames[k] = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    except FFmpegError as error:
        raise DecodeError(
            "Video cannot be decoded",
            where=f"{float(moments[0]):.3f} s to {float(moments[-1]):.3f} s",
            found=f"{type(error).__name__}: {error}",
            do=_LEAVE_OUT,
        ) from error
    return frames


def _check_frame(frame: av.VideoFrame, info: VideoInfo) -> None:
    if frame.is_corrupt:
        raise DecodeError("Frame is damaged", where=f"time stamp {frame.pts}", do=_LEAVE_OUT)
    if (frame.width, frame.height) != (info.width, info.height):
        raise WrongSizeError(
            "Frame has another size than the shard states",
            where=f"time stamp {frame.pts}",
            found=f"{frame.width}x{frame.height} for {info.width}x{info.height}",
            do=_LEAVE_OUT,
        )


def _wanted(
    video: bytes,
    moments: Sequence[Fraction],
    period: Fraction,
    info: VideoInfo,
) -> Iterator[av.VideoFrame]:
    """The frames at `moments`, one by one; decodes no further than the last of them needs."""
    constant = info.constant_frame_rate
    # A frame may come so much after the moment it stands for: time stamps are rounded.
    slack = period / 2 if constant else Fraction(1, 10_000)
    pending = iter(moments)
    moment = next(pending)
    shown: TimedFrame | None = None  # the frame on the screen just before the new one
    for time, frame in _frames_from(video, moment + slack):
        while time > moment + slack:
            yield frame if shown is None else shown[1]
            if (moment := next(pending, None)) is None:
                return
        if constant and time > moment - slack:  # no later frame can be nearer
            yield frame
            if (moment := next(pending, None)) is None:
                return
        shown = time, frame
    if shown is None:
        raise DecodeError("No frame could be decoded", where=f"{info.codec} video", do=_LEAVE_OUT)
    end = shown[0] + (slack if constant else max(period, _duration(shown[1])))
    for late in itertools.chain([moment], pending):
        if late > end:
            raise TooShortError(
                "Video ends before a wanted frame",
                where=f"{float(late):.3f} s",
                found=f"last frame at {float(shown[0]):.3f} s",
                do=_LEAVE_OUT,
            )
        yield shown[1]


def _duration(frame: av.VideoFrame) -> Fraction:
    return frame.duration * frame.time_base if frame.time_base else Fraction(0)


def _frames_from(video: bytes, moment: Fraction, seek: bool = True) -> Iterator[TimedFrame]:
    """Frames in presentation order, from the last key frame not after `moment` (seconds)."""
    with av.open(io.BytesIO(video), "r") as container:
        stream = _video_stream(container)
        origin, tick = stream.start_time, stream.time_base
        assert tick is not None
        frames = container.decode(stream)
        if container.format.name == "avi":
            origin, frames = None, _with_avi_times(frames)
        elif seek and origin is not None:
            container.seek(origin + int(moment / tick), stream=stream)
            first = next(frames, None)
            if first is None or ((first.pts or 0) - origin) * tick > moment:
                # Some containers can only seek by decoding time, and land a key frame late.
                yield from _frames_from(video, moment, seek=False)
                return
            frames = itertools.chain([first], frames)
        for frame in frames:
            if frame.pts is None:
                where = f"{container.format.name} file"
                raise DecodeError("Frame has no time stamp", where=where, do=_LEAVE_OUT)
            origin = frame.pts if origin is None else origin
            yield (frame.pts - origin) * tick, frame


def _with_avi_times(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Time stamps for AVI, which keeps none: FFmpeg's guesses are wrong where there are B frames.

    Frames come out in the right order, and their decoding times, in units of a frame, leave room
    for frames that were dropped; the last few have none.
    """
    time = -1
    for frame in frames:
        time = time + 1 if frame.dts is None else frame.dts
        frame.pts = time
        yield frame


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # a cover picture is no video
            stream.codec_context.thread_count = 1
            return stream
    raise DecodeError("No video stream", where=f"{container.format.name} file", do=_LEAVE_OUT)
