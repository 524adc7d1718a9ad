"""From a packed sample to training clips in shared memory: window, crops, decoding, augmentation.

In: a `DecodeJob`: a sample's bytes, and the keys of the random streams that choose its clips. Out:
uint8 frames, RGB or planes that the training device converts, written into `SharedArrays`. What to
cut is decided by pure functions of the streams before anything is decoded, so the bits do not
depend on the thread or process that does the job. Worker processes import this module, so it does
not import torch.

The random crop is that of the released code (VideoMAE's multi-scale crop, which goes back to TSN):
height and width from a few scales of the shorter side, at one of 13 fixed places, the same for all
frames of the clip, resized to the clip's size.

Pre-training rejects videos that are shorter than a clip's window. Many videos of downstream tasks
are, so clips of a task repeat the last frame as often as needed, as VideoMAE does.

A video of one frame is a still image. Its clips repeat that frame, in pre-training too; it is
decoded and resized once. With `data.still_motion` a camera pans over it instead (`still_images`).
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from typing import Any

import numpy as np

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.config import AugmentConfig, DataConfig
from svfap_dist.data.augment import augment
from svfap_dist.data.still_images import Move, moved_plane, pan_moves
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.rng import Stream
from svfap_dist.shards.format import BadSample, PackedSample, Sample, unpack
from svfap_dist.video.backends import open_decoder
from svfap_dist.video.frames import Frames, WrongSizeError, YuvFrames, kind_of, to_rgb
from svfap_dist.video.info import Crop, TooShortError, VideoInfo, stored_region

Key = tuple[int | str, ...]  # key of a random stream
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of arrays, by name

_ALIGNMENT = 64  # bytes
_MIN_PREFETCH, _MAX_PREFETCH = 2, 16  # batches; more than a few gain nothing
# The 13 places of a crop, in quarters of the free room: corners, center, edges, inner quarters.
_PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)


@dataclasses.dataclass(frozen=True)
class ClipRequest:
    """Which clips to cut from a sample, and where to write them."""

    window: Key  # key of the stream that chooses the window
    crops: tuple[Key, ...]  # key of the stream of each clip's crop
    batch: int  # index in the shared arrays
    row: int  # of the first clip in the batch; the others follow it
    augments: tuple[Key, ...] = ()  # key of the stream of each clip's augmentation; (): none
    phase: int | None = None  # remainder of the window's start by the stride; None: any
    region: str | None = None  # to cut the clips from; None: data.region


@dataclasses.dataclass(frozen=True)
class DecodeJob:
    """Clips to cut from a packed sample."""

    packed: PackedSample
    request: ClipRequest


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """Outcome of a job."""

    bad: BadSample | None  # why there are no clips; None: they are in the shared arrays
    seconds: float  # of unpacking, decoding and cutting


def random_window_start(
    stream: Stream, num_frames: int, window: int, phase: int | None = None, stride: int = 1
) -> int:
    """Return the first frame of a random window, uniform over the video.

    With a random phase, starts are almost equally likely: one phase may have one start more than
    another.

    Args:
        stream: Random numbers.
        num_frames: Frames of the video.
        window: Frames that a clip spans.
        phase: Remainder of the start by the stride; None: any. A video that is so short that it has
            no such start gets another one.
        stride: Video frames from one frame of a clip to the next.

    Raises:
        TooShortError: The video has fewer frames.
    """
    if num_frames < window:
        found = f"{num_frames} frames for a window of {window}"
        do = f"shard again with --min-frames {window}"
        raise TooShortError("Video is shorter than a clip's window", "", found, do)
    starts = num_frames - window + 1
    if phase is None:
        return stream.integer(starts)
    phase %= min(starts, stride)
    return phase + stride * stream.integer(-(-(starts - phase) // stride))


def random_crop(stream: Stream, within: Crop, scales: tuple[float, ...]) -> Crop:
    """Return a multi-scale crop: one of VideoMAE's sizes at one of its 13 places.

    Args:
        stream: Random numbers.
        within: Region of the frame.
        scales: Candidates for height and width, as fractions of the region's shorter side; the two
            are at most one step apart in this list.
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


def window_frames(
    num_frames: int,
    data: DataConfig,
    window: Key,
    phase: int | None = None,
    *,
    allow_short: bool = False,
) -> Sequence[int]:
    """Return the frame numbers of a random window.

    Args:
        num_frames: Frames of the video.
        data: Window.
        window: Key of the stream that chooses the window.
        phase: Of the window's start, as for `random_window_start`.
        allow_short: Repeat the last frame of a video that is shorter than a window.

    Raises:
        TooShortError: The video is shorter than a window, and no still image.
    """
    if num_frames == 1:
        return [0] * data.num_frames
    length = max(num_frames, data.window) if allow_short else num_frames
    stream = Stream(*window)
    start = random_window_start(stream, length, data.window, phase, data.sampling_rate)
    numbers = range(start, start + data.window, data.sampling_rate)
    last = num_frames - 1
    return numbers if numbers[-1] <= last else [min(number, last) for number in numbers]


def plan_clips(
    info: VideoInfo,
    data: DataConfig,
    window: Key,
    crops: Sequence[Key],
    *,
    phase: int | None = None,
    allow_short: bool = False,
    region: str | None = None,
) -> tuple[Sequence[int], list[Crop]]:
    """Return the frame numbers of a random window, and a random crop for each of its clips.

    Args:
        info: The video.
        data: Window, region and scales of crops.
        window: Key of the stream that chooses the window.
        crops: Keys of the streams of each clip's crop.
        phase: Of the window's start, as for `random_window_start`.
        allow_short: Repeat the last frame of a video that is shorter than a window.
        region: To cut from; None: data.region.

    Raises:
        TooShortError: The video is shorter than a window.
        ConfigError: The shards were cut to another region than data.region.
    """
    numbers = window_frames(info.num_frames, data, window, phase, allow_short=allow_short)
    within = stored_region(info, region or data.region)
    return numbers, [random_crop(Stream(*key), within, data.crop_scales) for key in crops]


def array_shapes(
    data: DataConfig, length: int, clips: int, planes: tuple[int, int] | None = None
) -> Shapes:
    """Return the arrays for the frames of batches: `rgb`, or those of `YuvClips`.

    Args:
        data: Size of clips.
        length: Number of batches.
        clips: Clips per batch.
        planes: Largest height and width of planes; None: RGB.
    """
    batch = (length, clips)
    if planes is None:
        return {"rgb": ("uint8", (*batch, data.num_frames, data.frame_size, data.frame_size, 3))}
    height, width = planes
    half = (*batch, data.num_frames, (height + 1) // 2, (width + 1) // 2)
    return {
        "y": ("uint8", (*batch, data.num_frames, height, width)),
        "u": ("uint8", half),
        "v": ("uint8", half),
        "crops": ("int64", (*batch, 4)),
        "kinds": ("int64", batch),
    }


def ring_length(data: DataConfig, clips: int, planes: tuple[int, int] | None = None) -> int:
    """Return the number of batches that `data.prefetch_bytes` allows, plus the one in use.

    Args:
        data: Size of clips, prefetch limit.
        clips: Clips per batch.
        planes: Largest height and width of planes; None: RGB.
    """
    ((_, one), *_) = array_shapes(data, 1, clips, planes).values()
    batch_bytes = math.prod(one) if planes is None else math.prod(one) * 3 // 2
    return 1 + min(max(data.prefetch_bytes // batch_bytes, _MIN_PREFETCH), _MAX_PREFETCH)


def prefetch_bytes(data: DataConfig, clips: int) -> int:
    """Return the bytes of a rank's ring of RGB batches.

    Args:
        data: Size of clips, prefetch limit.
        clips: Clips per batch.
    """
    ((_, shape),) = array_shapes(data, ring_length(data, clips), clips).values()
    return math.prod(shape)


class SharedArrays:
    """NumPy arrays in anonymous memory that this process shares with the processes it starts.

    The memory is a memfd: workers inherit its descriptor, no file is left behind, and it does not
    count against the size of /dev/shm, which containers keep small. Where the system has no memfd,
    the arrays can be used, but not sent to another process.

    Args:
        shapes: Dtype and shape of each array, by name.
        descriptor: Open file of existing memory; None: new memory.

    Raises:
        ConfigError: The memory cannot be mapped.
    """

    def __init__(self, shapes: Shapes, descriptor: int | None = None) -> None:
        self._shapes = dict(shapes)
        sizes = [math.prod(shape) * np.dtype(kind).itemsize for kind, shape in shapes.values()]
        padded = (-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)
        offsets = np.cumsum([0, *padded]).tolist()
        self.num_bytes: int = offsets[-1]
        try:
            if descriptor is None and hasattr(os, "memfd_create"):
                descriptor = os.memfd_create("svfap-clips")
                os.ftruncate(descriptor, self.num_bytes)
            memory = mmap.mmap(-1 if descriptor is None else descriptor, self.num_bytes)
        except (OSError, ValueError, OverflowError) as error:
            found = f"{self.num_bytes} bytes cannot be shared between processes ({error})"
            do, key = "make data.prefetch_bytes or the batch smaller", "data.prefetch_bytes"
            raise ConfigError("No memory for batches", key, found, do) from error
        self._descriptor = descriptor
        self.address = np.frombuffer(memory, np.uint8).ctypes.data
        self.arrays = {
            name: np.ndarray(shape, kind, memory, offset)
            for (name, (kind, shape)), offset in zip(shapes.items(), offsets, strict=False)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        if self._descriptor is None:
            what, key = "Decode workers are not supported on this system", "data.decode_workers"
            raise ConfigError(what, key, "no memfd_create", f"set {key}=0 and data.feeders=0")
        return _attach, (self._shapes, reduction.DupFd(self._descriptor))

    def close(self) -> None:
        """Close the descriptor: no more processes can get the arrays, which stay usable here."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def _attach(shapes: Shapes, shared: Any) -> SharedArrays:
    return SharedArrays(shapes, shared.detach())


class ClipWorker:
    """Does jobs in whichever process calls it; picklable.

    Args:
        data: Window, crops and size of clips.
        backend: Name of a decode backend that decodes on the host.
        arrays: Where clips go: `rgb` [batches, B, F, S, S, 3], or the planes of `YuvClips`.
        augmentation: Of a task's clips; None: pre-training, or the device augments.
        allow_short: Repeat the last frame of videos that are shorter than a window, as tasks do.
    """

    def __init__(
        self,
        data: DataConfig,
        backend: str,
        arrays: SharedArrays,
        augmentation: AugmentConfig | None = None,
        allow_short: bool = False,
    ) -> None:
        self._data, self._backend, self._augmentation = data, backend, augmentation
        self._shared, self._allow_short = arrays, allow_short

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Slow imports happen as the worker process starts, not within its first job's deadline.
        self.__dict__.update(state)
        keep_freed_memory()  # each clip allocates the same large arrays
        open_decoder(self._backend)
        if "rgb" in self._shared.arrays:
            import torch  # resizes; planes need no resizing

            torch.set_num_threads(1)

    def __call__(self, jobs: Sequence[DecodeJob]) -> list[DecodeResult]:
        """Do jobs in order.

        Args:
            jobs: Several at a time: a clip takes about a millisecond, and waking a process for it
                nearly as long.
        """
        return [self._do(job) for job in jobs]

    def _do(self, job: DecodeJob) -> DecodeResult:
        began = time.perf_counter()
        sample = unpack(job.packed)
        bad = sample if isinstance(sample, BadSample) else self._cut(sample, job.request)
        return DecodeResult(bad, time.perf_counter() - began)

    def _cut(self, sample: Sample, request: ClipRequest) -> BadSample | None:
        try:
            numbers, crops = plan_clips(
                sample.info,
                self._data,
                request.window,
                request.crops,
                phase=request.phase,
                allow_short=self._allow_short,
                region=request.region,
            )
            if is_still := sample.info.num_frames == 1:
                numbers = numbers[:1]
            frames = open_decoder(self._backend)(sample.video, sample.info, numbers)
            for number, crop in enumerate(crops):
                moves: list[Move] = []
                if is_still and self._data.still_motion:
                    stream = Stream(*request.crops[number], "pan")
                    moves = pan_moves(_size_of(frames), crop, stream, self._data)
                self._write(frames, crop, request, number, moves)
        except DecodeError as error:
            return BadSample(sample.index, sample.key, error.reason, str(error))
        except MemoryError:
            detail = "the worker's memory limit is reached"
            return BadSample(sample.index, sample.key, "too_large", detail)
        return None

    def _write(
        self, frames: Frames, crop: Crop, request: ClipRequest, number: int, moves: list[Move]
    ) -> None:
        """Write the clip `number` of a sample to its row of the batch.

        moves: of the camera in each frame of a clip of a still image; []: there is none.
        """
        arrays, batch, row = self._shared.arrays, request.batch, request.row + number
        if "rgb" in arrays:
            clip = _panned(frames, crop, self._data.frame_size, moves or [(0, 0)])
            if self._augmentation is not None:
                if len(clip) < self._data.num_frames:  # of a still image: noise differs by frame
                    clip = np.repeat(clip, self._data.num_frames, axis=0)
                clip = augment(clip, Stream(*request.augments[number]), self._augmentation)
            arrays["rgb"][batch, row] = clip
            return
        assert isinstance(frames, YuvFrames), "the loader checks that the backend gives planes"
        for name in ("y", "u", "v"):
            plane, place = getattr(frames, name), arrays[name][batch, row]
            height, width = plane.shape[1:]
            if height > place.shape[1] or width > place.shape[2]:
                what = "Frames are larger than those of other samples"
                do = "shard with one --size for all videos, or set data.colors=workers"
                raise WrongSizeError(what, "", f"{frames.y.shape[1:]}", do)
            place[:, :height, :width] = plane
            for k, move in enumerate(moves):
                scale = 1 if name == "y" else 2
                place[k, :height, :width] = moved_plane(plane[0], move, scale)
        arrays["crops"][batch, row] = dataclasses.astuple(crop)
        arrays["kinds"][batch, row] = kind_of(frames)


def _size_of(frames: Frames) -> tuple[int, int]:
    """Return height and width of decoded frames."""
    plane = frames.y if isinstance(frames, YuvFrames) else frames.pixels
    return plane.shape[1], plane.shape[2]


def _panned(frames: Frames, crop: Crop, size: int, moves: Sequence[Move]) -> np.ndarray:
    """Return uint8 RGB [F, size, size, 3] of a crop that moves; of one move, all the frames."""
    places = [
        dataclasses.replace(crop, top=crop.top + down, left=crop.left + right)
        for down, right in moves
    ]
    made = {place: to_rgb(frames, place, size) for place in dict.fromkeys(places)}
    return made[places[0]] if len(made) == 1 else np.concatenate([made[place] for place in places])
