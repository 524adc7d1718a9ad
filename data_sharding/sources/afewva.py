"""AFEW-VA: 600 film clips, rated for valence and arousal frame by frame.

INPUT contains a folder `NNN` per clip, at any depth (each archive has 50): the frames, and
`NNN.json` with the actor and the ratings from -10 to 10. A clip's values are the means over its
frames, divided by 10. There are no official folds.
https://ibug.doc.ic.ac.uk/resources/afew-va-database/
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.labeled import Place, add_clip, find_clips, join_labels, layout_error
from svfap_dist import storage

DIMENSIONS = ("valence", "arousal")
SCALE = 10.0  # ratings are from -SCALE to SCALE
PLACES = (Place("", "frames"),)


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the clip's number, `NNN`."""
    clips: dict[str, SourceVideo] = {}
    for path, clip in find_clips(folder, PLACES).items():
        add_clip(clips, os.path.basename(path), path, clip)
    return join_labels("afewva", folder, clips, _labels(folder))


def _labels(folder: str) -> dict[str, Labels]:
    labels: dict[str, Labels] = {}
    for path, _ in sorted(storage.walk_files(folder)):
        name, suffix = os.path.splitext(os.path.basename(path))
        if suffix == ".json" and os.path.basename(os.path.dirname(path)) == name:
            if name in labels:
                raise layout_error("afewva", storage.join(folder, path), f"clip {name} twice")
            labels[name] = _read(storage.join(folder, path))
    return labels


def _read(url: str) -> Labels:
    try:
        content = json.loads(storage.read_bytes(url))
        frames, actor = list(content["frames"].values()), content["actor"]
        values = {d: statistics.fmean(frame[d] for frame in frames) / SCALE for d in DIMENSIONS}
        if strange := [value for value in values.values() if not math.fabs(value) <= 1]:
            raise ValueError(f"a mean rating of {strange[0] * SCALE:g}")
        if not isinstance(actor, str) or not actor:
            raise ValueError(f"actor is {actor!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        form = "the authors' file: actor, and frames with valence and arousal from -10 to 10"
        raise layout_error("afewva", url, repr(error), form) from error
    return Labels(set="afewva", subject=actor, values=values)
