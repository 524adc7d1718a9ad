"""From a video to a clip: window, region, random crop, and the batch that holds many clips.

In: a video's bytes and what the shard says about it, with a random stream of the clip's own. Out:
uint8 frames of the size that the model takes. What is cut is chosen by pure functions of the
stream, before anything is decoded.

The random crop is the one of the released code (VideoMAE's multi-scale crop, which goes back to
TSN): a width and a height from a few scales of the shorter side, at one of 13 fixed places, the
same for all frames of the clip, resized to the clip's size.

Pre-training refuses videos that are shorter than a clip's window. Many of those of downstream tasks
are, so clips of a task take them as VideoMAE does: as if the last frame went on, that is, numbers
beyond it are its own. The clips that a task is tested on are windows laid evenly over the video
times squares laid evenly along the longer side of the region; where they coincide, as all squares
do in a square region and all windows in a short video, a clip is made once and counts for all.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from svfap_dist.config import Config
from svfap_dist.data.decoding import decoder_of
from svfap_dist.rng import Stream
from svfap_dist.shards.reader import BadSample
from svfap_dist.video import views
from svfap_dist.video.color import to_rgb
from svfap_dist.video.frames import Frames, TooShortError
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.views import Crop, stored_region

if TYPE_CHECKING:
    import torch

    from svfap_dist.video.color import YuvClips

# The 13 places of a crop, in quarters of the room there is: corners, centre, edges, inner quarters.
_PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)


@dataclasses.dataclass(frozen=True)
class ClipBatch:
    """A rank's clips of one step, in slot order.

    A slot has one clip, or data.repeated_sampling clips of one sample in a row: B clips in all. The
    lists have an entry per slot. keys and samples name what the order asked for; where
    `substituted`, the frames are those of a neighbour because that sample is bad.
    """

    # uint8 [B, F, H, W, 3], or planes that are converted on the device; see `frames_on`.
    frames: torch.Tensor | YuvClips
    visible: torch.Tensor  # int64 [B, V]
    masked: torch.Tensor  # int64 [B, M]
    keys: list[str]
    samples: list[int]
    lanes: list[int]
    positions: list[int]
    substituted: list[bool]
    bad: list[BadSample]
    fetch_seconds: float  # summed over the clips, as spent by the threads
    decode_seconds: float  # summed over the clips, as spent by threads or workers
    bytes_fetched: int = 0  # from the store, since the batch before
    batches_ready: int = 0  # when this one was asked for, itself included
    # Of what the frames show, substituted or not: classes int64 [B], or values float32 [B, K].
    targets: torch.Tensor | None = None


def frames_on(device: torch.device, batch: ClipBatch, part: slice) -> torch.Tensor:
    """Frames of the clips `part` of a batch on a device: uint8 RGB [B, F, H, W, 3]."""
    import torch

    frames = batch.frames[part]
    if isinstance(frames, torch.Tensor):
        return frames.to(device, non_blocking=True)
    return frames.to_rgb(device)


def window_start(stream: Stream, num_frames: int, window: int) -> int:
    """First frame of a clip that spans `window` frames, uniform over the video.

    Raises: TooShortError if the video has fewer frames.
    """
    _check_length(num_frames, window)
    return stream.integer(num_frames - window + 1)


def _check_length(num_frames: int, window: int) -> None:
    if num_frames < window:
        raise TooShortError(
            "Video is shorter than a clip's window",
            found=f"{num_frames} frames for a window of {window}",
            do=f"shard again with --min-frames {window}",
        )


def random_crop(stream: Stream, within: Crop, scales: tuple[float, ...]) -> Crop:
    """A multi-scale crop inside a region: one of VideoMAE's sizes at one of its 13 places.

    Height and width are scales of the region's shorter side that are at most one step apart.
    """
    shorter = min(within.height, within.width)
    sides = [max(int(shorter * scale), 1) for scale in scales]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    height, width = pairs[stream.integer(len(pairs))]
    down, right = _PLACES[stream.integer(len(_PLACES))]
    return Crop(
        within.top + (within.height - height) // 4 * down,
        within.left + (within.width - width) // 4 * right,
        height,
        width,
    )


def plan_random(
    info: VideoInfo, config: Config, window: Stream, crops: Sequence[Stream]
) -> tuple[Sequence[int], list[Crop]]:
    """The frames of one random window, and a random crop of the region for each of `crops`.

    Raises: TooShortError if the video has no such window; ConfigError if the shards were cut to
    another region than data.region.
    """
    start = window_start(window, _length(info, config), config.window)
    within = stored_region(info, config.data.region)
    cuts = [random_crop(crop, within, config.data.crop_scales) for crop in crops]
    return _numbers(start, info, config), cuts


def plan_fixed(info: VideoInfo, config: Config) -> tuple[Sequence[int], list[Crop]]:
    """The frames of the middle window, and the region: what pictures and evaluation take.

    Raises: as `plan_random`.
    """
    length = _length(info, config)
    _check_length(length, config.window)
    start = (length - config.window) // 2
    return _numbers(start, info, config), [stored_region(info, config.data.region)]


def plan_multi_clip(info: VideoInfo, config: Config) -> tuple[Counter[int], Counter[Crop]]:
    """What a task is tested on: first frames of windows and squares of the region, each with how
    many of finetune.test_segments or test_crops it stands for.

    Raises: ConfigError if the shards were cut to another region than data.region.
    """
    tested = config.finetune
    starts = views.segment_starts(info.num_frames, config.window, tested.test_segments)
    crops = views.square_crops(stored_region(info, config.data.region), tested.test_crops)
    return Counter(starts), Counter(crops)


def _length(info: VideoInfo, config: Config) -> int:
    """Frames among which a window has to lie; of a task, the last one goes on as long as needed."""
    return info.num_frames if config.task is None else max(info.num_frames, config.window)


def _numbers(start: int, info: VideoInfo, config: Config) -> Sequence[int]:
    """The frames of the window that begins at `start`."""
    numbers = range(start, start + config.window, config.data.sampling_rate)
    last = info.num_frames - 1
    return numbers if numbers[-1] <= last else [min(number, last) for number in numbers]


def random_cut(
    video: bytes, info: VideoInfo, config: Config, window: Stream, crops: Sequence[Stream]
) -> tuple[Frames, list[Crop]]:
    """Decoded frames of one random window, and for each training clip that is made of them a random
    crop of the region.

    Raises: DecodeError if the video is too short or cannot be decoded; ConfigError if the shards
    were cut to another region than data.region.
    """
    numbers, cuts = plan_random(info, config, window, crops)
    return decoder_of(config)(video, info, numbers), cuts


def fixed_cut(video: bytes, info: VideoInfo, config: Config) -> tuple[Frames, list[Crop]]:
    """The same for the clip of pictures and evaluation: middle window, the whole region."""
    numbers, cuts = plan_fixed(info, config)
    return decoder_of(config)(video, info, numbers), cuts


def multi_clip_cut(
    video: bytes, info: VideoInfo, config: Config
) -> Iterator[tuple[Frames, Crop, float]]:
    """The same for each clip that a task is tested on, window by window, with its share in the
    video's scores; the shares add up to 1."""
    starts, crops = plan_multi_clip(info, config)
    for start, times in starts.items():
        frames = decoder_of(config)(video, info, _numbers(start, info, config))
        for crop, of_crop in crops.items():
            yield frames, crop, times * of_crop / (starts.total() * crops.total())


def random_clips(
    video: bytes, info: VideoInfo, config: Config, window: Stream, crops: Sequence[Stream]
) -> list[torch.Tensor]:
    """The clips of `random_cut`: uint8 [F, size, size, 3] each. Raises what that raises."""
    return _clips(*random_cut(video, info, config, window, crops), config)


def fixed_clip(video: bytes, info: VideoInfo, config: Config) -> torch.Tensor:
    """The clip of `fixed_cut`: uint8 [F, size, size, 3]. Raises what that raises."""
    (clip,) = _clips(*fixed_cut(video, info, config), config)
    return clip


def _clips(frames: Frames, crops: Sequence[Crop], config: Config) -> list[torch.Tensor]:
    import torch

    return [torch.from_numpy(to_rgb(frames, crop, config.data.frame_size)) for crop in crops]
