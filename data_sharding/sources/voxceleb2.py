"""VoxCeleb2: `idNNNNN/<YouTube id>/NNNNN.mp4`, as unpacked, in or below the folder given.

The archives unpack to `dev/mp4/...` and `test/mp4/...`; persons of the two never meet, so keys need
no such prefix. https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox2.html
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from data_sharding.sources import SourceVideo
from data_sharding.sources.listing import as_samples, list_videos
from svfap_dist.errors import ShardError

_MISFIT = "not at idNNNNN/<video>/NNNNN.mp4"
_CLIP = re.compile(r"(?:.*/)?((id\d{5})/[^/]+/\d{5})\.mp4")


def samples(folder: str) -> Iterator[SourceVideo]:
    """Every clip below a folder or S3 prefix; key `idNNNNN/<video>/NNNNN`; label: the identity.

    Videos elsewhere below the folder are given as misfits.

    Raises: ShardError if there are videos, but none in this layout.
    """
    sizes = list_videos(folder)
    clips = [(path, found) for path in sizes if (found := _CLIP.fullmatch(path))]
    if not clips:
        raise ShardError(
            "Not the layout of VoxCeleb2",
            where=folder,
            found=f"{len(sizes)} videos, such as {next(iter(sizes))}",
            do="give the folder that holds idNNNNN/<video>/NNNNN.mp4, or use the source `folder`",
        )
    placed = {path: (found[1], {"identity": found[2]}) for path, found in clips}
    rows = [(path, *placed.get(path, (path, {}))) for path in sizes]
    videos = zip(sizes, as_samples(folder, sizes, rows), strict=True)
    return (v if path in placed else dataclasses.replace(v, misfit=_MISFIT) for path, v in videos)
