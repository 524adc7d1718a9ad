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
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import IO, Literal, NamedTuple, cast

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from svfap_dist.errors import DecodeError
from svfap_dist.region import Crop, Region, region
from svfap_dist.shard_format import PhaseOrder, VideoInfo

_IN_MEMORY_BYTES = 256 << 20  # planes of a video beyond this wait in a temporary file
_MAX_BYTES = 8 << 30  # of planes: two and a half hours of 160 x 160 at 25 frames per second
_SIDE_INFORMATION = 6  # H.264 unit type; here it holds the encoder's name and settings
_H264_MATRIX = {"bt601": 6, "bt709": 1}  # ITU-T H.264 table E-5
_BT601_NAMES = {2, 5, 6}  # of FFmpeg: unspecified, which its converters take so, and two names


class _Colours(NamedTuple):
    """What a video's numbers mean."""

    matrix: Literal["bt601", "bt709"]
    full_range: bool


@dataclasses.dataclass(frozen=True)
class TrainProfile:
    """How videos are stored for training.

    size: frames are resized to size x size pixels; None: they stay as they are cut. phases: the
    stride for which windows lie in a row. group: frames from one key frame to the next at most.
    crf: x264's quality, lower is better. preset: x264's effort.
    """

    region: Region = "voxceleb2"
    size: int | None = None
    phases: int = 4
    group: int = 16
    crf: float = 22
    preset: str = "medium"


Reason = Literal["undecodable", "too_long", "too_small"]


class TranscodeError(DecodeError):
    """A video that cannot be stored for training; `reason` is a word for lists."""

    def __init__(self, reason: Reason, found: str) -> None:
        super().__init__("Video cannot be transcoded", found=found, do="leave it out")
        self.reason: Reason = reason
        self.detail = found

    def __reduce__(self):  # two positional arguments, unlike other errors
        return type(self), (self.reason, self.detail)


def transcode(data: bytes, info: VideoInfo, options: TrainProfile) -> tuple[bytes, VideoInfo]:
    """The video in `data`, of which the probe said `info`, as the profile has it: an mp4 and what
    to say about it.

    Raises: TranscodeError if it cannot be decoded through, is too long or has too few pixels.
    """
    crop = _even(region(options.region, info.height, info.width))
    height, width = (options.size, options.size) if options.size else (crop.height, crop.width)
    if min(height, width) < 2:
        raise TranscodeError("too_small", f"{info.width}x{info.height} pixels")
    frame_bytes = height * width * 3 // 2
    if frame_bytes * info.num_frames > _MAX_BYTES:
        raise TranscodeError("too_long", f"{info.num_frames} frames of {width}x{height} pixels")
    numbers = sorted(range(info.num_frames), key=lambda number: (number % options.phases, number))
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, prefix="svfap-transcode-") as spool:
        try:
            colours = _spool(data, info, crop, options.size, spool)
        except FFmpegError as error:
            found = f"{type(error).__name__}: {error.strerror or error}"
            raise TranscodeError("undecodable", found) from error
        video = _encode(spool, numbers, info, options, (height, width), colours)
    header, first_byte, packet_sizes = _index(video, numbers, options)
    order = PhaseOrder(
        phases=options.phases,
        group=options.group,
        codec_header=header,
        first_byte=first_byte,
        packet_sizes=tuple(packet_sizes),
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
            raise TranscodeError("undecodable", found)
        planar, seen = _planar(frame, layout)
        if seen != (colours := colours or seen):
            raise TranscodeError("undecodable", f"colours change from {colours} to {seen}")
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
        raise TranscodeError("undecodable", "no frame came out of the decoder")
    last = (info.num_frames - 1) * period
    if last > time + (slack if info.constant_frame_rate else max(period, _duration(shown))):
        found = f"last frame at {float(time):.3f} s of {float(last):.3f} s"
        raise TranscodeError("undecodable", found)
    for _ in range(number, info.num_frames):
        yield shown


def _decoded(data: bytes) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """All frames, with the seconds after the stream's first frame at which they are shown."""
    with av.open(io.BytesIO(data), metadata_errors="replace") as container:
        stream = _video_stream(cast(InputContainer, container))
        tick, origin = stream.time_base, None
        assert tick is not None
        for count, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise TranscodeError("undecodable", f"frame {count} is damaged")
            if container.format.name == "avi":  # keeps no times of presentation, see decode_cpu
                time = count if frame.dts is None else frame.dts
            elif frame.pts is None:
                raise TranscodeError("undecodable", f"frame {count} has no time stamp")
            else:
                time = frame.pts
            origin = time if origin is None else origin
            yield (time - origin) * tick, frame


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # a cover picture is no video
            stream.codec_context.thread_count = 1
            return stream
    raise TranscodeError("undecodable", "no video stream")


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
        pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        rows = slice(crop.top // step, (crop.top + crop.height) // step)
        columns = slice(crop.left // step, (crop.left + crop.width) // step)
        planes.append(pixels[rows, columns].ravel())
    packed = np.concatenate(planes).reshape(crop.height * 3 // 2, crop.width)
    return av.VideoFrame.from_ndarray(packed, format="yuv420p")


def _encode(
    spool: IO[bytes],
    numbers: Sequence[int],
    info: VideoInfo,
    options: TrainProfile,
    size: tuple[int, int],
    colours: _Colours,
) -> bytes:
    """The mp4 of the spooled frames with these numbers, in this order."""
    height, width = size
    file = io.BytesIO()
    # bitexact: no name and no time of the writer.
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = _add_stream(container, info, options, colours)
        stream.width, stream.height = width, height
        stream.codec_context.gop_size = options.group
        without_names = BitStreamFilterContext(
            f"filter_units=remove_types={_SIDE_INFORMATION}", stream
        )
        frame_bytes, in_phase = height * width * 3 // 2, 0
        for position, number in enumerate(numbers):
            in_phase = 0 if number < options.phases else in_phase + 1
            spool.seek(number * frame_bytes)
            packed = np.frombuffer(spool.read(frame_bytes), np.uint8).reshape(-1, width)
            frame = av.VideoFrame.from_ndarray(packed, format="yuv420p")
            frame.pts, frame.time_base = position, stream.codec_context.time_base
            if in_phase % options.group == 0:
                frame.pict_type = PictureType.I
            _mux(container, without_names, stream.encode(frame))
        _mux(container, without_names, stream.encode())
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
        "x264-params": "mbtree=0:scenecut=0:open-gop=0",
    }
    stream = cast(VideoStream, container.add_stream("libx264", rate=rate, options=settings))
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    stream.time_base = context.time_base = 1 / rate
    context.colorspace = _H264_MATRIX[colours.matrix]
    context.color_range = ColorRange.JPEG if colours.full_range else ColorRange.MPEG
    return stream


def _mux(
    container: OutputContainer, without_names: BitStreamFilterContext, packets: Iterable[av.Packet]
) -> None:
    for packet in packets:
        container.mux(without_names.filter(packet))


def _index(
    video: bytes, numbers: Sequence[int], options: TrainProfile
) -> tuple[str, int, list[int]]:
    """Codec header, first byte and packet sizes of a finished file, read back and checked."""
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        header = base64.b64encode(stream.codec_context.extradata or b"").decode()
        packets = [packet for packet in container.demux(stream) if packet.size]
    in_phase = 0
    assert len(packets) == len(numbers), "one packet per frame"
    end = packets[0].pos
    for position, (packet, number) in enumerate(zip(packets, numbers, strict=True)):
        in_phase = 0 if number < options.phases else in_phase + 1
        assert packet.pos == end, "packets lie end to end"
        assert packet.pts == packet.dts and packet.is_keyframe >= (in_phase % options.group == 0)
        end += packet.size
    return header, packets[0].pos, [packet.size for packet in packets]
