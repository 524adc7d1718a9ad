"""CREMA-D: 91 actors speak twelve sentences in six emotions; five folds by actor.

INPUT is the folder with `VideoFlash`, or `VideoFlash` itself. Labels come from the file names.
https://github.com/CheyneyComputerScience/CREMA-D
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import block_of
from data_sharding.sources.labeled import labeled_by_path
from svfap_dist.video.names import suffix_of

CODES = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
CLASSES = ("anger", "disgust", "fear", "happy", "neutral", "sad")
FIRST_ACTOR = 1001
ACTORS_PER_FOLD = (18, 18, 18, 18, 19)
BROKEN = {"1076_MTI_NEU_XX", "1076_MTI_SAD_XX", "1064_TIE_SAD_XX", "1064_IEO_DIS_MD"}
_CLIP = re.compile(rf"(?:.*/)?((\d{{4}})_[A-Z]{{3}}_({'|'.join(CODES)})_[A-Z]{{2}})\.\w+")


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: `1001_DFA_ANG_XX`. The four broken clips are misfits."""
    return labeled_by_path(
        "cremad", folder, _parse, preferred=lambda path: suffix_of(path) == "flv"
    )


def _parse(path: str) -> tuple[str, Labels] | str:
    found = _CLIP.fullmatch(path)
    if not found:
        return ""
    name, actor, emotion = found.groups()
    if name in BROKEN:
        return "known to be broken"
    fold = block_of(int(actor) - FIRST_ACTOR, ACTORS_PER_FOLD)
    if fold is None:
        return f"actor {actor} is in no fold"
    return name, Labels(
        set="cremad",
        subject=actor,
        class_index=(number := CODES.index(emotion)),
        class_name=CLASSES[number],
        fold=fold,
    )
