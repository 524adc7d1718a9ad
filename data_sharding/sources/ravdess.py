"""RAVDESS: 24 actors speak two sentences in eight emotions; six folds by actor.

INPUT is the folder with `Actor_NN`; labels are in the file names,
`<modality>-<channel>-<emotion>-<intensity>-<statement>-<repetition>-<actor>.mp4`. Of a performance
that is there with sound (modality 01) and without (02), the file without is taken; songs are left
out. https://zenodo.org/records/1188976
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import block_of
from data_sharding.sources.labelled import labelled_by_path

CLASSES = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")  # 01 - 08
ACTORS_PER_FOLD = (4,) * 6  # in order of number
SPEECH, WITHOUT_SOUND = "01", "02"
_CLIP = re.compile(r"(?:.*/)?Actor_\d\d/(?:01|02)-((0[12])-(0[1-8])-0[12]-0[12]-0[12]-(\d\d))\.mp4")
_LAYOUT = "Actor_NN/MM-VC-EE-II-SS-RR-AA.mp4"


def samples(folder: str) -> Iterator[SourceVideo]:
    """Every spoken performance; key: `VC-EE-II-SS-RR-AA`, the file's name without its modality.

    Raises: ConfigError, ShardError if the folder is not RAVDESS's, StorageError.
    """
    return labelled_by_path("ravdess", folder, _parse, _LAYOUT, preferred=_is_silent)


def _is_silent(path: str) -> bool:
    return os.path.basename(path).startswith(WITHOUT_SOUND)


def _parse(path: str) -> tuple[str, Labels] | str:
    found = _CLIP.fullmatch(path)
    if not found:
        return f"not at {_LAYOUT}"
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
