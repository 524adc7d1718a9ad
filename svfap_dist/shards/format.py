"""The shard format, which `data_sharding` writes and training reads.

A data set is a folder (URL) of

    shard-000000.tar         plain WebDataset tar; a sample's members, `KEY.json` and
                             `KEY.mp4` (or another of `video.info.VIDEO_SUFFIXES`), are contiguous
    shard-000000.index.json  byte range of each sample in the tar (`ShardIndex`); after its tar
    shard-000000.done.json   what the shard was made from; after both
    manifest.json            the list of shards (`Manifest`); written last: "complete"
    rejected.jsonl           videos that were left out, and why

The manifest stays small (one row per shard) however many clips there are; a rank reads only the
indexes of the shards it is about to use. Digests tie the three together: the manifest pins every
tar and index, the index pins every sample, and the manifest's fingerprint pins the order of samples
of a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.video.info import VIDEO_SUFFIXES, VideoInfo, load_info

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard, in tar order: parallel tuples.

    A sample is the byte range [offset, offset + size) of the tar: headers, contents and padding of
    its members.
    """

    keys: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]  # see `digest`
    num_frames: tuple[int, ...]
    labels: tuple[dict[str, Any], ...] = ()  # of labeled sets: folds are selected without tars


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One row of the manifest: a tar and its index."""

    name: str  # "shard-000000.tar"
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """Name of the shard's index."""
        return self.name.removesuffix(".tar") + ".index.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All shards of a data set, in name order."""

    source: str  # name of the source layout: folder, voxceleb2, ...
    profile: str  # "source": video bytes as they came; "train": `PhaseLayout`
    shuffle_seed: int
    min_frames: int  # frames of the shortest sample
    inputs_digest: str  # digest of the inputs and options it was made from
    shards: tuple[ShardEntry, ...]
    num_groups: int = 0  # shards planned; of those without one usable video there is no entry
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # it was made with
    num_parts: int = 1  # of a sample, each with one phase of its frames; 1: all in one place

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the order of samples: 16 hex digits."""
        rows = [(shard.name, shard.num_samples, shard.sha256) for shard in self.shards]
        return digest(json.dumps(rows).encode())


def digest(data: bytes | memoryview) -> str:
    """Return the first 16 hex digits of a SHA-256.

    Args:
        data: What to digest.
    """
    return hashlib.sha256(data).hexdigest()[:16]


def dump(value: Manifest | ShardIndex) -> bytes:
    """Return the JSON of a manifest or index; equal values give equal bytes.

    Args:
        value: What to write.
    """
    fields = dataclasses.asdict(value)
    if isinstance(value, Manifest):
        if value.num_parts == 1:
            del fields["num_parts"]
        fields = {"format_version": FORMAT_VERSION, "fingerprint": value.fingerprint, **fields}
    return (json.dumps(fields, indent=1 if isinstance(value, Manifest) else None) + "\n").encode()


def load_manifest(url: str) -> Manifest:
    """Read the manifest of a data set.

    Args:
        url: Folder or prefix of the data set.

    Raises:
        ShardError, StorageError: There is none, or it is damaged or of another version.
    """
    where = storage.join(url, MANIFEST_NAME)
    try:
        raw = storage.read_bytes(where)
    except storage.StorageMissingError as error:
        do = "make the shards with `svfap shard`; it writes the manifest last, so let it finish"
        raise ShardError("No manifest", where, "no such file", do) from error
    do = "shard the videos again"
    try:
        fields = json.loads(raw)
        version, fingerprint = fields.pop("format_version"), fields.pop("fingerprint")
        shards = tuple(ShardEntry(**row) for row in fields.pop("shards"))
        manifest = Manifest(**fields, shards=shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError("Unreadable manifest", where, repr(error), do) from error
    if version != FORMAT_VERSION or fingerprint != manifest.fingerprint:
        found = f"version {version}, fingerprint {fingerprint} for {manifest.fingerprint}"
        raise ShardError("Manifest was altered or is of another version", where, found, do)
    return manifest


def load_index(url: str, entry: ShardEntry) -> ShardIndex:
    """Read the index of one shard and check it against the manifest.

    Args:
        url: Folder or prefix of the data set.
        entry: The shard.

    Raises:
        ShardError, StorageError: The index is missing or its digest is not the manifest's.
    """
    where = storage.join(url, entry.index_name)
    do = "manifest and shards come from different runs: shard the videos again to a new URL"
    try:
        raw = storage.read_bytes(where)
    except storage.StorageMissingError as error:
        raise ShardError("Shard index is missing", where, "no such file", do) from error
    if hashlib.sha256(raw).hexdigest() != entry.index_sha256:
        raise ShardError("Shard index does not match the manifest", where, "another digest", do)
    return ShardIndex(**{name: tuple(values) for name, values in json.loads(raw).items()})


def check_shards(url: str, manifest: Manifest) -> None:
    """Check that every shard of a manifest exists at its full size: one listing, no reading.

    Args:
        url: Folder or prefix of the data set.
        manifest: The data set.

    Raises:
        ShardError, StorageError: A shard is missing or of another size; it names the first one.
    """
    sizes = storage.list_files(url)
    for entry in manifest.shards:
        size = sizes.get(entry.name)
        if size == entry.num_bytes:
            continue
        what, found = "Shard is missing", "no such file"
        if size is not None:
            what = "Shard was cut short" if size < entry.num_bytes else "Shard grew"
            found = f"{size} bytes where the manifest says {entry.num_bytes}"
        do = "copy the shard again from where the data set was made, or shard the videos again"
        raise ShardError(what, storage.join(url, entry.name), found, do)


@dataclasses.dataclass(frozen=True)
class PackedSample:
    """A sample's part of a tar, byte for byte as it was packed."""

    index: int
    key: str
    where: str  # shard and row, for messages
    data: bytes


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video as it is stored in a shard."""

    index: int
    key: str
    video: bytes
    info: VideoInfo


@dataclasses.dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, and why."""

    index: int
    key: str
    reason: str  # one word of a short list, for counting: damaged, undecodable, too_short, ...
    detail: str


def unpack(packed: PackedSample) -> Sample | BadSample:
    """Return the video of a sample and what the shard says about it.

    Args:
        packed: The sample's part of a tar.
    """
    try:
        members = tar_members(packed.data)
        info = load_info(members["json"])
        (video,) = (members[suffix] for suffix in VIDEO_SUFFIXES if suffix in members)
        return Sample(packed.index, packed.key, video, info)
    except (KeyError, TypeError, ValueError, tarfile.ReadError) as error:
        detail = f"{packed.where}: no readable video and .json ({error!r})"
        return BadSample(packed.index, packed.key, "malformed", detail)


def tar_members(data: bytes) -> dict[str, bytes]:
    """Return the contents of a sample's members by suffix: all after the first dot, as webdataset.

    Args:
        data: Consecutive members of a tar.

    Raises:
        tarfile.ReadError: They are not.
    """
    return {
        name.rpartition("/")[2].partition(".")[2].lower(): content
        for name, content in iter_members(data)
    }


def iter_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each member of a tar; those before a cut are whole.

    webdataset itself would import torch in every decode worker.

    Args:
        data: Consecutive members of a tar.

    Raises:
        tarfile.ReadError: Where the data are cut short or damaged.
    """
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if (file := tar.extractfile(member)) is not None:
                content = file.read()
                if len(content) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member.name, content
