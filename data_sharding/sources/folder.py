"""Any folder of videos: every video file below it, without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator

from data_sharding.sources import SourceVideo
from data_sharding.sources.listing import Found, Listing, as_videos, list_videos


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the path without its suffix."""
    return named_by_path(folder, list_videos(folder))


def named_by_path(folder: str, videos: Listing) -> Iterator[SourceVideo]:
    """Return unlabeled samples for a listing, with their paths as keys.

    Args:
        folder: Folder or prefix that was listed.
        videos: Its video files.
    """
    return as_videos(
        folder, (Found(path, size, os.path.splitext(path)[0], {}) for path, size in videos)
    )
