"""The shard format: what the data engineer's side writes and the training side reads.

A data set is a folder (URL) of

    shard-000000.tar         plain WebDataset tar; a sample's members, `KEY.json` and
                             `KEY.mp4` (or another of `video.info.VIDEO_SUFFIXES`), are contiguous
    shard-000000.index.json  where each sample lies in the tar (`ShardIndex`); after its tar
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
import json
from typing import Any

from svfap_dist import storage
from svfap_dist.errors import ShardError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard, in tar order: parallel tuples.

    A sample is the byte range [offset, offset + size) of the tar: headers, contents and padding of
    its members. digest: first 16 hex digits of the SHA-256 of those bytes. labels: of the sets for
    fine-tuning (they name their `set`), so that a fold is selected without reading tars; else ().
    """

    keys: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    num_frames: tuple[int, ...]
    labels: tuple[dict[str, Any], ...] = ()


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

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the order of samples: 16 hex digits."""
        rows = [(shard.name, shard.num_samples, shard.sha256) for shard in self.shards]
        return digest(json.dumps(rows).encode())


def digest(data: bytes | memoryview) -> str:
    """First 16 hex digits of the SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()[:16]


def dump(value: Manifest | ShardIndex) -> bytes:
    """JSON bytes of a manifest or index; equal values give equal bytes."""
    fields = dataclasses.asdict(value)
    if isinstance(value, Manifest):
        fields = {"format_version": FORMAT_VERSION, "fingerprint": value.fingerprint, **fields}
    return (json.dumps(fields, indent=1 if isinstance(value, Manifest) else None) + "\n").encode()


def load_manifest(url: str) -> Manifest:
    """Read a data set's manifest.

    Raises: ShardError if there is none, or it is damaged or of another version; StorageError from
    the store.
    """
    where = storage.join(url, MANIFEST_NAME)
    try:
        raw = storage.read_bytes(where)
    except storage.StorageMissingError as error:
        advice = "make the shards with `svfap shard`; it writes the manifest last, so let it finish"
        raise ShardError("No manifest", where=where, found="no such file", do=advice) from error
    try:
        fields = json.loads(raw)
        version, fingerprint = fields.pop("format_version"), fields.pop("fingerprint")
        manifest = Manifest(
            **{**fields, "shards": tuple(ShardEntry(**row) for row in fields["shards"])}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            "Unreadable manifest", where=where, found=repr(error), do="shard the videos again"
        ) from error
    if version != FORMAT_VERSION or fingerprint != manifest.fingerprint:
        found = f"version {version}, fingerprint {fingerprint} for {manifest.fingerprint}"
        raise ShardError(
            "Manifest was altered or is of another version",
            where=where,
            found=found,
            do="shard the videos again",
        )
    return manifest


def load_index(url: str, entry: ShardEntry) -> ShardIndex:
    """Read the index of one shard and check it against the manifest.

    Raises: ShardError if it is missing, damaged or not the one the manifest names.
    """
    where = storage.join(url, entry.index_name)
    advice = (
        "the manifest and the shards are not of one making: shard the videos again to a new URL"
    )
    try:
        raw = storage.read_bytes(where)
    except storage.StorageMissingError as error:
        raise ShardError(
            "Shard index is missing", where=where, found="no such file", do=advice
        ) from error
    if hashlib.sha256(raw).hexdigest() != entry.index_sha256:
        raise ShardError(
            "Shard index does not fit the manifest", where=where, found="another digest", do=advice
        )
    return ShardIndex(**{name: tuple(values) for name, values in json.loads(raw).items()})


def check_shards(url: str, manifest: Manifest) -> None:
    """Check that every shard of the manifest is there at its full size: one listing, no reading.

    Raises: ShardError naming the first shard that is missing or of another size.
    """
    sizes = storage.list_files(url)
    for entry in manifest.shards:
        found = sizes.get(entry.name)
        if found == entry.num_bytes:
            continue
        what = (
            "Shard is missing"
            if found is None
            else "Shard was cut short"
            if found < entry.num_bytes
            else "Shard grew"
        )
        seen = (
            "no such file"
            if found is None
            else f"{found} bytes where the manifest says {entry.num_bytes}"
        )
        advice = "copy the shard again from where the data set was made, or shard the videos again"
        raise ShardError(what, where=storage.join(url, entry.name), found=seen, do=advice)
