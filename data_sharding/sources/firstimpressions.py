"""ChaLearn First Impressions V2: 10,000 clips of vlogs, rated for five personality traits.

INPUT holds, in any folders below it, the unpacked videos (`<YouTube id>.NNN.mp4`) and the three
annotation files, pickles of {trait: {video: value from 0 to 1}} in latin-1. Unpickling can run
any code; here it may only build dicts, strings and numbers.
https://chalearnlap.cvc.uab.cat/dataset/24/description/
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.folds import fixed_splits
from data_sharding.sources.labeled import add_clip, join_labels, layout_error
from data_sharding.sources.listing import check_folder, video_file
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.video.names import is_video

TRAITS = ("extraversion", "neuroticism", "agreeableness", "conscientiousness", "openness")
ANNOTATIONS = {
    "train": "annotation_training.pkl",
    "val": "annotation_validation.pkl",
    "test": "annotation_test.pkl",
}
# What numpy's scalars are made of; floats, strings and dicts need no name.
_ALLOWED = {
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


class _NumbersOnly(pickle.Unpickler):
    """Builds dicts, strings, numbers and numpy's scalars, and nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in _ALLOWED:
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"it loads {module_name}.{global_name}")


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: `<YouTube id>_NNN`."""
    check_folder(folder)
    clips: dict[str, SourceVideo] = {}
    annotations: dict[str, str] = {}
    for path, size in storage.list_files(folder).items():
        name = os.path.basename(path)
        if name in ANNOTATIONS.values():
            annotations.setdefault(name, storage.join(folder, path))
        elif is_video(path):
            add_clip(clips, _sample(name), path, video_file(folder, path, size))
    if missing := sorted(set(ANNOTATIONS.values()) - annotations.keys()):
        raise layout_error("firstimpressions", folder, f"no {', '.join(missing)}")
    values = {split: _read(annotations[name]) for split, name in ANNOTATIONS.items()}
    lists = {split: [(name, "") for name in rated] for split, rated in values.items()}
    labels = {
        name: Labels(set="firstimpressions", values=values[split][name], split=split)
        for name, _, split in fixed_splits(folder, lists)
    }
    return join_labels("firstimpressions", folder, clips, labels)


def _sample(video: str) -> str:
    """Return `<YouTube id>_NNN`, the name that `svfap faces` gives the crop of a video."""
    return video.removesuffix(".mp4").replace(".", "_")


def _read(url: str) -> dict[str, dict[str, float]]:
    """Return the values of the five traits by video, from one annotation file."""
    try:
        content = _NumbersOnly(io.BytesIO(storage.read_bytes(url)), encoding="latin-1").load()
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, storage.StorageError):
            raise
        found, fix = str(error) or type(error).__name__, "get it from the challenge's site again"
        raise ShardError("Annotation file cannot be trusted or read", url, found, fix) from error
    try:
        return _by_video(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        form = "pickles of {trait: {video: value from 0 to 1}}"
        raise layout_error("firstimpressions", url, repr(error), form) from error


def _by_video(content: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    traits = {trait: content[trait] for trait in TRAITS}
    videos = traits[TRAITS[0]].keys()
    for trait, values in traits.items():
        if values.keys() != videos:
            raise ValueError(f"{trait} is given for other videos than {TRAITS[0]}")
        if strange := [name for name, value in values.items() if not 0 <= value <= 1]:
            raise ValueError(f"{trait} of {strange[0]} is {values[strange[0]]}")
    return {
        _sample(name): {trait: float(traits[trait][name]) for trait in TRAITS} for name in videos
    }
