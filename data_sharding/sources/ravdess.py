"""RAVDESS: 24 actors speak two sentences in eight emotions; six folds by actor.

INPUT is the folder with `Actor_NN`. Labels come from the file names,
`<modality>-<channel>-<emotion>-<intensity>-<statement>-<repetition>-<actor>.mp4`. A performance
with a file with sound (modality 01) and one without (02) is read from the latter; songs are
rejected. https://zenodo.org/records/1188976
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import block_of
from data_sharding.sources.labeled import labeled_by_path

CLASSES = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")  # 01 - 08
ACTORS_PER_FOLD = (4,) * 6  # in order of number
SPEECH, WITHOUT_SOUND = "01", "02"
_CLIP = re.compile(r"(?:.*/)?Actor_\d\d/(?:01|02)-((0[12])-(0[1-8])-0[12]-0[12]-0[12]-(\d\d))\.mp4")


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: `VC-EE-II-SS-RR-AA`, the file's name without its modality."""
    return labeled_by_path(
        "ravdess", folder, _parse, lambda path: os.path.basename(path).startswith(WITHOUT_SOUND)
    )


def _parse(path: str) -> tuple[str, Labels] | str:
    found = _CLIP.fullmatch(path)
    if not found:
        return ""
    name, channel, emotion, actor = found.groups()
    if channel != SPEECH:
        return "song, not speech"
    fold = block_of(int(actor) - 1, ACTORS_PER_FOLD)
    if fold is None:
        return f"actor {actor} is in no fold"
    number = int(emotion) - 1
    return name, Labels(
        set="ravdess", subject=actor, class_index=number, class_name=CLASSES[number], fold=fold
    )
