"""eNTERFACE05: 44 people speak five sentences in six emotions; five folds by person.

INPUT is the folder with `subject N`. Labels come from the folders' names, since the files' names
are not regular (`s_3_fe_5`); crops of `svfap faces` are mp4. Person 23 has no folders of sentences.
Person 6 is incomplete and in no fold.
https://enterface.net/enterface05
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import block_of
from data_sharding.sources.labeled import labeled_by_path

CLASSES = ("anger", "disgust", "fear", "happiness", "sadness", "surprise")
SUBJECTS = [number for number in range(1, 45) if number != 6]
SUBJECTS_PER_FOLD = (9, 9, 9, 9, 7)  # in order of number
_CLIP = re.compile(
    rf"(?:.*/)?(subject[ _](\d+)/({'|'.join(CLASSES)})/(?:sentence[ _]?\d+/)?[^/]+)\.(?:avi|mp4)"
)


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the path from `subject N` on, with `_` for blanks."""
    return labeled_by_path("enterface05", folder, _parse)


def _parse(path: str) -> tuple[str, Labels] | str:
    found = _CLIP.fullmatch(path)
    if not found:
        return ""
    name, subject, emotion = found.groups()
    if int(subject) not in SUBJECTS:
        return f"person {subject} is in no fold"
    return name.replace(" ", "_"), Labels(
        set="enterface05",
        subject=subject,
        class_index=CLASSES.index(emotion),
        class_name=emotion,
        fold=block_of(SUBJECTS.index(int(subject)), SUBJECTS_PER_FOLD),
    )
