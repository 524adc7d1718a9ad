"""AVCAffe: 106 people in remote tasks, who then rated their affect and their cognitive load.

INPUT is the folder with `videos`, `ground_truths` and `info`. Labels are per person and task, and
hold for all short clips of the task. The official split is by person.
https://github.com/pritamqu/AVCAffe
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import fixed_splits
from data_sharding.sources.labeled import Place, find_clips, join_labels, layout_error, read_rows
from svfap_dist import storage

AFFECT = {
    "arousal": ("Excited", "Wide-awake", "Neutral", "Dull", "Calm"),
    "valence": ("Pleasant", "Pleased", "Neutral", "Unsatisfied", "Unpleasant"),
}
LOADS = ("mental_demand", "temporal_demand", "effort")  # 0 to 21
LOAD_CLASSES = ("low", "high")
HIGH_LOAD_ABOVE = 10
TRUTHS = "ground_truths/{dimension}.txt"  # rows `aiimNNN_task_N, value`
SPLITS = {"train": "info/train.txt", "val": "info/val.txt"}  # a person per row
PLACES = (Place("videos/shorter_segments", "videos"),)  # aiimNNN/task_N/*.avi
_CLIP = re.compile(r"(aiim\d+)/(task_\d+)/[^/]+")


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: `aiimNNN/task_N/<name>`.

    Classes: arousal and valence in five, and the loads that have a file in two.
    """
    clips = find_clips(folder, PLACES)
    people = {split: _people(folder, path) for split, path in SPLITS.items()}
    split_of = {person: split for person, _, split in fixed_splits("info", people)}
    truths = {dimension: _truths(folder, dimension) for dimension in AFFECT}
    there = [d for d in LOADS if storage.exists(storage.join(folder, TRUTHS.format(dimension=d)))]
    truths |= {dimension: _truths(folder, dimension) for dimension in there}
    labels = {}
    for name in clips:
        if (found := _CLIP.fullmatch(name)) and (split := split_of.get(found[1])):
            task = f"{found[1]}_{found[2]}"
            classes = {d: rows[task] for d, rows in truths.items() if task in rows}
            if AFFECT.keys() <= classes.keys():
                labels[name] = _labels(found[1], classes, split)
    return join_labels("avcaffe", folder, clips, labels)


def _labels(subject: str, classes: dict[str, int], split: str) -> Labels:
    names = {d: AFFECT.get(d, LOAD_CLASSES)[index] for d, index in classes.items()}
    return Labels(set="avcaffe", subject=subject, classes=classes, class_names=names, split=split)


def _people(folder: str, path: str) -> list[tuple[str, str]]:
    people = [row[0] for row in read_rows("avcaffe", folder, path, ",", 1)]
    if strange := [person for person in people if not re.fullmatch(r"aiim\d+", person)]:
        raise layout_error("avcaffe", path, f"the row {strange[0]}", "a person `aiimNNN` per row")
    return [(person, "") for person in people]


def _truths(folder: str, dimension: str) -> dict[str, int]:
    """Return the class of each `aiimNNN_task_N` in one dimension."""
    path = TRUTHS.format(dimension=dimension)
    rows = [row for row in read_rows("avcaffe", folder, path, ",") if len(row) > 1]
    try:
        return {task: _class_of(dimension, value) for task, value in rows}
    except ValueError as error:
        form = "rows `aiimNNN_task_N, value`"
        raise layout_error("avcaffe", path, str(error), form) from error


def _class_of(dimension: str, value: str) -> int:
    if dimension in AFFECT:
        return AFFECT[dimension].index(value)
    if not math.isfinite(load := float(value)):
        raise ValueError(f"{value} is no number")
    return int(load > HIGH_LOAD_ABOVE)
