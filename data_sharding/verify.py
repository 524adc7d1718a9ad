"""Read a data set back and check every byte against the manifest.

Each shard is downloaded to local disk and checked: its digest against the manifest, the digest of
each sample against the index. Then webdataset, the reference reader of the format, reads it: the
keys must be those of the index, in its order, and each part a video with a JSON member that says
what the index and the video's packets say. The manifest must also be that of the shards' markers:
an older one may fit some of them. All damage is collected before it is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import av
from av.error import FFmpegError

from data_sharding import markers, temporary
from data_sharding.markers import ProgressCallback, silent
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.parallel.processes import ProcessPool, ordered_map
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest, ShardEntry, ShardIndex, part_key
from svfap_dist.video.info import VIDEO_SUFFIXES, VideoInfo, load_info

_SHOWN = 5  # damages in the error
_KEYS = "create table keys (key text primary key) without rowid"


@dataclasses.dataclass(frozen=True)
class Verified:
    """A data set that was read and is undamaged."""

    url: str
    num_shards: int
    num_samples: int
    num_bytes: int
    fingerprint: str

    def lines(self) -> list[str]:
        """Return the lines that the command prints."""
        return [
            f"{self.url}: every byte is what the manifest says",
            f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes} bytes, "
            f"fingerprint {self.fingerprint}",
        ]


def verify(
    url: str, progress: ProgressCallback = silent, *, workers: int | None = None
) -> Verified:
    """Read every shard of a data set and check it.

    Args:
        url: Folder or prefix of the data set.
        progress: Called with the shards done, their number, and the damaged ones.
        workers: Shards checked at a time; None: one per CPU.

    Raises:
        ShardError: Something is damaged; the error says what.
    """
    manifest = shard_format.load_manifest(url)
    damages: list[str] = list(_stale(url, manifest))
    damaged_shards, total = 0, len(manifest.shards)
    progress(0, total, 0)
    db = temporary.database(_KEYS)
    with (
        contextlib.closing(db),
        contextlib.closing(_check_all(url, manifest.shards, workers)) as checked,
    ):
        for done, (entry, (keys, seen)) in enumerate(zip(manifest.shards, checked, strict=True), 1):
            found = [*seen, *_add_keys(db, keys)]
            damages += [f"{entry.name}: {damage}" for damage in found]
            damaged_shards += bool(found)
            progress(done, total, damaged_shards)
    if damages:
        more = f"; and {len(damages) - _SHOWN} more" if len(damages) > _SHOWN else ""
        stale = "Manifest is not that of the shards"
        what = f"{damaged_shards} of {total} shards are damaged" if damaged_shards else stale
        fix = "copy them again from where the data set was made, or shard the videos again"
        raise ShardError(what, url, "; ".join(damages[:_SHOWN]) + more, fix)
    num_bytes = sum(entry.num_bytes for entry in manifest.shards)
    return Verified(url, total, manifest.num_samples, num_bytes, manifest.fingerprint)


def _stale(url: str, manifest: Manifest) -> Iterator[str]:
    """Yield where the manifest differs from the markers of finished shards."""
    named = {entry.name: entry for entry in manifest.shards}
    numbers = {
        number
        for name in storage.list_files(url)
        if (number := markers.shard_number(name)) is not None
    }
    for number in sorted(numbers):
        try:
            entry = markers.load_marker(url, number).entry
        except ShardError as error:
            yield f"{markers.marker_name(number)}: {error.what}"
            continue
        if number >= manifest.num_groups:
            yield f"{markers.marker_name(number)}: not in the manifest: finish that sharding"
        elif entry is not None and named.get(entry.name) != entry:
            yield f"{entry.name}: stale manifest: the shard was made again since"
    if missing := manifest.num_groups - len([n for n in numbers if n < manifest.num_groups]):
        yield f"{missing} shards have no marker"


def _add_keys(db: sqlite3.Connection, keys: Sequence[str]) -> list[str]:
    """Add the keys of a shard to those on disk; return the damage: a key that was there."""
    insert = "insert or ignore into keys values (?)"
    twice = [key for key in keys if not db.execute(insert, [key]).rowcount]
    return [f"key {min(twice)!r} is in another shard too"] if twice else []


def _check_all(
    url: str, entries: Sequence[ShardEntry], workers: int | None
) -> Generator[tuple[Sequence[str], list[str]]]:
    """Yield the keys of each shard, in order, and its damage."""
    check = functools.partial(_check, url)
    cpus = usable_cpus() if workers is None else workers
    processes = min(cpus, len(entries) // 2)
    if processes <= 1:
        yield from map(check, entries)
        return
    pool, limit = ProcessPool(check, processes, seconds=None), 2 * processes
    checked = ordered_map(pool, entries, threads=processes, limit=limit, stop=pool.kill)
    # `checked` is closed first: its threads call the pool.
    with contextlib.closing(pool), contextlib.closing(checked):
        yield from (found for _, found in checked)


def _check(url: str, entry: ShardEntry) -> tuple[Sequence[str], list[str]]:
    try:
        index = shard_format.load_index(url, entry)
    except ShardError as error:
        return (), [f"{error.what} ({error.found})"]
    return index.keys, list(_damages(url, entry, index))


def _damages(url: str, entry: ShardEntry, index: ShardIndex) -> Iterator[str]:
    """Yield what is wrong with one shard."""
    if len(index.keys) != entry.num_samples:
        yield f"{len(index.keys)} samples in the index, {entry.num_samples} in the manifest"
    with tempfile.TemporaryDirectory(prefix="svfap-verify-") as folder:
        path = os.path.join(folder, entry.name)
        try:
            storage.download_file(storage.join(url, entry.name), path)
        except storage.StorageMissingError:
            yield "missing"
            return
        with open(path, "rb") as tar:
            sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
        is_as_indexed, altered, misfits = True, _altered(path, index), list[str]()
        if whole := sha256 == entry.sha256:
            try:
                _check_members(path)
                is_as_indexed, misfits = _read_by_webdataset(path, index)
            except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
                yield f"webdataset cannot read it ({error!r})"
        if broken := list(dict.fromkeys([*altered, *misfits])):
            yield f"{len(broken)} samples damaged, the first {broken[0]!r}"
        if not whole:
            size = os.path.getsize(path)
            yield f"other content than when it was made ({size} of {entry.num_bytes} bytes)"
        elif not is_as_indexed:
            yield "webdataset finds other samples than the index names"


def _altered(path: str, index: ShardIndex) -> list[str]:
    """Return the keys of the samples whose bytes are not those that the index pins."""
    altered: list[str] = []
    ranges = zip(index.offsets, index.sizes, index.digests, strict=True)
    with open(path, "rb") as tar:
        for key, (offset, size, digest) in zip(itertools.cycle(index.keys), ranges, strict=False):
            tar.seek(offset)
            if shard_format.digest(tar.read(size)) != digest:
                altered.append(key)
    return altered


def _check_members(path: str) -> None:
    """Raise ReadError for a member that is no plain file: webdataset does not check that."""
    size = os.path.getsize(path)
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            is_plain = member.isdir() or (member.isreg() and not member.issparse())
            if not is_plain or not 0 <= member.size <= size:
                raise tarfile.ReadError(f"{member.name!r} is no plain file")


def _read_by_webdataset(path: str, index: ShardIndex) -> tuple[bool, list[str]]:
    """Return whether webdataset finds what the index has, and the samples that contradict it."""
    from webdataset.compat import WebDataset  # imports torch where it is installed

    num_samples, num_parts = len(index.keys), index.num_parts
    places = {
        part_key(index.keys[place % num_samples], place // num_samples, num_parts): place
        for place, size in enumerate(index.sizes)
        if size
    }
    keys: list[str] = []
    misfits: list[str] = []
    for sample in WebDataset([path], shardshuffle=False):
        keys.append(key := sample["__key__"])
        if key in places and not _fits(sample, index, *divmod(places[key], num_samples)):
            misfits.append(index.keys[places[key] % num_samples])
    return keys == list(places), misfits


def _fits(sample: Mapping[str, Any], index: ShardIndex, part: int, row: int) -> bool:
    """Return whether a part is a video with its JSON, and both say what the index says."""
    members = {name: content for name, content in sample.items() if not name.startswith("__")}
    raw = members.pop("json", b"")
    if len(members) != 1 or not members.keys() <= set(VIDEO_SUFFIXES):
        return False
    (video,) = members.values()
    try:
        info = load_info(raw, video)
    except (ValueError, KeyError, TypeError):
        return False
    same_labels = not index.labels or info.labels == index.labels[row]
    if not (same_labels and info.num_frames == index.num_frames[row]):
        return False
    phase = info.layout.files[0].phase if info.layout else None
    is_its_part = phase == (part if index.num_parts > 1 else None)
    return is_its_part and (info.layout is None or _packets_fit(video, info))


def _packets_fit(video: bytes, info: VideoInfo) -> bool:
    """Return whether the packets of an mp4 are where its sample's JSON says."""
    assert info.layout is not None
    try:
        with av.open(io.BytesIO(video), "r") as container:
            packets = container.demux(video=0)
            found = [(packet.pos, packet.size) for packet in packets if packet.size]
    except FFmpegError:
        return False
    (file,) = info.layout.files
    starts = itertools.accumulate(file.packet_sizes, initial=file.first_byte)
    frames = range(
        file.phase or 0, info.num_frames, 1 if file.phase is None else info.layout.phases
    )
    is_complete = len(file.packet_sizes) == len(frames)
    return is_complete and found == list(zip(starts, file.packet_sizes, strict=False))
