"""The shard format, which `data_sharding` writes and training reads.

A data set is a folder (URL) of

    shard-000000.tar         plain WebDataset tar; a sample's members, `KEY.json` and
                             `KEY.mp4` (or another of `video.info.VIDEO_SUFFIXES`), are contiguous
    shard-000000.index.json  byte ranges of each sample in the tar (`ShardIndex`); after its tar
    shard-000000.done.json   what the shard was made from; after both
    manifest.json            the list of shards (`Manifest`); written last: "complete"
    rejected.jsonl           videos that were left out, and why

Where the frames of a video are stored phase by phase (`PhaseLayout`), a tar may be divided into
sections, one per phase (format version 2). Section p has `KEY+p.json` and `KEY+p.mp4` of every
sample: frames p, P + p, 2P + p, ... as a video of their own. A window of stride P then needs one
of P parts of a sample, which is next to the same part of the next sample. Any reader of tars sees
P times as many ordinary samples. Version 1 has all of a sample in one place, its only part.

The manifest stays small (one row per shard) however many clips there are; a rank reads only the
indexes of the shards it is about to use. Digests tie the three together: the manifest pins every
tar and index, the index pins every sample, and the manifest's fingerprint pins the order of samples
of a run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any

from svfap_dist import json_text, storage
from svfap_dist.errors import ShardError
from svfap_dist.video.info import (
    VIDEO_SUFFIXES,
    VideoInfo,
    joined_info,
    load_info,
    region_name,
)

FORMAT_VERSIONS = (1, 2)  # 2: the parts of a sample are in sections of the tar
KINDS = ("videos", "images")  # of samples; an image is a video of one frame, see `data.clips`
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
_TAR_NAME = re.compile(r"[\w.-]+\.tar")


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard: parallel tuples, those of `keys` in tar order.

    A part of a sample is the byte range [offset, offset + size) of the tar: headers, contents and
    padding of its members. Ranges are in tar order: part 0 of all samples, part 1, ... A sample of
    fewer frames than there are phases has empty parts.
    """

    keys: tuple[str, ...]
    offsets: tuple[int, ...]  # [parts x samples]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]  # see `digest`
    num_frames: tuple[int, ...]  # [samples]
    labels: tuple[dict[str, Any], ...] = ()  # of labeled sets: folds are selected without tars

    @property
    def num_parts(self) -> int:
        """Number of parts of a sample."""
        return len(self.offsets) // max(len(self.keys), 1)

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """Return offset and size of the parts of a sample that are not empty.

        Args:
            row: Of the sample.
        """
        rows = range(row, len(self.offsets), len(self.keys))
        return [(self.offsets[i], self.sizes[i]) for i in rows if self.sizes[i]]


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
    kind: str = KINDS[0]  # of all samples

    @property
    def region(self) -> str:
        """Stored part of the frames, one of `REGIONS`; "" for profile source (whole frames)."""
        train = self.options.get("train")
        return region_name(train.get("region", "")) if isinstance(train, dict) else ""

    @property
    def shards_of_sources(self) -> tuple[int, ...]:
        """Number of shards of each data set: of one, if this is no mixture."""
        return (len(self.shards),)

    @property
    def kinds_of_sources(self) -> tuple[str, ...]:
        """Kind of the samples of each data set."""
        return (self.kind,)

    @functools.cached_property
    def samples_of_sources(self) -> tuple[int, ...]:
        """Number of samples of each data set."""
        left = iter(self.shards)
        return tuple(
            sum(shard.num_samples for shard in itertools.islice(left, count))
            for count in self.shards_of_sources
        )

    @functools.cached_property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @functools.cached_property
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
        if value.kind == KINDS[0]:  # as in manifests that are older than this field
            del fields["kind"]
        version = _version_of(value)
        fields = {"format_version": version, "fingerprint": value.fingerprint, **fields}
    return (json.dumps(fields, indent=1 if isinstance(value, Manifest) else None) + "\n").encode()


def _version_of(manifest: Manifest) -> int:
    """Return the lowest version that has what a data set needs: older readers refuse others."""
    return FORMAT_VERSIONS[manifest.num_parts > 1]


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
        fields = json_text.loads(raw)
        version, fingerprint = fields.pop("format_version"), fields.pop("fingerprint")
        shards = tuple(ShardEntry(**row) for row in fields.pop("shards"))
        manifest = Manifest(**fields, shards=shards)
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError("Unreadable manifest", where, repr(error), do) from error
    if version != _version_of(manifest) or fingerprint != manifest.fingerprint:
        found = f"version {version}, fingerprint {fingerprint} for {manifest.fingerprint}"
        raise ShardError("Manifest was altered or is of another version", where, found, do)
    return manifest


def load_index(url: str, entry: ShardEntry) -> ShardIndex:
    """Read the index of one shard and check it against the manifest.

    Args:
        url: Folder or prefix of the data set.
        entry: The shard.

    Raises:
        ShardError, StorageError: The index is missing or malformed, or its digest is not the
            manifest's.
    """
    where = storage.join(url, entry.index_name)
    do = "manifest and shards come from different runs: shard the videos again to a new URL"
    try:
        raw = storage.read_bytes(where)
    except storage.StorageMissingError as error:
        raise ShardError("Shard index is missing", where, "no such file", do) from error
    if hashlib.sha256(raw).hexdigest() != entry.index_sha256:
        raise ShardError("Shard index does not match the manifest", where, "another digest", do)
    try:
        index = ShardIndex(**{k: tuple(values) for k, values in json_text.loads(raw).items()})
        _check_index(index)
    except (ValueError, TypeError, AttributeError) as error:
        do = "shard the videos again"
        raise ShardError("Unreadable shard index", where, repr(error), do) from error
    return index


def _check_manifest(manifest: Manifest) -> None:
    json_text.check_types(manifest)
    if manifest.num_parts < 1:
        raise ValueError(f"num_parts = {manifest.num_parts}")
    if manifest.kind not in KINDS:
        raise ValueError(f"kind {manifest.kind!r}, not one of {', '.join(KINDS)}")
    for entry in manifest.shards:
        if not _TAR_NAME.fullmatch(entry.name):  # a path would lead out of the data set
            raise ValueError(f"shard name {entry.name!r}")
        if entry.num_samples < 0 or entry.num_bytes < 0:
            raise ValueError(f"{entry.name} has {entry.num_samples} samples")


def _check_index(index: ShardIndex) -> None:
    json_text.check_types(index)
    samples, parts = len(index.keys), len(index.offsets)
    if not (len(index.num_frames) == samples and len(index.labels) in (0, samples)):
        raise ValueError(f"{samples} keys and another number of num_frames or labels")
    if not len(index.sizes) == len(index.digests) == parts or parts % max(samples, 1):
        raise ValueError(f"{samples} keys, {parts} offsets and another number of sizes or digests")
    if min((*index.offsets, *index.sizes, *index.num_frames), default=0) < 0:
        raise ValueError("a negative offset, size or number of frames")


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
        _check_size(url, entry, sizes.get(entry.name))


def check_shard(url: str, entry: ShardEntry) -> None:
    """Check that one shard exists at its full size: one look-up.

    Args:
        url: Folder or prefix of the data set.
        entry: The shard.

    Raises:
        ShardError, StorageError: It is missing or of another size.
    """
    _check_size(url, entry, storage.file_size(storage.join(url, entry.name)))


def _check_size(url: str, entry: ShardEntry, size: int | None) -> None:
    if size == entry.num_bytes:
        return
    what, found = "Shard is missing", "no such file"
    if size is not None:
        what = "Shard was cut short" if size < entry.num_bytes else "Shard grew"
        found = f"{size} bytes where the manifest says {entry.num_bytes}"
    do = "copy the shard again from where the data set was made, or shard the videos again"
    raise ShardError(what, storage.join(url, entry.name), found, do)


@dataclasses.dataclass(frozen=True)
class PackedSample:
    """Some or all parts of a sample, byte for byte as they were packed in the tar."""

    index: int
    key: str
    where: str  # shard and row, for messages
    data: bytes


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video as it is stored in a shard, or some of its phases."""

    index: int
    key: str
    video: bytes  # a file, or those of several phases, one after another: see `info.layout`
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
        packed: The bytes of its members, of one part or several.
    """
    try:
        files: list[bytes] = []
        infos: list[VideoInfo] = []
        for _, members in iter_samples(packed.data):
            (video,) = (members[suffix] for suffix in VIDEO_SUFFIXES if suffix in members)
            files.append(video)
            infos.append(load_info(members["json"], video))
        info = infos[0] if len(infos) == 1 else joined_info(infos, [len(file) for file in files])
        return Sample(packed.index, packed.key, b"".join(files), info)
    except (LookupError, TypeError, ValueError, tarfile.ReadError) as error:
        detail = f"{packed.where}: no readable video and .json ({error!r})"
        return BadSample(packed.index, packed.key, "malformed", detail)


def part_key(key: str, part: int, num_parts: int) -> str:
    """Return the key that members of a part have in the tar.

    Args:
        key: Of the sample.
        part: Number of the part.
        num_parts: Of each sample.
    """
    return key if num_parts == 1 else f"{key}+{part}"


def iter_samples(data: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of the samples of a tar, as webdataset groups them.

    Args:
        data: Consecutive members of a tar. Up to its first dot, the last part of a member's name is
            of the key; what follows the dot names the content.

    Raises:
        tarfile.ReadError: They are not.
    """

    def split(member: tuple[str, bytes]) -> tuple[str, str]:
        folder, slash, name = member[0].rpartition("/")
        stem, _, suffix = name.partition(".")
        return folder + slash + stem, suffix.lower()

    for key, members in itertools.groupby(iter_members(data), lambda member: split(member)[0]):
        named: dict[str, bytes] = {}
        for member in members:
            suffix = split(member)[1]
            if suffix in named:
                raise tarfile.ReadError(f"two members {suffix} of sample {key!r}")
            named[suffix] = member[1]
        yield key, named


def iter_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each member of a tar; those before a cut are whole.

    Plain headers are read here: `tarfile` takes a tenth of the time that decoding a clip takes, and
    webdataset would import torch in every decode worker. From any other header on, as of a long
    name, it is `tarfile` that reads.

    Args:
        data: Consecutive members of a tar.

    Raises:
        tarfile.ReadError: Where the data are cut short or damaged.
    """
    begin = 0
    while begin < len(data):
        header = data[begin : begin + tarfile.BLOCKSIZE]
        is_plain = header[156:157] == tarfile.REGTYPE and header[257:262] == b"ustar"
        octal = header[124:136].rstrip(b"\0 ")
        if not (is_plain and octal.isdigit() and len(header) == tarfile.BLOCKSIZE):
            yield from _iter_by_tarfile(data[begin:])
            return
        start, size = begin + tarfile.BLOCKSIZE, int(octal, 8)
        content = data[start : start + size]
        if len(content) < size:
            raise tarfile.ReadError("unexpected end of data")
        folder, name = header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")
        yield (folder + b"/" * bool(folder) + name).decode("utf-8", "surrogateescape"), content
        begin = start + size + -size % tarfile.BLOCKSIZE
    if begin != len(data) or not data:
        raise tarfile.ReadError("unexpected end of data")


def _iter_by_tarfile(data: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                # Before anything is read: a sparse file of a few bytes may have any size.
                if member.issparse() or not 0 <= member.size <= len(data):
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
                if member.isreg() and (file := tar.extractfile(member)) is not None:
                    content = file.read()
                    if len(content) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield member.name, content
                elif not member.isdir():
                    raise tarfile.ReadError(f"{member.name!r} is neither a file nor a folder")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, tarfile.ReadError):
            raise
        raise tarfile.ReadError(repr(error)) from error
