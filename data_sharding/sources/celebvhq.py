"""CelebV-HQ: clips of faces from YouTube, labeled for attributes of appearance and of action.

INPUT holds the clips, `<clip>.mp4`, in any folders, and the authors' list. Each attribute is a
classification of its own, no or yes. Emotions are not taken: a clip may have several, one after
another. Clips name no person, so the subject is the YouTube video. There is no official split.
https://github.com/CelebV-HQ/CelebV-HQ
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.labeled import add_clip, join_labels, layout_error
from data_sharding.sources.listing import list_videos, video_file
from svfap_dist import storage

LIST = "celebvhq_info.json"
KINDS = ("appearance", "action")  # of attributes; their names are in the list


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the clip's name, `<YouTube id>_N`."""
    clips: dict[str, SourceVideo] = {}
    for path, size in list_videos(folder):
        name = os.path.splitext(os.path.basename(path))[0]
        add_clip(clips, name, path, video_file(folder, path, size))
    return join_labels("celebvhq", folder, clips, _labels(folder))


def _labels(folder: str) -> dict[str, Labels]:
    url = storage.join(folder, LIST)
    try:
        content = json.loads(storage.read_bytes(url))
        names = {kind: content["meta_info"][f"{kind}_mapping"] for kind in KINDS}
        return {clip: _labels_of(row, names) for clip, row in content["clips"].items()}
    except storage.StorageMissingError as error:
        raise layout_error("celebvhq", url, "no such file", LIST) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        form = "the authors' list: meta_info, and clips with ytb_id and attributes of 0 and 1"
        raise layout_error("celebvhq", url, repr(error), form) from error


def _labels_of(row: dict[str, Any], names: dict[str, list[str]]) -> Labels:
    classes: dict[str, int] = {}
    for kind in KINDS:
        values = row["attributes"][kind]
        if strange := [value for value in values if type(value) is not int or value not in (0, 1)]:
            raise ValueError(f"{kind} has {strange[0]!r}")
        classes |= dict(zip(names[kind], values, strict=True))
    if not isinstance(row["ytb_id"], str):
        raise TypeError(f"ytb_id is {row['ytb_id']!r}")
    return Labels(set="celebvhq", subject=row["ytb_id"], classes=classes)
