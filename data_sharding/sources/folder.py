"""Any folder of videos: every video file below it, without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator

from data_sharding.sources import SourceVideo
from data_sharding.sources.listing import as_samples, list_videos


def samples(folder: str) -> Iterator[SourceVideo]:
    """Every video file below a folder or S3 prefix, in order of path; key: the path, no suffix."""
    sizes = list_videos(folder)
    return as_samples(folder, sizes, ((path, os.path.splitext(path)[0], {}) for path in sizes))
