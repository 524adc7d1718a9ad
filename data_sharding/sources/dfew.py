"""DFEW: film clips of seven expressions, five official folds.

INPUT is the folder with `Clip` and `EmoLabel_DataSplit`. Frames are used where they exist, else the
clips. The folds have the 11,697 clips with a single label; others are rejected.
https://dfew-dataset.github.io
"""

from __future__ import annotations

from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import Rows, official_folds
from data_sharding.sources.labeled import (
    Place,
    add_clip,
    find_clips,
    join_labels,
    layout_error,
    read_rows,
)

CLASSES = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")  # labels 1 to 7
FOLDS = range(1, 6)
LISTS = "EmoLabel_DataSplit"
LIST = LISTS + "/{part}(single-labeled)/set_{fold}.csv"
HEADER = ["video_name", "label"]
PLACES = (
    Place("Clip/clip_224x224", "frames"),  # NNNNN/*.jpg
    Place("Clip/clip_224x224_avi", "videos"),  # NNNNN.avi
    Place("Clip/original", "videos"),  # N.mp4
)


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the clip's number in five digits."""
    clips: dict[str, SourceVideo] = {}
    for name, clip in find_clips(folder, PLACES).items():
        add_clip(clips, name.zfill(5), name, clip)
    lists = {fold: {p: _rows(folder, p, fold) for p in ("train", "test")} for fold in FOLDS}
    labels = {
        name: Labels(
            set="dfew", class_index=int(label) - 1, class_name=CLASSES[int(label) - 1], fold=fold
        )
        for name, label, fold in official_folds(LISTS, lists)
    }
    return join_labels("dfew", folder, clips, labels)


def _rows(folder: str, part: str, fold: int) -> Rows:
    path = LIST.format(part=part, fold=fold)
    header, *rows = read_rows("dfew", folder, path, ",", 2) or [[]]
    numbers = {str(i + 1) for i in range(len(CLASSES))}
    strange = [row for row in rows if not row[0].isdecimal() or row[1] not in numbers]
    if header != HEADER or strange:
        found = f"the row {strange[0] if strange else header}"
        raise layout_error("dfew", path, found, "columns video_name,label with labels 1 to 7")
    return [(number.zfill(5), label) for number, label in rows]
