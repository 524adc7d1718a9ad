"""DAiSEE: clips of ten seconds of students at online courses, rated for four affective states.

INPUT is the folder with `DataSet` and `Labels`. The official split is by person.
https://people.iith.ac.in/vineethnb/resources/daisee
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import Rows, fixed_splits
from data_sharding.sources.labeled import (
    Place,
    add_clip,
    find_clips,
    join_labels,
    layout_error,
    read_rows,
)

STATES: tuple[str, ...] = (
    "boredom",
    "engagement",
    "confusion",
    "frustration",
)  # columns of the lists, capitalized
LEVELS = ("very low", "low", "high", "very high")  # 0 to 3 in the lists
LISTS = {split: f"Labels/{split.title()}Labels.csv" for split in ("train", "validation", "test")}
SPLITS = {"train": "train", "validation": "val", "test": "test"}
NAME_COLUMN = "ClipID"
PLACES = (Place("DataSet", "videos"),)  # Train/PPPPPP/PPPPPPNNNN/PPPPPPNNNN.avi
_CLIP = re.compile(r"(\d{6})\d+")  # person, number


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the clip's name, `PPPPPPNNNN`."""
    clips: dict[str, SourceVideo] = {}
    for path, clip in find_clips(folder, PLACES).items():
        add_clip(clips, path.rsplit("/", 1)[-1], path, clip)
    lists = {SPLITS[split]: _rows(folder, path) for split, path in LISTS.items()}
    labels = {
        name: _labels(name, levels, split) for name, levels, split in fixed_splits("Labels", lists)
    }
    return join_labels("daisee", folder, clips, labels)


def _labels(name: str, levels: str, split: str) -> Labels:
    classes = dict(zip(STATES, map(int, levels), strict=True))
    names = {state: LEVELS[level] for state, level in classes.items()}
    return Labels(set="daisee", subject=name[:6], classes=classes, class_names=names, split=split)


def _rows(folder: str, path: str) -> Rows:
    """Return (name, one digit for the level of each of STATES) for each row of a list."""
    header, *rows = read_rows("daisee", folder, path, ",") or [[]]
    columns = [NAME_COLUMN, *(state.title() for state in STATES)]
    if missing := [column for column in columns if column not in header]:
        found = f"no column {', '.join(missing)} among {', '.join(header)}"
        raise layout_error("daisee", path, found)
    places = [header.index(column) for column in columns]
    found = []
    for row in rows:
        name, *levels = (row[n] if n < len(row) else "" for n in places)
        name = name.partition(".")[0]
        if not _CLIP.fullmatch(name) or not all(level in tuple("0123") for level in levels):
            form = "rows of a clip's name and levels from 0 to 3"
            raise layout_error("daisee", path, f"the row {','.join(row)}", form)
        found.append((name, "".join(levels)))
    return found
