"""Many videos through a network: decoded by threads, batched across videos, outputs by video.

In: videos by name, which clips of each to look at (a function of what the video is), and a function
of a batch of clips. Out, video by video in the order given: what the function made of its clips, or
why the video could not be used. A bad one costs only itself.

Reading, decoding and cutting run ahead in a few threads (PyAV and torch let go of Python's lock),
by so many pieces that the threads stay busy and no more. A long video is decoded in parts, so
memory grows neither with the number of videos nor with their length, outputs aside. Parts come back
in order, so that equal inputs make equal batches.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from svfap_dist.errors import DecodeError
from svfap_dist.inference.model_info import Card
from svfap_dist.inference.videos import BadVideo, Video
from svfap_dist.video import backends
from svfap_dist.video import views as windows
from svfap_dist.video.color import to_rgb
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.views import Views

_PART_BYTES = 64 << 20  # of decoded frames that a thread holds at a time, about
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Seen:
    """A video, and what was made of its clips: outputs [windows * crops, ...], crops of a window
    side by side."""

    key: str
    info: VideoInfo
    views: Views
    outputs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Opened:
    """A video that can be used: the number-th."""

    number: int
    key: str
    info: VideoInfo
    views: Views


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Some of a video's windows, and the video's bytes."""

    of: _Opened
    starts: list[int]
    video: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class _Clips:
    """The clips of a part, uint8 [K, F, S, S, 3]."""

    of: _Opened
    clips: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Bad:
    number: int
    video: BadVideo


@dataclasses.dataclass(frozen=True)
class Looked:
    """Of many videos those that could be used, one at least, and the others."""

    seen: list[Seen]
    bad: list[BadVideo]

    @property
    def rejected(self) -> list[tuple[str, str]]:
        """Key and reason of each of the others."""
        return [(video.key, f"{video.reason}: {video.detail}") for video in self.bad]


def look_at_all(
    videos: Sequence[Video],
    card: Card,
    choose: Callable[[VideoInfo], Views],
    function: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    threads: int,
    progress: Callable[[int], None],
) -> Looked:
    """As `look`, all of it at once; `progress` hears how many videos are done.

    Raises: DecodeError if not one of them can be used; what `look` raises.
    """
    looked = Looked([], [])
    found = look(videos, card, choose, function, batch_size=batch_size, threads=threads)
    for done, video in enumerate(found, start=1):
        if isinstance(video, Seen):
            looked.seen.append(video)
        else:
            looked.bad.append(video)
        progress(done)
    if looked.seen:
        return looked
    if len(looked.bad) == 1:
        raise looked.bad[0].error()
    raise DecodeError(
        "No video can be used",
        where=f"{len(looked.bad)} videos",
        found="; ".join(f"{key}: {reason}" for key, reason in looked.rejected[:5]),
        do="give whole videos of a usual kind",
    )


def look(
    videos: Sequence[Video],
    card: Card,
    choose: Callable[[VideoInfo], Views],
    function: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    threads: int,
) -> Iterator[Seen | BadVideo]:
    """What `function` makes of the clips of each video that `choose` names.

    function: of clips uint8 [B, F, S, S, 3], `batch_size` of them or fewer; a row [...] per clip.
    threads: that read and decode.

    Raises: what the store, `choose` and `function` raise.
    """
    bad: dict[int, BadVideo] = {}

    def usable(parts: Iterable[_Clips | _Bad]) -> Iterator[_Clips]:
        for part in parts:
            if isinstance(part, _Clips):
                yield part
            else:
                bad[part.number] = part.video

    def parts(job: tuple[int, Video]) -> list[_Part | _Bad]:
        return _parts(*job, card, choose)

    with ThreadPoolExecutor(threads, "look") as pool:
        try:
            opened = itertools.chain.from_iterable(_ahead(pool, parts, enumerate(videos), threads))
            cut = _ahead(pool, lambda part: _cut(part, card), opened, threads)
            rows = _rows(usable(cut), function, batch_size)
            told = 0
            for number, group in itertools.groupby(rows, key=lambda row: row[0].number):
                seen = _seen(list(group))
                yield from (bad.pop(other) for other in range(told, number))
                yield bad.pop(number, seen)  # it may have gone wrong after its first clips
                told = number + 1
            yield from (bad[number] for number in sorted(bad))
        finally:
            pool.shutdown(cancel_futures=True)


def _ahead(
    pool: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item], count: int
) -> Iterator[_Result]:
    """Results in order; `count` of them are under way while one is looked at."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _parts(
    number: int, video: Video, card: Card, choose: Callable[[VideoInfo], Views]
) -> list[_Part | _Bad]:
    """The parts of a video: windows in a row whose frames, were none shared, take _PART_BYTES."""
    found = video.open()
    if isinstance(found, BadVideo):
        return [_Bad(number, dataclasses.replace(found, key=video.key))]
    data, info = found
    opened = _Opened(number, video.key, info, choose(info))
    starts = list(opened.views.starts)
    most = max(_PART_BYTES // (info.width * info.height * 3 * card.num_frames), 1)
    return [
        _Part(opened, starts[first : first + most], data) for first in range(0, len(starts), most)
    ]


def _cut(part: _Part | _Bad, card: Card) -> _Clips | _Bad:
    """The clips of a part, or why there are none."""
    if isinstance(part, _Bad):
        return part
    info, crops = part.of.info, part.of.views.crops
    wanted = np.array(
        [
            windows.frame_numbers(start, card.num_frames, card.sampling_rate, info.num_frames)
            for start in part.starts
        ]
    )
    numbers, places = np.unique(wanted, return_inverse=True)  # windows may share frames
    try:
        frames = backends.decode(part.video, info, numbers.tolist())
    except DecodeError as error:
        return _Bad(part.of.number, BadVideo(part.of.key, "undecodable", str(error)))
    where = torch.from_numpy(places.reshape(wanted.shape))
    cut = [torch.from_numpy(to_rgb(frames, crop, card.frame_size))[where] for crop in crops]
    return _Clips(part.of, torch.stack(cut, dim=1).flatten(0, 1))  # [windows, crops, ...] -> [K]


def _rows(
    parts: Iterable[_Clips], function: Callable[[Tensor], Tensor], batch_size: int
) -> Iterator[tuple[_Opened, np.ndarray]]:
    """The output of each clip, and its video, from batches that go across videos."""
    clips = ((part.of, clip) for part in parts for clip in part.clips)
    while batch := list(itertools.islice(clips, batch_size)):
        outputs = function(torch.stack([clip for _, clip in batch])).cpu().numpy()
        yield from ((of, output) for (of, _), output in zip(batch, outputs, strict=True))


def _seen(rows: list[tuple[_Opened, np.ndarray]]) -> Seen:
    of = rows[0][0]
    return Seen(of.key, of.info, of.views, np.stack([output for _, output in rows]))
