"""Data sets for measurements: a few rendered clips, repeated as often as needed.

Rendering takes a second or more per clip, so few are rendered, and samples are packed again under
new keys until the set is as large as wanted. Loaders and caches cannot know that two samples have
equal bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from svfap_dist import storage
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.reader import Sample, SampleReader
from svfap_dist.video.info import separate_files

_CLIPS = "clips=4,frames=200,size=224"  # as videos of VoxCeleb2 are
_SHARD_SAMPLES = 256


@dataclasses.dataclass(frozen=True)
class ClipSet:
    """The same clips in shards of both profiles."""

    train: str  # URL
    source: str


def render(folder: str, samples: int = 256) -> ClipSet:
    """Write shards of rendered faces.

    Args:
        folder: local; shards are written below it.
        samples: of the profile `train`; a quarter of them of `source`, whose readers are slower.
    """
    from data_sharding import pipeline as sharding
    from data_sharding.transcode import TrainProfile

    once = [os.path.join(folder, name) for name in ("rendered", "files", "transcoded")]
    sharding.shard("synthetic", _CLIPS, once[0])
    write_files(once[0], once[1])
    sharding.shard(
        "folder", once[1], once[2], profile="train", train=TrainProfile(region="voxceleb2")
    )
    urls = [os.path.join(folder, profile) for profile in ("train", "source")]
    repeat(once[2], urls[0], samples)
    repeat(once[0], urls[1], -(-samples // 4))
    return ClipSet(*urls)


def write_files(url: str, folder: str) -> None:
    """Write the videos of a data set as files, as public data sets have them.

    Args:
        url: of the shards.
        folder: local, which must not exist.
    """
    os.makedirs(folder)
    for sample in _samples(url):
        Path(folder, f"{sample.index:06d}.mp4").write_bytes(sample.video)


def repeat(url: str, target: str, samples: int) -> None:
    """Write a data set that has another one's samples again and again, under new keys.

    Args:
        url: of the shards to repeat.
        target: folder or prefix of the new ones.
        samples: of the new set.
    """
    from data_sharding import make_sample, pack

    manifest = shard_format.load_manifest(url)
    copies = (
        make_sample.Sample(f"{number:07d}", "mp4", tuple(separate_files(sample.video, sample.info)))
        for number, sample in enumerate(itertools.cycle(list(_samples(url))))
    )
    entries = []
    for start in range(0, samples, _SHARD_SAMPLES):
        some = itertools.islice(copies, min(_SHARD_SAMPLES, samples - start))
        entries.append(pack.pack(some, target, f"shard-{len(entries):06d}", manifest.num_parts))
    shards = tuple(entry for entry in entries if entry)
    repeated = dataclasses.replace(manifest, shards=shards, num_groups=len(shards))
    name = storage.join(target, shard_format.MANIFEST_NAME)
    storage.write_bytes(name, shard_format.dump(repeated))


def _samples(url: str) -> Iterator[Sample]:
    manifest = shard_format.load_manifest(url)
    reader = SampleReader(url, manifest)
    for index in range(manifest.num_samples):
        if isinstance(sample := reader.read(index), Sample):
            yield sample
