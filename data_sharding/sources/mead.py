"""MEAD: actors speak sentences in eight emotions, each but neutral at three levels.

INPUT holds the actors' folders, `M003` or `W009`, with what their `video.tar` contains. Each
performance was recorded from seven views; only the front is taken. There are no official folds.
https://wywu.github.io/projects/MEAD/MEAD.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.labeled import labeled_by_path

CLASSES = ("angry", "contempt", "disgusted", "fear", "happy", "neutral", "sad", "surprised")
VIEW = "front"  # others: left_30, left_60, right_30, right_60, top, down
_CLIP = re.compile(r"(?:.*/)?([MW]\d{3})/video/(\w+)/(\w+)/(level_[123])/(\d{3})\.\w+")


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: `<person>/<emotion>/level_N/NNN`."""
    return labeled_by_path("mead", folder, _parse)


def _parse(path: str) -> tuple[str, Labels] | str:
    found = _CLIP.fullmatch(path)
    if not found or found[3] not in CLASSES:
        return ""
    person, view, emotion, level, number = found.groups()
    if view != VIEW:
        return f"view {view}, not {VIEW}"
    return f"{person}/{emotion}/{level}/{number}", Labels(
        set="mead", subject=person, class_index=CLASSES.index(emotion), class_name=emotion
    )
