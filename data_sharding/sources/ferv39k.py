"""FERV39k: clips of seven expressions in many scenes, official train and test lists.

INPUT is the folder with `2_ClipsforFaceCrop` and `4_setups`.
https://wangyanckxx.github.io/Proj_CVPR2022_FERV39k.html
"""

from __future__ import annotations

from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import Rows, fixed_splits
from data_sharding.sources.labeled import Place, find_clips, join_labels, layout_error, read_rows

CLASSES = ("Happy", "Sad", "Neutral", "Angry", "Surprise", "Disgust", "Fear")  # as lists spell them
LISTS = "4_setups/All_scenes"
LIST = LISTS + "/{split}_All.csv"  # rows `Scene/Emotion/NNNN Emotion`
PLACES = (Place("2_ClipsforFaceCrop", "frames"),)  # Scene/Emotion/NNNN/*.jpg


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: `Scene/Emotion/NNNN`."""
    clips = find_clips(folder, PLACES)
    lists = {split: _rows(folder, split) for split in ("train", "test")}
    labels = {
        name: Labels(
            set="ferv39k", class_index=CLASSES.index(label), class_name=label.lower(), split=split
        )
        for name, label, split in fixed_splits(LISTS, lists)
    }
    return join_labels("ferv39k", folder, clips, labels)


def _rows(folder: str, split: str) -> Rows:
    path = LIST.format(split=split)
    rows = read_rows("ferv39k", folder, path, " ", 2)
    if strange := [row for row in rows if row[1] not in CLASSES]:
        form = "rows `Scene/Emotion/NNNN Emotion`"
        raise layout_error("ferv39k", path, f"the row {strange[0]}", form)
    return [(clip.strip("/"), emotion) for clip, emotion in rows]
