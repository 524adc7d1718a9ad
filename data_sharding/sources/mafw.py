"""MAFW: clips of eleven expressions, five official folds. https://mafw-database.github.io/MAFW/

INPUT is the folder with `data` and `Train & Test Set`. Frames are taken where they are, else the
clips. Clips of compound expressions only are in no fold and are listed.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import Rows, official
from data_sharding.sources.labelled import Place, join, media_of, not_the_layout, read_rows

CLASSES = (
    "anger",
    "disgust",
    "fear",
    "happiness",
    "neutral",
    "sadness",
    "surprise",
    "contempt",
    "anxiety",
    "helplessness",
    "disappointment",
)
FOLDS = range(1, 6)
LISTS = "Train & Test Set/single/no_caption"
LIST = LISTS + "/set_{fold}/{part}.txt"  # rows `NNNNN.mp4 emotion`
PLACES = (
    Place("data/frames", "frames"),  # NNNNN/*.png
    Place("data/clips", "videos"),  # NNNNN.mp4; known, not read
)
_LAYOUT = "data/frames/NNNNN or data/clips/NNNNN.mp4, and Train & Test Set"


def samples(folder: str) -> Iterator[SourceVideo]:
    """Every clip of MAFW; key: its number in five digits.

    Raises: ConfigError, ShardError if the folder is not MAFW's, StorageError.
    """
    media = media_of(folder, PLACES)
    lists = {fold: {p: _rows(folder, p, fold) for p in ("train", "test")} for fold in FOLDS}
    labels = {
        name: Labels(set="mafw", class_index=CLASSES.index(label), class_name=label, fold=fold)
        for name, label, fold in official(LISTS, lists)
    }
    return join("mafw", folder, media, labels, _LAYOUT)


def _rows(folder: str, part: str, fold: int) -> Rows:
    path = LIST.format(part=part, fold=fold)
    rows = read_rows("mafw", folder, path, " ", 2)
    if strange := [row for row in rows if row[1] not in CLASSES]:
        raise not_the_layout("mafw", path, f"the row {strange[0]}", "rows `NNNNN.mp4 emotion`")
    return [(clip.partition(".")[0], emotion) for clip, emotion in rows]
