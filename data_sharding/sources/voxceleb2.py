"""VoxCeleb2: `idNNNNN/<YouTube id>/NNNNN.mp4`, as unpacked, at any depth below INPUT.

The archives unpack to `dev/mp4/...` and `test/mp4/...`; no person is in both, so keys need no such
prefix. https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox2.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_sharding.sources import SOURCES, SourceVideo
from data_sharding.sources.labeled import layout_error
from data_sharding.sources.listing import Found, as_videos, list_videos

_CLIP = re.compile(r"(?:.*/)?((id\d{5})/[^/]+/\d{5})\.mp4")


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: `idNNNNN/<video>/NNNNN`; label: the identity."""
    videos = list_videos(folder)
    if not any(_CLIP.fullmatch(path) for path, _ in videos):
        found = f"{len(videos)} videos, such as {videos.first()}"
        raise layout_error("voxceleb2", folder, found)
    return as_videos(folder, (_found(path, size) for path, size in videos))


def _found(path: str, size: int) -> Found:
    if clip := _CLIP.fullmatch(path):
        return Found(path, size, clip[1], {"identity": clip[2]})
    return Found(path, size, path, {}, f"not at {SOURCES['voxceleb2'].input}")
