"""When the frames of a video are shown: one rule of time for all readers.

With a constant rate (CFR), frame i is the first whose time stamp is within half a period of i /
fps, so that rounded time stamps and dropped frames shift nothing. With a variable rate (VFR), it
is the one on the screen at i / fps. Times count from the stream's first frame, or, where a stream
was cut between key frames, from the first that can be decoded. AVI and ASF store decoding times
(DTS) only, no presentation times (PTS), and their ticks need not be those of frames.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar, cast

import av
from av.container import InputContainer
from av.packet import Packet

from svfap_dist.errors import DecodeError
from svfap_dist.video.info import LEAVE_OUT, VideoInfo, too_short

_WITHOUT_PTS = {"avi", "asf"}
_WITHOUT_INDEX = {"mpegts", "mpeg", "asf", "ogg"}  # a seek arrives anywhere
_VFR_SLACK = Fraction(1, 10_000)  # seconds; time stamps are rounded

_Item = TypeVar("_Item")
Timed = tuple[int, int, _Item]  # ticks after the stream's first frame, ticks on screen, frame


def exact_rate(fps: float) -> Fraction:
    """Return a frame rate as an exact fraction: 29.97.. is 30000/1001.

    Args:
        fps: frames per second.
    """
    return Fraction(fps).limit_denominator(1_000_000)


def frame_rate(
    times: Sequence[int], tick: Fraction, declared: Sequence[Fraction | None]
) -> tuple[float, bool]:
    """Return frames per second, and whether frame i is shown at i / fps to within one tick.

    Args:
        times: when frames are shown, ascending, in ticks; empty if unknown.
        tick: seconds per tick.
        declared: rates that the container names, best first; tried before the measured one.
    """
    rates = [rate for rate in declared if rate]
    if len(times) < 2 or times[-1] == times[0]:
        return (float(rates[0]), True) if rates else (0.0, False)
    measured = Fraction(len(times) - 1) / ((times[-1] - times[0]) * tick)
    for rate in [*rates, measured]:
        period = 1 / (rate * tick)
        if all(abs(t - times[0] - i * period) <= 1 for i, t in enumerate(times)):
            return float(rate), True
    return float(measured), False


def has_pts(container: InputContainer) -> bool:
    """Return whether a container says when frames are shown; else FFmpeg's PTS are guesses.

    Args:
        container: an open video.
    """
    return container.format.name not in _WITHOUT_PTS


def is_seekable(container: InputContainer, packets: Sequence[Packet]) -> bool:
    """Return whether all frames can be decoded and sought, from the first one on.

    Else the stream begins between key frames, with frames that refer to ones before a key frame, or
    in a container without an index.

    Args:
        container: the file they are from.
        packets: the first ones of the stream, in the order of the file; those before the start that
            an edit list sets included.
    """
    if container.format.name in _WITHOUT_INDEX or not packets or not packets[0].is_keyframe:
        return False
    times = packet_times(packets, container)
    return min(times) == times[0]


def packet_times(packets: Sequence[Packet], container: InputContainer) -> list[int]:
    """Return when the frames of packets are shown, in ticks, in the order of the packets.

    Where PTS are missing, as in AVI, these are the DTS: the same set of times in another order. An
    AVI file's DTS count frames or fields, and leave room for dropped ones.

    Args:
        packets: those of one stream, each with one frame.
        container: the file they are from.

    Raises:
        DecodeError: one has neither.
    """
    by_dts = not has_pts(container) or any(packet.pts is None for packet in packets)
    times = [p.pts if p.dts is None or not by_dts else p.dts for p in packets]
    if None in times:
        where = f"{container.format.name} file"
        raise DecodeError("Frame has no time stamp", where=where, do=LEAVE_OUT)
    return cast(list[int], times)


def frame_times(
    frames: Iterable[av.VideoFrame], by_pts: bool
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield when decoded frames are shown, in ticks, and the frames.

    Args:
        frames: in presentation order.
        by_pts: whether their PTS say it (`has_pts`), else their DTS do.
    """
    last, step = None, 0  # the smallest difference so far
    for frame in frames:
        time = frame.pts if by_pts else frame.dts
        if time is None:  # as the DTS of the last frames are
            time = 0 if last is None else last + max(step, 1)
        elif last is not None and time > last:
            step = min(step or time - last, time - last)
        last = time
        yield time, frame


class FrameClock:
    """When the frames of a video are due, in ticks of its stream.

    Args:
        info: the video's rate, and whether it is constant.
        tick: seconds per tick, the time base of the stream.
    """

    def __init__(self, info: VideoInfo, tick: Fraction) -> None:
        self._tick, self._constant = tick, info.constant_frame_rate
        self._period = 1 / (exact_rate(info.fps) * tick)
        self._slack = self._period / 2 if self._constant else _VFR_SLACK / tick

    def latest(self, number: int) -> int:
        """Return the last tick at which a frame may begin to be frame `number`.

        Args:
            number: frame number from 0.
        """
        return math.floor(number * self._period + self._slack)

    def select(self, timed: Iterable[Timed[_Item]], numbers: Sequence[int]) -> Iterator[_Item]:
        """Yield the frames with these numbers; consume no more than the last of them needs.

        Args:
            timed: frames in presentation order: ticks after the stream's first frame, ticks on
                screen, frame.
            numbers: frame numbers, ascending, without repeats.

        Raises:
            TooShortError: the video ends before one.
        """
        pending = iter(numbers)
        number = next(pending)
        early, late = self._window(number)
        shown: Timed[_Item] | None = None  # the frame on the screen before the new one
        for new in timed:
            time, _, frame = new
            # The frame before it is the wanted one if this is too late; with a constant rate, this
            # is the wanted one if it is near enough, since no later frame can be nearer.
            while time > late or (self._constant and time > early):
                yield frame if shown is None or time <= late else shown[2]
                if (following := next(pending, None)) is None:
                    return
                number = following
                early, late = self._window(number)
            shown = new
        if shown is None:
            raise DecodeError("No frame could be decoded", do=LEAVE_OUT)
        time, duration, frame = shown
        end = time + (self._slack if self._constant else max(self._period, duration))
        for last in itertools.chain([number], pending):
            if last * self._period > end:
                found = f"last frame at {float(time * self._tick):.3f} s"
                raise too_short(f"{float(last * self._period * self._tick):.3f} s", found)
            yield frame

    def _window(self, number: int) -> tuple[int, int]:
        return math.floor(number * self._period - self._slack), self.latest(number)
