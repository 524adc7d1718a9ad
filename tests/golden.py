"""Videos of every kind that backends must agree on; each frame has its number painted in.

A `Golden` is a video, what a shard would say about it, and what must be read off frame 0, 1, 2, ...
of it. They are made here, by hand where no encoder makes such a thing, so nothing is stored.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable
from fractions import Fraction

import av
from clips import make_video

from data_sharding.transcode import TrainProfile, split_phases, transcode
from svfap_dist.video.info import PhaseFile, PhaseLayout, VideoInfo, joined_info, stored_position

FRAMES = 48
SIZE = (160, 144)  # width, height: no smaller, for NVDEC's sake
_X264 = {"preset": "veryfast", "threads": "1"}
_NAMES = {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9", "libvpx": "vp8"}


@dataclasses.dataclass(frozen=True)
class Golden:
    """painted: the numbers in frames 0, 1, 2, ..."""

    video: bytes
    info: VideoInfo
    painted: list[int]


def plain(codec: str, container: str, num_frames: int = FRAMES, **options) -> Golden:
    """A video of constant rate, from the first frame to the last; options: those of make_video."""
    options = {"size": SIZE, "gop": 12, **options}
    video = make_video(None, num_frames, codec=codec, container=container, **options)
    info = VideoInfo(num_frames, 25.0, *options["size"], _NAMES.get(codec, codec))
    return Golden(video, info, list(range(num_frames)))


def h264(**options: str) -> Golden:
    """H.264 in mp4 with these options of the encoder."""
    return plain("libx264", "mp4", encoder_options={**_X264, **options})


def hevc() -> Golden:
    options = {"preset": "ultrafast", "x265-params": "keyint=14:bframes=2:log-level=none"}
    return plain("libx265", "mp4", encoder_options=options)


def variable_rate(codec: str, container: str, **options) -> Golden:
    """A few frames stay on the screen long; frame i is what is there at i / fps."""
    times, time = [], 0
    for number in range(FRAMES):
        times.append(time)
        time += (1, 3, 1, 2, 7)[number % 5]
    made = plain(codec, container, pts=times, **options)
    fps = (FRAMES - 1) / (times[-1] / 25)
    info = dataclasses.replace(made.info, fps=fps, constant_frame_rate=False)
    moments = [Fraction(number * times[-1], FRAMES - 1) for number in range(FRAMES)]
    return Golden(
        made.video, info, [sum(time <= moment for time in times) - 1 for moment in moments]
    )


def edit_list(codec: str) -> Golden:
    """An mp4 whose list of edits begins at the sixth frame: the first five are not shown."""
    made = plain(codec, "mp4", encoder_options=_X264 if codec == "libx264" else {})
    video = remuxed(made.video, "mp4", later=-5)
    info = dataclasses.replace(made.info, num_frames=FRAMES - 5)
    return Golden(video, info, made.painted[5:])


def late_start(codec: str, container: str) -> Golden:
    """The first time stamp is not 0."""
    made = plain(codec, container)
    return dataclasses.replace(made, video=remuxed(made.video, container, later=7))


def dropped_frames(codec: str, container: str) -> Golden:
    """Constant rate with two holes, as a camera leaves them: the frame before fills them."""
    kept = [number for number in range(FRAMES) if number not in (9, 20)]
    made = plain(codec, container, len(kept), pts=kept, painted=kept)
    painted = [{9: 8, 20: 19}.get(number, number) for number in range(FRAMES)]
    return Golden(made.video, dataclasses.replace(made.info, num_frames=FRAMES), painted)


def remuxed(video: bytes, container: str, later: int) -> bytes:
    """The same packets, all shown `later` frames later (or, less than 0, earlier)."""
    target = io.BytesIO()
    options = {"avoid_negative_ts": "disabled", "fflags": "+bitexact"}
    name = {"mkv": "matroska"}.get(container, container)
    with (
        av.open(io.BytesIO(video)) as source,
        av.open(target, "w", format=name, options=options) as output,
    ):
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        shift = round(later / (25 * stream.time_base))
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = copy
                output.mux(packet)
    return target.getvalue()


def phase_ordered_vp9(phases: int = 4, group: int = 6) -> Golden:
    """The layout of the `train` profile in a codec that DALI's CPU backend has."""
    assert FRAMES % (phases * group) == 0
    shown_at = [stored_position(number, FRAMES, phases) for number in range(FRAMES)]
    numbers = sorted(range(FRAMES), key=shown_at.__getitem__)
    fixed = {"cpu-used": "8", "keyint_min": str(group)}
    video = make_video(
        None,
        FRAMES,
        size=SIZE,
        codec="libvpx-vp9",
        gop=group,
        painted=numbers,
        encoder_options=fixed,
    )
    with av.open(io.BytesIO(video)) as container:
        header = base64.b64encode(
            container.streams.video[0].codec_context.extradata or b""
        ).decode()
        packets = [packet for packet in container.demux(video=0) if packet.size]
        places = [(packet.pos, packet.size) for packet in packets]
    files = (PhaseFile(places[0][0], tuple(size for _, size in places)),)
    width, height = SIZE
    where = 0, 0, height, width, height, width
    order = PhaseLayout(phases, group, header, files, "full", *where)
    info = VideoInfo(FRAMES, 25.0, *SIZE, "vp9", layout=order)
    return Golden(video, info, list(range(FRAMES)))


def phase_ordered() -> Golden:
    """What the profile `train` makes of a video."""
    made = h264(g="30", bf="2")
    video, info = transcode(made.video, made.info, TrainProfile(region="full"))
    return Golden(video, info, made.painted)


def in_files(golden: Golden) -> Golden:
    """The same packets, those of each phase in a file of their own."""
    videos, infos = zip(*split_phases(golden.video, golden.info), strict=True)
    info = joined_info(infos, [len(video) for video in videos])
    return Golden(b"".join(videos), info, golden.painted)


GOLDEN: dict[str, Callable[[], Golden]] = {
    "h264": lambda: h264(g="12", bf="0"),
    "h264-b-frames": lambda: h264(g="15", bf="3", **{"b-pyramid": "normal"}),
    "h264-open-gop": lambda: h264(
        bf="3", **{"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3"}
    ),
    "h264-one-gop": lambda: h264(g="250", bf="2"),
    "h264-intra": lambda: h264(g="1"),
    "h264-one-frame": lambda: plain("libx264", "mp4", 1),
    "h264-late-start": lambda: late_start("libx264", "mkv"),
    "h264-edit-list": lambda: edit_list("libx264"),
    "h264-variable-rate": lambda: variable_rate("libx264", "mp4"),
    "h264-variable-rate-b-frames": lambda: variable_rate(
        "libx264", "mkv", encoder_options={**_X264, "bf": "2"}
    ),
    "h264-dropped-frames": lambda: dropped_frames("libx264", "mp4"),
    "h264-10-bit": lambda: plain("libx264", "mp4", pix_fmt="yuv420p10le"),
    "h264-odd-size": lambda: plain("libx264", "mp4", size=(161, 145), pix_fmt="yuv444p"),
    "h264-avi": lambda: plain("libx264", "avi"),
    "h264-phase-ordered": phase_ordered,
    "h264-phase-files": lambda: in_files(phase_ordered()),
    "hevc": hevc,
    "mpeg4-avi": lambda: plain("mpeg4", "avi", encoder_options={"q:v": "3"}),
    "vp9-webm": lambda: plain("libvpx-vp9", "webm"),
    "vp9-mp4": lambda: plain("libvpx-vp9", "mp4"),
    "vp9-odd-size": lambda: plain("libvpx-vp9", "mkv", size=(161, 145)),
    "vp9-one-frame": lambda: plain("libvpx-vp9", "webm", 1),
    "vp9-late-start": lambda: late_start("libvpx-vp9", "webm"),
    "vp9-edit-list": lambda: edit_list("libvpx-vp9"),
    "vp9-variable-rate": lambda: variable_rate("libvpx-vp9", "mp4"),
    "vp9-variable-rate-webm": lambda: variable_rate("libvpx-vp9", "webm"),
    "vp9-phase-ordered": phase_ordered_vp9,
    "vp9-phase-files": lambda: in_files(phase_ordered_vp9()),
    "vp8-webm": lambda: plain("libvpx", "webm"),
    "mjpeg-mov": lambda: plain("mjpeg", "mov"),
    "mjpeg-avi": lambda: plain("mjpeg", "avi"),
    "mjpeg-mkv": lambda: plain("mjpeg", "mkv"),
    "mjpeg-odd-size": lambda: plain("mjpeg", "mov", size=(161, 145)),
    "mjpeg-dropped-frames": lambda: dropped_frames("mjpeg", "mov"),
    "mjpeg-avi-dropped-frames": lambda: dropped_frames("mjpeg", "avi"),
}
