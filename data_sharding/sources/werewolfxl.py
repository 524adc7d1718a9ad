"""Werewolf-XL: speakers in 30 sessions of a game, rated for valence, arousal and dominance.

INPUT holds the speakers' clips, `SS_PP_N.mp4` (session, player's number in it, number of the
utterance), in any folders, and one table of labels. The folds are six sessions each, in order, as
in published lists. A player's number identifies a person within one session only: a person who
played in several sessions has several subjects here, and may be in several folds.
https://github.com/Xinda-Wu/Werewolf-XL-Baseline
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import block_of
from data_sharding.sources.labeled import add_clip, join_labels, layout_error, read_rows
from data_sharding.sources.listing import list_videos, video_file
from svfap_dist.errors import ShardError

TABLE = "labels.csv"  # its name is from publications: rename yours
NAME_COLUMN = "VideoName"
VALUE_COLUMNS = {  # valence is called pleasure
    "valence": "Pleasure_average",
    "arousal": "Arousal_average",
    "dominance": "Dominance_average",
}
SESSIONS_PER_FOLD = (6,) * 5
_CLIP = re.compile(r"((\d\d)_\d\d)_\d+")


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the clip's name, `SS_PP_N`."""
    clips: dict[str, SourceVideo] = {}
    for path, size in list_videos(folder):
        name = os.path.splitext(os.path.basename(path))[0]
        add_clip(clips, name, path, video_file(folder, path, size))
    return join_labels("werewolfxl", folder, clips, dict(_labels(folder)))


def _labels(folder: str) -> Iterator[tuple[str, Labels]]:
    header, *rows = read_rows("werewolfxl", folder, TABLE, ",") or [[]]
    needed = [NAME_COLUMN, *VALUE_COLUMNS.values()]
    if missing := set(needed) - set(header):
        found = f"no column {', '.join(sorted(missing))} among {', '.join(header)}"
        raise layout_error("werewolfxl", TABLE, found)
    for row in rows:
        name, *values = (dict(zip(header, row, strict=False)).get(column, "") for column in needed)
        clip = _CLIP.fullmatch(name)
        fold = block_of(int(clip[2]) - 1, SESSIONS_PER_FOLD) if clip else None
        if clip is None or fold is None:
            raise _bad_row(row)
        try:
            numbers = dict(zip(VALUE_COLUMNS, map(float, values), strict=True))
        except ValueError:
            raise _bad_row(row) from None
        if not all(map(math.isfinite, numbers.values())):
            raise _bad_row(row)
        yield name, Labels(set="werewolfxl", subject=clip[1], values=numbers, fold=fold)


def _bad_row(row: list[str]) -> ShardError:
    form = f"{TABLE} with names SS_PP_N of sessions 01 to 30 and numbers"
    return layout_error("werewolfxl", TABLE, f"the row {','.join(row)}", form)
