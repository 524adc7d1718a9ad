"""VoxCeleb2: `idNNNNN/<YouTube id>/NNNNN.mp4`, as unpacked, in or below the folder given.

The archives unpack to `dev/mp4/...` and `test/mp4/...`; persons of the two never meet, so keys need
no such prefix. https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox2.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_sharding.sources import SourceVideo
from data_sharding.sources.listing import Found, as_samples, list_videos
from svfap_dist.errors import ShardError

_MISFIT = "not at idNNNNN/<video>/NNNNN.mp4"
_CLIP = re.compile(r"(?:.*/)?((id\d{5})/[^/]+/\d{5})\.mp4")


def samples(folder: str) -> Iterator[SourceVideo]:
    """Every clip below a folder or S3 prefix; key `idNNNNN/<video>/NNNNN`; label: the identity.

    Videos elsewhere below the folder are given as misfits.

    Raises: ShardError if there are videos, but none in this layout.
    """
    videos = list_videos(folder)
    if not any(_CLIP.fullmatch(path) for path, _ in videos):
        raise ShardError(
            "Not the layout of VoxCeleb2",
            where=folder,
            found=f"{len(videos)} videos, such as {videos.first()}",
            do="give the folder that holds idNNNNN/<video>/NNNNN.mp4, or use the source `folder`",
        )
    return as_samples(folder, (_found(path, size) for path, size in videos))


def _found(path: str, size: int) -> Found:
    if clip := _CLIP.fullmatch(path):
        return Found(path, size, clip[1], {"identity": clip[2]})
    return Found(path, size, path, {}, _MISFIT)
