"""Video bytes to frames on the CPU, with PyAV: the backend that decodes everything.

In: a sample's compressed video and the numbers of the wanted frames. Out: those frames; as the
planes that the codec stores where these are 8-bit 4:2:0, which nearly all video is, else as RGB.
Frames are named by time and not by counting packets, so that after a seek the same frames come out
as when decoding from the start. With a constant rate, frame i is the one whose time is nearest to
i / fps; with a variable rate it is the one on the screen at i / fps. Times count from the stream's
first frame.

One call uses one thread: the loader decodes many videos side by side. Only what lies between the
key frame before the first wanted frame and the last wanted one is decoded. Colours that have to be
converted here go through one single-threaded converter per call: PyAV's `to_ndarray(format=...)`
sets one up for every frame, with threads, which costs several times what the conversion itself
does.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.codec import CodecContext
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream

from svfap_dist.errors import DecodeError
from svfap_dist.video.frames import Frames, Matrix, RgbFrames, YuvFrames
from svfap_dist.video.info import VideoInfo

TimedFrame = tuple[Fraction, av.VideoFrame]  # seconds after the stream's first frame
LEAVE_OUT = "leave this video out when sharding"
# Matrices by what a stream says; where it says nothing it is the old one, as FFmpeg has it, too.
MATRICES: dict[int, Matrix] = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601"}


class TooShortError(DecodeError):
    """The video ends before a wanted frame."""


class WrongSizeError(DecodeError):
    """The frames are not of the size that the shard states."""


def decode(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> Frames:
    """The frames with these numbers, from 0 in presentation order, in the order given.

    Args:
        video: a whole video file, whose frames lie in it in the order in which they are shown.
        info: what the shard says about the video.
        numbers: at least one; in any order, repeated or not.

    Raises: DecodeError, or its kinds TooShortError and WrongSizeError, if one cannot be had.
    """
    period = frame_period(info)
    distinct = sorted(set(numbers))
    moments = [number * period for number in distinct]
    try:
        found = dict(zip(distinct, _wanted(video, moments, period, info), strict=True))
        for frame in found.values():
            check_frame(frame, info, f"time stamp {frame.pts}")
        return _handed_over([found[number] for number in numbers])
    except FFmpegError as error:
        raise DecodeError(
            "Video cannot be decoded",
            where=f"{float(moments[0]):.3f} s to {float(moments[-1]):.3f} s",
            found=f"{type(error).__name__}: {error}",
            do=LEAVE_OUT,
        ) from error


def frame_period(info: VideoInfo) -> Fraction:
    """Seconds from one frame to the next, exact for the usual rates: 29.97.. fps is 30000/1001."""
    return 1 / Fraction(info.fps).limit_denominator(1_000_000)


def tolerance(info: VideoInfo) -> Fraction:
    """Seconds by which a frame may miss the moment that it stands for: time stamps are rounded."""
    return frame_period(info) / 2 if info.constant_frame_rate else Fraction(1, 10_000)


def _handed_over(frames: Sequence[av.VideoFrame]) -> Frames:
    colours = {colours_of_planes(frame) for frame in frames}
    if len(colours) == 1 and (shared := colours.pop()) is not None:
        y, u, v = (np.stack([plane(frame, number) for frame in frames]) for number in range(3))
        return YuvFrames(y, u, v, *shared)
    converter = VideoReformatter()
    rgb = [converter.reformat(frame, format="rgb24", threads=1).to_ndarray() for frame in frames]
    return RgbFrames(np.stack(rgb))


def colours_of_planes(frame: av.VideoFrame) -> tuple[Matrix, bool] | None:
    """Matrix and full range of 8-bit 4:2:0; None for what `YuvFrames` cannot say."""
    matrix = MATRICES.get(int(frame.colorspace))
    if matrix is None or frame.format.name not in ("yuv420p", "yuvj420p"):
        return None
    return matrix, frame.format.name == "yuvj420p" or frame.color_range == ColorRange.JPEG


def plane(frame: av.VideoFrame, number: int) -> np.ndarray:
    """A view [h, w] of a plane: its rows are padded in memory."""
    padded = frame.planes[number]
    rows = np.frombuffer(cast(Any, padded), np.uint8)  # which its type does not say it can
    return rows.reshape(padded.height, padded.line_size)[:, : padded.width]


def check_frame(frame: av.VideoFrame, info: VideoInfo, where: str) -> None:
    """Check a decoded frame, which `where` names in messages.

    Raises: DecodeError if it is damaged; WrongSizeError.
    """
    if frame.is_corrupt:
        raise DecodeError("Frame is damaged", where=where, do=LEAVE_OUT)
    if (frame.width, frame.height) != (info.width, info.height):
        raise WrongSizeError(
            "Frame has another size than the shard states",
            where=where,
            found=f"{frame.width}x{frame.height} for {info.width}x{info.height}",
            do=LEAVE_OUT,
        )


def _wanted(
    video: bytes,
    moments: Sequence[Fraction],
    period: Fraction,
    info: VideoInfo,
) -> Iterator[av.VideoFrame]:
    """The frames at `moments`, one by one; decodes no further than the last of them needs."""
    constant, slack = info.constant_frame_rate, tolerance(info)
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
        raise DecodeError("No frame could be decoded", where=f"{info.codec} video", do=LEAVE_OUT)
    end = shown[0] + (slack if constant else max(period, _duration(shown[1])))
    for last in itertools.chain([moment], pending):
        if last > end:
            raise TooShortError(
                "Video ends before a wanted frame",
                where=f"{float(last):.3f} s",
                found=f"last frame at {float(shown[0]):.3f} s",
                do=LEAVE_OUT,
            )
        yield shown[1]


def _duration(frame: av.VideoFrame) -> Fraction:
    return frame.duration * frame.time_base if frame.time_base else Fraction(0)


def _frames_from(video: bytes, moment: Fraction, seek: bool = True) -> Iterator[TimedFrame]:
    """Frames in presentation order, from the last key frame not after `moment` (seconds)."""
    with av.open(io.BytesIO(video), "r") as container:
        stream = video_stream(container)
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
                raise DecodeError("Frame has no time stamp", where=where, do=LEAVE_OUT)
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


def video_stream(container: InputContainer) -> VideoStream:
    """The first video stream, not counting cover pictures, set up for one thread.

    Raises: DecodeError if there is none, or none of a codec that this FFmpeg knows.
    """
    for stream in container.streams.video:
        codec = cast(CodecContext | None, stream.codec_context)  # its type leaves None out
        if codec is not None and not stream.disposition & Disposition.attached_pic:
            codec.thread_count = 1
            return stream
    raise DecodeError("No video stream", where=f"{container.format.name} file", do=LEAVE_OUT)
