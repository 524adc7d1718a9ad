"""MAFW: clips of eleven expressions, five official folds.

INPUT is the folder with `data` and `Train & Test Set`. Frames are used where they exist,
else the clips. Clips with compound expressions only are in no fold and are rejected.
https://mafw-database.github.io/MAFW
"""

from __future__ import annotations

from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import Rows, official_folds
from data_sharding.sources.labeled import Place, find_clips, join_labels, layout_error, read_rows

CLASSES = (
    *("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"),
    *("contempt", "anxiety", "helplessness", "disappointment"),
)
FOLDS = range(1, 6)
LISTS = "Train & Test Set/single/no_caption"
LIST = LISTS + "/set_{fold}/{part}.txt"  # rows `NNNNN.mp4 emotion`
PLACES = (
    Place("data/frames", "frames"),  # NNNNN/*.png
    Place("data/clips", "videos"),  # NNNNN.mp4; known, not read
)


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the clip's number in five digits."""
    clips = find_clips(folder, PLACES)
    lists = {fold: {p: _rows(folder, p, fold) for p in ("train", "test")} for fold in FOLDS}
    labels = {
        name: Labels(set="mafw", class_index=CLASSES.index(label), class_name=label, fold=fold)
        for name, label, fold in official_folds(LISTS, lists)
    }
    return join_labels("mafw", folder, clips, labels)


def _rows(folder: str, part: str, fold: int) -> Rows:
    path = LIST.format(part=part, fold=fold)
    rows = read_rows("mafw", folder, path, " ", 2)
    if strange := [row for row in rows if row[1] not in CLASSES]:
        raise layout_error("mafw", path, f"the row {strange[0]}", "rows `NNNNN.mp4 emotion`")
    return [(clip.partition(".")[0], emotion) for clip, emotion in rows]
