"""`svfap bench decode`: clips per second out of videos as they came and as stored for training.

In: a folder of videos, or synthetic faces made here. Out: rates, and the size and quality of the
transcoded videos. A clip is what training takes: a random window of 16 frames, four apart. On the
CPU, all variants decode the same windows in turns, so that other load affects all alike; medians of
the rounds count, by CPU time, on one thread. The baseline is what public pipelines do: open the
file, seek, decode, and convert the wanted frames with PyAV's `to_ndarray`.

`run_layouts` compares other ways to store videos. Each row is the profile `train` with one setting
changed: keyframe interval, phase order, quality or effort; and two alternatives that the profile
does not have: HEVC, and reading through a container.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import cast

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.stream import VideoStream

from data_sharding.sources import synthetic
from data_sharding.transcode import TrainProfile, split_phases, transcode
from svfap_dist.data.clips import random_crop
from svfap_dist.errors import ConfigError
from svfap_dist.profiling.timing import repeat, seconds_of, take_turns
from svfap_dist.rng import Stream
from svfap_dist.text_table import format_table
from svfap_dist.video.backends import DEFAULT, decode
from svfap_dist.video.frames import Frames, YuvClips, YuvFrames, whole_frames
from svfap_dist.video.info import (
    Crop,
    PhaseFile,
    VideoInfo,
    joined_info,
    stored_position,
)
from svfap_dist.video.names import is_video
from svfap_dist.video.probe import Rejected, probe

log = logging.getLogger(__name__)

FRAMES, STRIDE, SIZE = 16, 4, 160  # of a clip; paper
WINDOW = (FRAMES - 1) * STRIDE + 1
SCALES = (1.0, 0.875, 0.75, 0.66)  # of crops; released code
_CONVERTED_AT_ONCE = 8  # clips
_MIN_SECONDS = 0.3  # CPU time of a variant in a round: clocks are coarse

Video = tuple[bytes, VideoInfo]
Starts = Sequence[int]  # first frame of a window in each video

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
    "in display order": TrainProfile(phases=1),
}
_NEARLY_LOSSLESS = TrainProfile(crf=8)  # source of the HEVC variant


@dataclasses.dataclass(frozen=True)
class DecodeBench:
    """Figures of decoding on the CPU; rates are clips per CPU-second."""

    videos: int
    mean_frames: float
    rounds: int
    av: str
    source_rgb: float  # source videos by PyAV's to_ndarray: the baseline
    source_ours: float  # source videos by our decoder, RGB
    train: float  # transcoded videos, planes
    train_converted: float  # the same; random crops converted to RGB of 160 x 160 pixels
    ratio: float  # train to source_rgb
    converted_ratio: float  # train_converted to source_rgb
    bytes_ratio: float  # transcoded files to source files
    psnr_db: float  # of the transcoded frames in RGB, mean over videos
    encode_seconds: float  # CPU seconds to transcode a video, mean
    backends: dict[str, float]  # rate of each backend on transcoded videos

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        rows = [
            ("source, RGB by to_ndarray (baseline)", self.source_rgb, 1.0),
            ("source, RGB by our decoder", self.source_ours, self.source_ours / self.source_rgb),
            ("train, planes", self.train, self.ratio),
            ("train, RGB, cropped and resized", self.train_converted, self.converted_ratio),
        ]
        return [
            f"{self.videos} videos of {self.mean_frames:.0f} frames; clips of {FRAMES} frames, "
            f"{STRIDE} apart; medians of {self.rounds} rounds; PyAV {self.av}",
            *format_table(
                ((name, f"{rate:.1f}", f"{ratio:.1f}") for name, rate, ratio in rows),
                ("", "clips per CPU-second", "to the baseline"),
                right=(1, 2),
            ),
            f"train: {self.bytes_ratio:.2f} times the bytes, {self.psnr_db:.1f} dB in RGB, "
            f"{self.encode_seconds:.2f} CPU-seconds to transcode a video",
        ]


@dataclasses.dataclass(frozen=True)
class LayoutRow:
    """A way to store videos."""

    layout: str
    clips_per_cpu_second: float
    ratio: float  # to the baseline
    kilobytes: float  # of a video, mean
    bytes_ratio: float  # to the source
    psnr_db: float
    encode_seconds: float  # CPU-seconds of a video, mean


@dataclasses.dataclass(frozen=True)
class LayoutsBench:
    """Figures of all layouts."""

    videos: int
    source_rgb: float
    rows: list[LayoutRow]

    def lines(self) -> list[str]:
        """Return the text for people: Markdown."""
        head = "| stored as | clips per CPU-second | to source | kB | to source | dB | CPU-s |"
        rows = [
            f"| {row.layout} | {row.clips_per_cpu_second:.0f} | {row.ratio:.1f} | "
            f"{row.kilobytes:.1f} | {row.bytes_ratio:.2f} | {row.psnr_db:.1f} | "
            f"{row.encode_seconds:.2f} |"
            for row in self.rows
        ]
        first = f"{self.videos} videos; source, RGB by to_ndarray: {self.source_rgb:.1f}"
        return [first, head, "|---" * 7 + "|", *rows]


def run(folder: str = "", rounds: int = 7) -> DecodeBench:
    """Measure decoding on the CPU.

    Args:
        folder: of videos; empty: synthetic faces.
        rounds: that are timed.

    Raises:
        ConfigError: there is no usable video.
    """
    torch.set_num_threads(1)
    sources = load_videos(folder)
    made, seconds = _encode("train", sources, _make_for_training)
    rates = _measure_variants(
        sources,
        {
            "source_rgb": _each(_decode_by_to_ndarray, sources),
            "source_ours": _each(lambda *window: whole_frames(_decode_window(*window)), sources),
            "train": _each(_decode_window, made),
            "train_converted": functools.partial(_decode_and_convert, made),
        },
        rounds,
    )
    baseline = rates["source_rgb"]
    return DecodeBench(
        videos=len(sources),
        mean_frames=statistics.mean(info.num_frames for _, info in sources),
        rounds=rounds,
        av=av.__version__,
        **rates,
        ratio=rates["train"] / baseline,
        converted_ratio=rates["train_converted"] / baseline,
        bytes_ratio=_total_bytes(made) / _total_bytes(sources),
        psnr_db=_psnr(sources, made),
        encode_seconds=seconds,
        backends={DEFAULT: rates["train"]},
    )


def videos_by_profile(folder: str) -> dict[str, list[Video]]:
    """Return the videos of a folder by the profile they are stored in.

    Args:
        folder: of videos; empty: synthetic faces.
    """
    sources = load_videos(folder)
    return {"source": sources, "train": [_make_for_training(video) for video in sources]}


def _make_for_training(video: Video) -> Video:
    """Return a video as shards of the profile `train` have it: a file per phase."""
    files, infos = zip(*split_phases(*transcode(*video, TrainProfile())), strict=True)
    return b"".join(files), joined_info(infos, [len(file) for file in files])


def load_videos(folder: str) -> list[Video]:
    """Return the videos of a folder that are long enough for a clip.

    Args:
        folder: of videos; empty: a few synthetic faces.

    Raises:
        ConfigError: there is none.
    """
    if not folder:
        log.info("Rendering synthetic faces ...")
        made = synthetic.samples("clips=6,frames=200")
        files = [source.read() for source in made]
    else:
        files = list(_read_files(folder))
    found = [(data, probe(data, WINDOW)) for data in files]
    videos = [(data, info) for data, info in found if not isinstance(info, Rejected)]
    if not videos:
        what = f"{len(files)} videos, none of {WINDOW} frames or more that can be decoded"
        raise ConfigError("No video to measure", folder, what, "name a folder with videos")
    return videos


def _read_files(folder: str) -> Iterator[bytes]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if is_video(name):
                with open(os.path.join(place, name), "rb") as file:
                    yield file.read()


def _measure_variants(
    sources: Sequence[Video], variants: Mapping[str, Callable[[Starts], int]], rounds: int
) -> dict[str, float]:
    """Return clips per CPU-second of each variant, the median of rounds after a warm-up."""

    def time_variant(variant: Callable[[Starts], int], number: int) -> float:
        stream = Stream("bench decode", number)
        starts = [stream.integer(info.num_frames - WINDOW + 1) for _, info in sources]
        rate = repeat(functools.partial(variant, starts), _MIN_SECONDS, time.process_time)
        return rate.per_cpu_second

    turns = {name: functools.partial(time_variant, each) for name, each in variants.items()}
    found = take_turns(turns, rounds, warm_up=1)
    return {name: statistics.median(rates) for name, rates in found.items()}


def _each(
    decode_one: Callable[[Video, int], object], videos: Sequence[Video]
) -> Callable[[Starts], int]:
    """Return a variant that decodes a window of each video."""

    def decode_all(starts: Starts) -> int:
        for video, start in zip(videos, starts, strict=True):
            decode_one(video, start)
        return len(videos)

    return decode_all


def _decode_by_to_ndarray(video: Video, start: int) -> np.ndarray:
    """Return a window's frames [F, H, W, 3] as public pipelines decode them."""
    data, info = video
    frames = []
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        tick, origin = stream.time_base, stream.start_time or 0
        assert tick is not None
        container.seek(origin + int(start / info.fps / tick), stream=stream)
        for frame in container.decode(stream):
            number = round(float(((frame.pts or 0) - origin) * tick) * info.fps)
            if number == start + len(frames) * STRIDE:
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == FRAMES:
                    break
    return np.stack(frames)


def _decode_window(video: Video, start: int) -> Frames:
    """Return a window's frames as our decoder gives them: planes, for a transcoded video."""
    return decode(*video, range(start, start + WINDOW, STRIDE))


def _decode_and_convert(videos: Sequence[Video], starts: Starts) -> int:
    stream = Stream("bench crops")
    for first in range(0, len(videos), _CONVERTED_AT_ONCE):
        batch = videos[first : first + _CONVERTED_AT_ONCE]
        clips = [
            cast(YuvFrames, _decode_window(video, start))
            for video, start in zip(batch, starts[first:], strict=False)
        ]
        frames = [Crop(0, 0, info.height, info.width) for _, info in batch]
        crops = [random_crop(stream, frame, SCALES) for frame in frames]
        YuvClips.stack(clips, crops, SIZE).to_rgb("cpu")
    return len(videos)


def _total_bytes(videos: Sequence[Video]) -> int:
    return sum(len(data) for data, _ in videos)


def _psnr(sources: Sequence[Video], made: Sequence[Video]) -> float:
    """Return the mean peak signal-to-noise ratio (dB) of transcoded frames in RGB."""
    found = []
    for (data, info), (video, stored) in zip(sources, made, strict=True):
        layout = stored.layout
        assert layout is not None, "of the profile train"
        assert (layout.height, layout.width) == (stored.height, stored.width)
        got = whole_frames(decode(video, stored, range(info.num_frames)))
        wanted = whole_frames(decode(data, info, range(info.num_frames)))
        rows = slice(layout.top, layout.top + layout.height)
        cut = wanted[:, rows, layout.left : layout.left + layout.width]
        error = np.mean((got.astype(np.int16) - cut).astype(np.float32) ** 2)
        found.append(10 * np.log10(255**2 / max(error, 1e-9)))
    return float(np.mean(found))


def run_layouts(folder: str = "", rounds: int = 7) -> LayoutsBench:
    """Measure all layouts on the CPU.

    Args:
        folder: of videos; empty: synthetic faces.
        rounds: that are timed.

    Raises:
        ConfigError: there is no usable video.
    """
    sources = load_videos(folder)
    made: dict[str, list[Video]] = {}
    seconds: dict[str, float] = {}
    for name, profile in _PROFILES.items():
        made[name], seconds[name] = _encode(name, sources, lambda v, p=profile: transcode(*v, p))
    made["HEVC, crf 25"], seconds["HEVC, crf 25"] = _encode("HEVC", sources, _encode_hevc)
    variants = {name: _each(_decode_window, videos) for name, videos in made.items()}
    through = "as used, through the container"
    variants[through] = _each(_decode_by_container, made["as used"])
    made[through], seconds[through] = made["as used"], seconds["as used"]
    baseline = {"source": _each(_decode_by_to_ndarray, sources)}
    rates = _measure_variants(sources, baseline | variants, rounds)
    rows = [
        LayoutRow(
            name,
            rates[name],
            rates[name] / rates["source"],
            _total_bytes(videos) / len(videos) / 1000,
            _total_bytes(videos) / _total_bytes(sources),
            _psnr(sources, videos),
            seconds[name],
        )
        for name, videos in made.items()
    ]
    return LayoutsBench(len(sources), rates["source"], rows)


def _encode(
    name: str, sources: Sequence[Video], encode_one: Callable[[Video], Video]
) -> tuple[list[Video], float]:
    """Return videos in another form, and the CPU seconds that each took, mean."""
    log.info("Encoding %d videos: %s ...", len(sources), name)
    made: list[Video] = []
    seconds = seconds_of(lambda: made.extend(map(encode_one, sources)), time.process_time)
    return made, seconds / len(made)


def _decode_by_container(video: Video, start: int) -> list[list[np.ndarray]]:
    """Decode a window of a transcoded video through its container, as a player does."""
    data, info = video
    layout = info.layout
    assert layout is not None
    assert layout.phases == STRIDE
    first = stored_position(start, info.num_frames, layout.phases)
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


def _encode_hevc(video: Video) -> Video:
    """Encode a video as bare HEVC packets with the keyframes of the profile `train`."""
    data, info = transcode(*video, _NEARLY_LOSSLESS)
    layout = info.layout
    assert layout is not None
    with av.open(io.BytesIO(data), "r") as container:
        frames = list(container.decode(video=0))
    keys = {
        stored_position(number, info.num_frames, layout.phases)
        for number in range(info.num_frames)
        if number // layout.phases % layout.group == 0
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
    layout = dataclasses.replace(layout, codec_header=header, files=(PhaseFile(0, sizes),))
    return b"".join(packets), dataclasses.replace(info, codec="hevc", layout=layout)
