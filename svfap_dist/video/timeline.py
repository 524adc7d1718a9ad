"""Frame numbers to positions: which of the frames that come out of a decoder are the wanted ones.

A backend that names frames by counting them (DALI does) needs to be told that count. Here it comes
from the time stamps of the packets, by the rule of `decode_cpu`, so that both give the same frame:
with a constant rate the one nearest to i / fps, so that a dropped frame shifts nothing; with a
variable rate the one on the screen at i / fps. Reading all packets also shows whether the file can
be opened at all, before a library sees it that takes a broken one badly, and what its colours mean.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
from collections.abc import Sequence
from fractions import Fraction

import av
from av.error import FFmpegError

from svfap_dist.errors import DecodeError
from svfap_dist.video.frames import Matrix
from svfap_dist.video.info import VideoInfo, stored_position
from svfap_dist.video.pyav import (
    LEAVE_OUT,
    MATRICES,
    TooShortError,
    WrongSizeError,
    frame_period,
    tolerance,
    video_stream,
)

# By codec header of phase-ordered videos, of which a data set has a handful.
_matrices: dict[str, Matrix] = {}


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown: ascending, in units of `tick` seconds, from the
    stream's first frame on; for how many units the last one is; and their colours' matrix."""

    times: Sequence[int]
    tick: Fraction
    last_duration: int
    matrix: Matrix = "bt601"

    def position(self, number: int, info: VideoInfo) -> int:
        """Where frame `number` is among them.

        Raises: TooShortError if the video has ended before.
        """
        moment, slack = number * frame_period(info), tolerance(info)
        last = self.times[-1] * self.tick
        on_screen = max(frame_period(info), self.last_duration * self.tick)
        if moment > last + (slack if info.constant_frame_rate else on_screen):
            raise TooShortError(
                "Video ends before a wanted frame",
                where=f"{float(moment):.3f} s",
                found=f"last frame at {float(last):.3f} s",
                do=LEAVE_OUT,
            )
        shown = max(bisect.bisect_right(self.times, (moment + slack) / self.tick) - 1, 0)
        if info.constant_frame_rate:  # of several that are near enough, the first
            return min(bisect.bisect_right(self.times, (moment - slack) / self.tick), shown)
        return shown


@dataclasses.dataclass(frozen=True)
class Located:
    """Where wanted frames are in the order in which the file's frames are shown, and the matrix of
    their colours."""

    positions: list[int]
    matrix: Matrix


def locate(video: bytes, info: VideoInfo, numbers: Sequence[int]) -> Located:
    """Find the frames with these numbers.

    Raises: DecodeError, or its kinds TooShortError and WrongSizeError, if the file has no such
    frames, as far as its packets tell: the pictures in them are not decoded.
    """
    try:
        if info.layout is None:
            timeline = read_timeline(video, info)
            found = [timeline.position(number, info) for number in numbers]
            return Located(found, timeline.matrix)
        _check_packets(video, info, max(numbers))
        header, phases = info.layout.codec_header, info.layout.phases
        if header not in _matrices:
            _matrices[header] = read_timeline(video, info).matrix
        found = [stored_position(number, info.num_frames, phases) for number in numbers]
        return Located(found, _matrices[header])
    except FFmpegError as error:
        text = f"{type(error).__name__}: {error}"
        raise DecodeError("Video cannot be read", found=text, do=LEAVE_OUT) from error


def read_timeline(video: bytes, info: VideoInfo) -> Timeline:
    """The times of a file's packets, none of which is decoded.

    Raises: FFmpegError if it cannot be opened; DecodeError if it is not what `info` says.
    """
    with av.open(io.BytesIO(video), "r") as container:
        stream, name = video_stream(container), container.format.name
        if (stream.width, stream.height) != (info.width, info.height):
            raise WrongSizeError(
                "Video has another size than the shard states",
                found=f"{stream.width}x{stream.height} for {info.width}x{info.height}",
                do=LEAVE_OUT,
            )
        # AVI keeps no times: its packets have places, with room for dropped frames. Packets before
        # the beginning that an edit list sets are decoded, but not shown.
        shown: list[tuple[int, int]] = []
        for packet in container.demux(stream):
            time = packet.dts if name == "avi" else packet.pts
            if not packet.size or packet.is_discard:
                continue
            if time is None:
                raise DecodeError("Frame has no time stamp", where=f"{name} file", do=LEAVE_OUT)
            shown.append((time, packet.duration or 0))
        shown.sort()
        tick, origin = stream.time_base, None if name == "avi" else stream.start_time
        matrix = MATRICES.get(int(stream.codec_context.colorspace), "bt601")
    if not shown:
        raise DecodeError("No frame in the video", where=f"{name} file", do=LEAVE_OUT)
    origin = shown[0][0] if origin is None else origin
    assert tick is not None
    return Timeline([time - origin for time, _ in shown], tick, shown[-1][1], matrix)


def _check_packets(video: bytes, info: VideoInfo, last: int) -> None:
    """A phase-ordered sample says itself where its packets end."""
    assert info.layout is not None
    end = info.layout.first_byte + sum(info.layout.packet_sizes)
    if end > len(video):
        found = f"packets end at byte {end} of {len(video)}"
        raise DecodeError("Video is cut short", found=found, do=LEAVE_OUT)
    if last >= info.num_frames:
        raise TooShortError(
            "Video ends before a wanted frame",
            where=f"frame {last}",
            found=f"{info.num_frames} frames",
            do=LEAVE_OUT,
        )
