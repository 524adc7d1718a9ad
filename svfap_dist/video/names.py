"""Which files are videos, by their names."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable

from svfap_dist.video.info import VIDEO_SUFFIXES

log = logging.getLogger(__name__)

# Of videos that cannot be read here, or are seldom meant: folders with them get a warning.
_OTHER_SUFFIXES = {
    *("264", "265", "amv", "av1", "divx", "dv", "evo", "gif", "h264", "h265", "hevc", "ivf"),
    *("m1v", "m2v", "mjpeg", "mjpg", "mod", "mxf", "nsv", "nut", "ogm", "rm", "rmvb", "tod"),
    *("trp", "vro", "wtv", "y4m"),
}


def suffix_of(path: str) -> str:
    """Return the suffix of a file's name in lower case, without its dot.

    Args:
        path: path or name.
    """
    return os.path.splitext(path)[1].lower().removeprefix(".")


def is_video(path: str) -> bool:
    """Return whether a file has a video's suffix and is not hidden.

    Args:
        path: path or name.
    """
    return suffix_of(path) in VIDEO_SUFFIXES and not os.path.basename(path).startswith(".")


def count_other_videos(paths: Iterable[str]) -> Counter[str]:
    """Return how many files are videos of formats that are not read, by suffix.

    Args:
        paths: paths or names.
    """
    return Counter(suffix for suffix in map(suffix_of, paths) if suffix in _OTHER_SUFFIXES)


def warn_of_other_videos(folder: str, counts: Counter[str]) -> None:
    """Log how many videos of formats that are not read a folder has, if any.

    Args:
        folder: path or URL.
        counts: by suffix.
    """
    if counts:
        each = ", ".join(f"{count} .{suffix}" for suffix, count in counts.most_common())
        read = ", ".join(VIDEO_SUFFIXES)
        log.warning("Videos of other formats in %s are left out: %s. Read: %s.", folder, each, read)
