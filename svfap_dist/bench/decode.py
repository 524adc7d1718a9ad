"""What decoding costs: clips per CPU-second of videos as they came and as the profile `train` has
them.

In: a folder of videos, or synthetic faces made here. Out: rates, the bytes and the quality of the
transcoded videos. A clip is what training takes: a random window of 16 frames, four apart. All
variants take turns in every round on the same windows, so that a busy machine wrongs them alike;
the figures are medians of rounds, by the processor time of this process, one thread. The baseline
is what public pipelines do: open the file, seek, decode, and PyAV's `to_ndarray` for the wanted
frames.
"""

from __future__ import annotations

import dataclasses
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import av
import numpy as np
import torch

from data_sharding.sources import synthetic
from data_sharding.transcode import TrainProfile, transcode
from svfap_dist.data.clips import random_crop
from svfap_dist.errors import ConfigError
from svfap_dist.progress import Progress, say
from svfap_dist.rng import Stream
from svfap_dist.video.backends import decode
from svfap_dist.video.color import YuvClips, whole_frames
from svfap_dist.video.frames import YuvFrames
from svfap_dist.video.info import VIDEO_SUFFIXES, VideoInfo
from svfap_dist.video.probe import Rejected, probe
from svfap_dist.video.views import Crop

FRAMES, STRIDE, SIZE = 16, 4, 160  # of a clip; paper
WINDOW = (FRAMES - 1) * STRIDE + 1
SCALES = (1.0, 0.875, 0.75, 0.66)  # of crops; released code
_BATCH = 8  # clips that are converted as one

Video = tuple[bytes, VideoInfo]
Starts = Sequence[int]  # of a window in each video


@dataclasses.dataclass(frozen=True)
class DecodeBench:
    """Rates are clips per CPU-second."""

    videos: int
    mean_frames: float
    rounds: int
    av: str
    source_rgb: float  # source videos by PyAV's to_ndarray: the baseline
    source_ours: float  # source videos by our decoder, RGB
    train: float  # transcoded videos, planes
    train_converted: float  # the same, random crops of them made RGB of 160 x 160 pixels
    ratio: float  # train to source_rgb
    converted_ratio: float
    bytes_ratio: float  # transcoded files to source files
    psnr_db: float  # of the transcoded frames in RGB, mean over videos
    encode_seconds: float  # CPU-seconds to transcode a video, mean
    backends: dict[str, float]

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.videos} videos of {self.mean_frames:.0f} frames; clips of {FRAMES} frames, "
            f"{STRIDE} apart; medians of {self.rounds} rounds; PyAV {self.av}",
            f"{'':42s} clips per CPU-second",
            f"{'source, RGB by to_ndarray (baseline)':42s} {self.source_rgb:8.1f}",
            f"{'source, RGB by our decoder':42s} {self.source_ours:8.1f}",
            f"{'train, planes':42s} {self.train:8.1f}  {self.ratio:.1f} times",
            f"{'train, RGB, crop and resize on the CPU':42s} {self.train_converted:8.1f}  "
            f"{self.converted_ratio:.1f} times",
            f"train: {self.bytes_ratio:.2f} times the bytes, {self.psnr_db:.1f} dB in RGB, "
            f"{self.encode_seconds:.2f} CPU-seconds to make a video",
        ]


def run(folder: str = "", rounds: int = 7) -> DecodeBench:
    """Measure the videos below `folder`, or synthetic faces.

    Raises: ConfigError if there is no usable video.
    """
    torch.set_num_threads(1)
    sources = load(folder)
    say(f"Transcoding {len(sources)} videos ...")
    begin = time.process_time()
    made = [transcode(*video, TrainProfile()) for video in sources]
    encode_seconds = (time.process_time() - begin) / len(made)
    rates = measure(
        sources,
        {
            "source_rgb": lambda starts: each(by_to_ndarray, sources, starts),
            "source_ours": lambda starts: each(ours_rgb, sources, starts),
            "train": lambda starts: each(planes, made, starts),
            "train_converted": lambda starts: _converted(made, starts),
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
        bytes_ratio=bytes_of(made) / bytes_of(sources),
        psnr_db=psnr(sources, made),
        encode_seconds=encode_seconds,
        backends={"pyav": rates["train"]},
    )


def profiles(folder: str) -> dict[str, list[Video]]:
    """The videos below `folder`, or synthetic faces, by the profile they are stored in."""
    sources = load(folder)
    return {"source": sources, "train": [transcode(*video, TrainProfile()) for video in sources]}


def load(folder: str) -> list[Video]:
    """Videos below a folder that are long enough for a clip, or a few synthetic ones."""
    if not folder:
        say("Rendering synthetic faces ...")
        made = synthetic.samples("clips=6,frames=200")
        files = [source.read() for source in made]
    else:
        files = list(_files(folder))
    found = [(data, probe(data, WINDOW)) for data in files]
    videos = [(data, info) for data, info in found if not isinstance(info, Rejected)]
    if not videos:
        what = f"{len(files)} videos, none of {WINDOW} frames or more that can be decoded"
        raise ConfigError(
            "No video to measure", where=folder, found=what, do="name a folder with videos"
        )
    return videos


def _files(folder: str) -> Iterator[bytes]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in VIDEO_SUFFIXES:
                with open(os.path.join(place, name), "rb") as file:
                    yield file.read()


def measure(
    sources: Sequence[Video], variants: dict[str, Callable[[Starts], int]], rounds: int
) -> dict[str, float]:
    """Clips per CPU-second of each variant, which says how many clips it made; all have the same
    windows in a round and take turns."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    with Progress("Rounds", rounds + 1) as progress:
        for number in range(rounds + 1):  # the first to warm up
            stream = Stream("bench decode", number)
            starts = [stream.integer(info.num_frames - WINDOW + 1) for _, info in sources]
            for name, variant in variants.items():
                clips, begin = 0, time.process_time()
                # Fast variants go round several times: clocks are coarse.
                while clips == 0 or time.process_time() - begin < 0.3:
                    clips += variant(starts)
                rates[name].append(clips / (time.process_time() - begin))
            progress.update(number + 1)
    return {name: statistics.median(found[1:]) for name, found in rates.items()}


def each(decode: Callable[[Video, int], object], videos: Sequence[Video], starts: Starts) -> int:
    for video, start in zip(videos, starts, strict=True):
        decode(video, start)
    return len(videos)


def by_to_ndarray(video: Video, start: int) -> np.ndarray:
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


def ours_rgb(video: Video, start: int) -> np.ndarray:
    numbers = range(start, start + WINDOW, STRIDE)
    return whole_frames(decode(*video, numbers))


def planes(video: Video, start: int) -> object:
    """A clip of a transcoded video, as planes."""
    return decode(*video, range(start, start + WINDOW, STRIDE))


def _converted(videos: Sequence[Video], starts: Starts) -> int:
    stream = Stream("bench crops")
    for first in range(0, len(videos), _BATCH):
        batch = videos[first : first + _BATCH]
        clips = [
            decode(*video, range(start, start + WINDOW, STRIDE))
            for video, start in zip(batch, starts[first:], strict=False)
        ]
        frames = [Crop(0, 0, info.height, info.width) for _, info in batch]
        crops = [random_crop(stream, frame, SCALES) for frame in frames]
        YuvClips.stack(cast(list[YuvFrames], clips), crops, SIZE).to_rgb("cpu")
    return len(videos)


def bytes_of(videos: Sequence[Video]) -> int:
    """Bytes of the files."""
    return sum(len(data) for data, _ in videos)


def psnr(sources: Sequence[Video], made: Sequence[Video]) -> float:
    """Peak signal-to-noise ratio (dB) of transcoded frames in RGB against what was cut out of the
    sources, mean over videos."""
    found = []
    for (data, info), (video, stored) in zip(sources, made, strict=True):
        order = stored.layout
        assert order is not None, "of the profile train"
        assert (order.height, order.width) == (stored.height, stored.width)
        got = whole_frames(decode(video, stored, range(info.num_frames)))
        wanted = whole_frames(decode(data, info, range(info.num_frames)))
        rows = slice(order.top, order.top + order.height)
        cut = wanted[:, rows, order.left : order.left + order.width]
        error = np.mean((got.astype(np.int16) - cut).astype(np.float32) ** 2)
        found.append(10 * np.log10(255**2 / max(error, 1e-9)))
    return float(np.mean(found))
