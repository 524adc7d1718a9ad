"""Reading a data set back: is every byte what the manifest says?

Each shard is fetched whole to local disk and checked three times over: its digest against the
manifest, each sample's digest and members against the index, and webdataset, as an outsider, must
find the same keys in the same order. All damage is collected before anything is said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator

from data_sharding.progress import Progress, silent
from svfap_dist import shard_format, storage
from svfap_dist.errors import ShardError
from svfap_dist.shard_format import VIDEO_SUFFIXES, ShardEntry, ShardIndex, load_info

_SHOWN = 5  # damages told in the message


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was read and found right."""

    url: str
    num_shards: int
    num_samples: int
    num_bytes: int
    fingerprint: str

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.url}: every byte is what the manifest says",
            f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes} bytes, "
            f"fingerprint {self.fingerprint}",
        ]


def verify(url: str, progress: Progress = silent) -> Verified:
    """Read every shard of a data set and check it; progress counts shards, and damaged ones.

    Raises: ShardError naming what is damaged; StorageError from the store.
    """
    manifest = shard_format.load_manifest(url)
    damages: list[str] = []
    seen: set[str] = set()
    damaged_shards = 0
    for done, entry in enumerate(manifest.shards):
        progress(done, len(manifest.shards), damaged_shards)
        found = list(_damages(url, entry, seen))
        damages += [f"{entry.name}: {damage}" for damage in found]
        damaged_shards += bool(found)
    progress(len(manifest.shards), len(manifest.shards), damaged_shards)
    if damages:
        more = f"; and {len(damages) - _SHOWN} more" if len(damages) > _SHOWN else ""
        raise ShardError(
            f"{damaged_shards} of {len(manifest.shards)} shards are damaged",
            where=url,
            found="; ".join(damages[:_SHOWN]) + more,
            do="copy them again from where the data set was made, or shard the videos again",
        )
    num_bytes = sum(entry.num_bytes for entry in manifest.shards)
    return Verified(
        url, len(manifest.shards), manifest.num_samples, num_bytes, manifest.fingerprint
    )


def _damages(url: str, entry: ShardEntry, seen: set[str]) -> Iterator[str]:
    """What is wrong with one shard; adds its keys to those seen in the shards before."""
    try:
        index = shard_format.load_index(url, entry)
    except ShardError as error:
        yield f"{error.what} ({error.found})"
        return
    if len(index.keys) != entry.num_samples:
        yield f"{len(index.keys)} samples in the index, {entry.num_samples} in the manifest"
    if repeated := seen.intersection(index.keys):
        yield f"key {min(repeated)!r} is in another shard too"
    seen.update(index.keys)
    with tempfile.TemporaryDirectory(prefix="svfap-verify-") as folder:
        path = os.path.join(folder, entry.name)
        try:
            storage.download_file(storage.join(url, entry.name), path)
        except storage.StorageMissing:
            yield "missing"
            return
        with open(path, "rb") as tar:
            sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
        broken = [key for key, ok in _samples_in(path, index) if not ok]
        if broken:
            yield f"{len(broken)} samples damaged, the first {broken[0]!r}"
        if sha256 != entry.sha256:
            size = os.path.getsize(path)
            yield f"other content than when it was made ({size} of {entry.num_bytes} bytes)"
        elif _keys_for_webdataset(path) != index.keys:
            yield "webdataset finds other samples than the index names"


def _samples_in(path: str, index: ShardIndex) -> Iterator[tuple[str, bool]]:
    """Each key of the index, and whether its bytes are what the index says."""
    rows = zip(*dataclasses.astuple(index), strict=True)
    with open(path, "rb") as tar:
        for key, offset, size, digest, num_frames in rows:
            tar.seek(offset)
            content = tar.read(size)
            same = shard_format.digest(content) == digest
            yield key, same and _holds_video(content, key, num_frames)


def _holds_video(content: bytes, key: str, num_frames: int) -> bool:
    members = read_members(content)
    names = {f"{key}.json", *(f"{key}.{suffix}" for suffix in VIDEO_SUFFIXES)}
    if len(members) != 2 or not members.keys() <= names:
        return False
    return load_info(members[f"{key}.json"]).num_frames == num_frames


def read_members(content: bytes) -> dict[str, bytes]:
    """The members of a sample by name, from its bytes alone; of a cut sample, those still whole."""
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            data = file.read() if file else b""
            if len(data) == member.size:
                members[member.name] = data
    return members


def _keys_for_webdataset(path: str) -> tuple[str, ...]:
    from webdataset.compat import WebDataset  # imports torch where it is installed

    return tuple(sample["__key__"] for sample in WebDataset([path], shardshuffle=False))
