"""A video as it came -> the same frames stored for training: the profile `train`.

What costs time in training is decoding, and most of what a usual video makes a decoder do is of no
use: pixels outside the region, the frames between the ones of a strided window and those before it.
So the region is cut out here once, and frames are stored phase by phase (`PhaseOrder`), which makes
the frames of a window neighbours, with a key frame every `group` of them; the sample's JSON says
where each packet lies. The result is an ordinary mp4 nevertheless, whose frames are shown in
another order.

Frames stay in the planes they are decoded to: no conversion of colours costs quality, and what the
source says about its colours is said again. Frame i is the one on the screen at i / fps, as it is
when the source is read in training. Equal bytes in give equal bytes out: one thread, and nothing
that names the encoder or the time. No macroblock tree: with it, x264 165 gives now and then other
bytes for the same frames.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import IO, Any, Literal, NamedTuple, cast

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from data_sharding.probe import open_video, video_stream
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.region import Crop, Region, region
from svfap_dist.shard_format import PhaseOrder, VideoInfo

_IN_MEMORY_BYTES = 256 << 20  # planes of a video beyond this wait in a temporary file
_MAX_BYTES = 8 << 30  # of planes: two and a half hours of 160 x 160 at 25 frames per second
_NAMES = 6  # H.264's units of side information: here the encoder's name and settings
_H264_MATRIX = {"bt601": 6, "bt709": 1}  # ITU-T H.264 table E-5
_BT601_NAMES = {2, 5, 6}  # of FFmpeg: unspecified, which its converters take so, and two names


# Pixels are what training compares: what only pleases the eye (psy, adaptive quantisation) costs
# bytes here. mbtree: see above. keyint, scenecut: key frames only where planned.
_X264 = "psy=0:aq-mode=0:trellis=2:weightp=2:mbtree=0:keyint=infinite:scenecut=0"


class _Colours(NamedTuple):
    """What a video's numbers mean."""

    matrix: Literal["bt601", "bt709"]
    full_range: bool


@dataclasses.dataclass(frozen=True)
class TrainProfile:
    """How videos are stored for training.

    size: frames are resized to size x size pixels; None: they stay as they are cut. phases: the
    stride for which windows lie in a row. group: at least so many frames of a phase share a key
    frame, or all where a phase has fewer. crf: x264's quality, lower is better. preset: x264's
    effort.
    """

    region: Region = "voxceleb2"
    size: int | None = None
    phases: int = 4
    group: int = 16
    crf: float = 25
    preset: str = "medium"

    def __post_init__(self) -> None:
        if self.size is not None and (self.size < 2 or self.size % 2):
            raise ConfigError(
                "Frames cannot have this size",
                where="size of the train profile",
                found=str(self.size),
                do="give an even number of pixels",
            )


Reason = Literal[
    "undecodable",  # a frame cannot be decoded, is damaged, missing or of another size
    "too_long",  # more than _MAX_BYTES of planes
    "too_small",  # less than two pixels wide or high
]


class TranscodeError(DecodeError):
    """A video that cannot be stored for training: `reason` is a word for lists, `found` more."""

    @property
    def reason(self) -> str:
        return self.what


def _refused(reason: Reason, found: str) -> TranscodeError:
    return TranscodeError(reason, found=found, do="leave this video out")


def transcode(data: bytes, info: VideoInfo, options: TrainProfile) -> tuple[bytes, VideoInfo]:
    """The video in `data`, of which the probe said `info`, as the profile has it: an mp4 and what
    to say about it.

    Raises: TranscodeError if it cannot be decoded through, is too long or has too few pixels.
    """
    crop = _even(region(options.region, info.height, info.width))
    height, width = (options.size, options.size) if options.size else (crop.height, crop.width)
    if min(height, width) < 2:
        raise _refused("too_small", f"{info.width}x{info.height} pixels")
    frame_bytes = height * width * 3 // 2
    if frame_bytes * info.num_frames > _MAX_BYTES:
        raise _refused("too_long", f"{info.num_frames} frames of {width}x{height} pixels")
    plan, group = _plan(info.num_frames, options)
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, prefix="svfap-transcode-") as spool:
        try:
            colours = _spool(data, info, crop, options.size, spool)
        except FFmpegError as error:
            found = f"{type(error).__name__}: {error.strerror or error}"
            raise _refused("undecodable", found) from error
        video = _encode(spool, plan, info, options, (height, width), colours)
    header, packets = _read_back(video, plan)
    order = PhaseOrder(
        phases=options.phases,
        group=group,
        codec_header=base64.b64encode(header).decode(),
        first_byte=packets[0].pos or 0,
        packet_sizes=tuple(packet.size for packet in packets),
        region=options.region,
        **dataclasses.asdict(crop),
        source_height=info.height,
        source_width=info.width,
    )
    return video, VideoInfo(
        info.num_frames, info.fps, width, height, "h264", labels=info.labels, order=order
    )


def _even(crop: Crop) -> Crop:
    """The crop on whole chroma samples: at even offsets, with even sides, at most a pixel off."""
    return Crop(crop.top & ~1, crop.left & ~1, crop.height & ~1, crop.width & ~1)


def _plan(num_frames: int, options: TrainProfile) -> tuple[list[tuple[int, bool]], int]:
    """The frames' numbers in the order of the file, each with whether it is a key frame, and how
    many frames of a phase share a key frame.

    A phase is shared out evenly, for a key frame near its end would serve few windows: key frames
    are the dearest in bytes and in time.
    """
    longest = math.ceil(num_frames / options.phases)
    group = math.ceil(longest / max(longest // options.group, 1))
    numbers = sorted(range(num_frames), key=lambda number: (number % options.phases, number))
    return [(number, number // options.phases % group == 0) for number in numbers], group


def _spool(
    data: bytes, info: VideoInfo, crop: Crop, size: int | None, spool: IO[bytes]
) -> _Colours:
    """Write all frames, cut and resized, one after the other: planes y, u, v of each."""
    colours: _Colours | None = None
    layout = VideoReformatter()
    scaler = VideoReformatter()
    for frame in _at_constant_rate(data, info):
        if (frame.width, frame.height) != (info.width, info.height):
            found = f"a frame of {frame.width}x{frame.height} among {info.width}x{info.height}"
            raise _refused("undecodable", found)
        planar, seen = _planar(frame, layout)
        if seen != (colours := colours or seen):
            raise _refused("undecodable", f"colours change from {colours} to {seen}")
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
        raise _refused("undecodable", "no frame came out of the decoder")
    last = (info.num_frames - 1) * period
    if last > time + (slack if info.constant_frame_rate else max(period, _duration(shown))):
        found = f"last frame at {float(time):.3f} s of {float(last):.3f} s"
        raise _refused("undecodable", found)
    for _ in range(number, info.num_frames):
        yield shown


def _decoded(data: bytes) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """All frames, with the seconds after the stream's first frame at which they are shown."""
    with open_video(data) as container:
        stream = video_stream(container)
        if stream is None:
            raise _refused("undecodable", "no video stream")
        stream.codec_context.thread_count = 1
        tick, origin, previous = stream.time_base, None, -1
        assert tick is not None
        for count, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise _refused("undecodable", f"frame {count} is damaged")
            time = frame.pts
            if container.format.name == "avi":  # has no times of presentation, only of decoding
                time = previous + 1 if frame.dts is None else frame.dts
            elif time is None:
                raise _refused("undecodable", f"frame {count} has no time stamp")
            previous = time
            origin = time if origin is None else origin
            yield (time - origin) * tick, frame


def _duration(frame: av.VideoFrame) -> Fraction:
    return frame.duration * frame.time_base if frame.time_base else Fraction(0)


def _planar(frame: av.VideoFrame, layout: VideoReformatter) -> tuple[av.VideoFrame, _Colours]:
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
        return converted, _Colours("bt601", False)
    if frame.colorspace not in {*_BT601_NAMES, Colorspace.ITU709}:
        frame = layout.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1
        )
        return frame, _Colours("bt709", full)
    matrix = "bt709" if frame.colorspace == Colorspace.ITU709 else "bt601"
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        frame = layout.reformat(frame, format="yuvj420p" if full else "yuv420p", threads=1)
    return frame, _Colours(matrix, full)


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


def _encode(
    spool: IO[bytes],
    plan: Sequence[tuple[int, bool]],
    info: VideoInfo,
    options: TrainProfile,
    size: tuple[int, int],
    colours: _Colours,
) -> bytes:
    """The mp4 of the spooled frames that `plan` lists: (number, whether a key frame)."""
    height, width = size
    frame_bytes = height * width * 3 // 2
    file = io.BytesIO()
    # bitexact: no name and no time of the writer.
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = _add_stream(container, info, options, colours)
        stream.width, stream.height = width, height
        no_names = BitStreamFilterContext(f"filter_units=remove_types={_NAMES}", stream)
        for position, (number, key) in enumerate(plan):
            spool.seek(number * frame_bytes)
            packed = np.frombuffer(spool.read(frame_bytes), np.uint8).reshape(-1, width)
            frame = av.VideoFrame.from_ndarray(packed, format="yuv420p")
            frame.pts, frame.time_base = position, stream.codec_context.time_base
            frame.pict_type = PictureType.I if key else PictureType.P
            for packet in stream.encode(frame):
                container.mux(no_names.filter(packet))
        for packet in stream.encode():
            container.mux(no_names.filter(packet))
    return file.getvalue()


def _add_stream(
    container: OutputContainer, info: VideoInfo, options: TrainProfile, colours: _Colours
) -> VideoStream:
    rate = Fraction(info.fps).limit_denominator(1_000_000)
    settings = {
        "preset": options.preset,
        "crf": str(options.crf),
        "tune": "fastdecode",
        "bf": "0",
        "forced-idr": "1",
        "x264-params": _X264,
    }
    stream = cast(VideoStream, container.add_stream("libx264", rate=rate, options=settings))
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    stream.time_base = context.time_base = 1 / rate
    context.colorspace = _H264_MATRIX[colours.matrix]
    context.color_range = ColorRange.JPEG if colours.full_range else ColorRange.MPEG
    return stream


def _read_back(video: bytes, plan: Sequence[tuple[int, bool]]) -> tuple[bytes, list[av.Packet]]:
    """Codec header and packets of a finished file, checked against what the format promises."""
    with open_video(video) as container:
        stream = container.streams.video[0]
        header = stream.codec_context.extradata or b""
        packets = [packet for packet in container.demux(stream) if packet.size]
    assert len(packets) == len(plan), "every packet holds one frame"
    end = packets[0].pos
    assert end is not None
    for position, (packet, (_, key)) in enumerate(zip(packets, plan, strict=True)):
        assert packet.pts == packet.dts, "frames are decoded in the order of the file"
        assert packet.pos == end, "packets lie end to end"
        assert packet.is_keyframe == key, f"frame {position} is a key frame or not as planned"
        end += packet.size
    with open_video(video) as container:
        decoded = sum(not frame.is_corrupt for frame in container.decode(video=0))
    assert decoded == len(plan), "every frame can be decoded"
    return header, packets
