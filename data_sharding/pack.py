"""Write samples to a tar shard and its index.

Where samples have parts, each section of the tar is written to a temporary file of its own, so that
no shard has to be kept in memory; the sections are put together at the end.

Every field of the tar that could differ between two runs is fixed, so equal samples give equal
bytes: those of webdataset's `TarWriter` with the same fields, which a test compares. It is not used
here since importing webdataset imports torch, some 200 MB in each process that makes shards; its
reader checks the shards (`verify`). The tar is written to local disk, read back once for its
digests and uploaded, then its index. A marker commits both (`markers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import shutil
import tarfile
from collections.abc import Iterable
from typing import IO, Any

from data_sharding import temporary
from data_sharding.make_sample import Sample
from svfap_dist import storage
from svfap_dist.shards.format import ShardEntry, ShardIndex, digest, dump, part_key
from svfap_dist.video.info import dump_info

_COPIED_BYTES = 1 << 20  # at a time


def pack(samples: Iterable[Sample], url: str, name: str, num_parts: int = 1) -> ShardEntry | None:
    """Write samples, in their order, to `NAME.tar` and `NAME.index.json`.

    Args:
        samples: Taken one by one.
        url: URL of the data set.
        name: Name of the shard.
        num_parts: Of each sample: its files, of which one with fewer frames has fewer.

    Returns:
        Its row of the manifest; None if there are no samples, and nothing was written.
    """
    rest = iter(samples)
    first = next(rest, None)
    if first is None:
        return None
    with temporary.file() as (file, path):
        index = _write_tar(file, itertools.chain([first], rest), num_parts)
        return _store(path, index, url, name)


def _write_tar(file: IO[bytes], samples: Iterable[Sample], num_parts: int) -> ShardIndex:
    """Write a tar; return its index, still without digests."""
    rows: list[tuple[str, int, dict[str, Any]]] = []
    sizes: list[list[int]] = [[] for _ in range(num_parts)]
    with contextlib.ExitStack() as stack:
        later = [stack.enter_context(temporary.file())[0] for _ in range(num_parts - 1)]
        for sample in samples:
            rows.append((sample.key, sample.info.num_frames, sample.info.labels))
            for part, section in enumerate([file, *later]):
                with temporary.as_storage_error():
                    sizes[part].append(_write_part(section, sample, part, num_parts))
        with temporary.as_storage_error():
            for section in later:
                section.seek(0)
                shutil.copyfileobj(section, file, _COPIED_BYTES)
                section.close()  # frees its space before the next one is copied
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
            file.flush()
    keys, num_frames, labels = zip(*rows, strict=True)
    in_order = tuple(itertools.chain.from_iterable(sizes))
    offsets = tuple(itertools.accumulate(in_order[:-1], initial=0))
    is_labeled = any("set" in each for each in labels)
    return ShardIndex(keys, offsets, in_order, (), num_frames, labels if is_labeled else ())


def _write_part(section: IO[bytes], sample: Sample, part: int, num_parts: int) -> int:
    """Write a part of a sample to its section; return its bytes."""
    if part >= len(sample.files):
        return 0
    video, info = sample.files[part]
    key = part_key(sample.key, part, num_parts)
    # JSON first, so that the first kilobytes of a part suffice to describe the sample.
    return sum(
        section.write(block)
        for name, content in ((f"{key}.json", dump_info(info)), (f"{key}.{sample.suffix}", video))
        for block in (
            _header(name, len(content)),
            content,
            bytes(-len(content) % tarfile.BLOCKSIZE),
        )
    )


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)  # without times, owners and names
    member.size, member.mode = size, 0o444
    return member.tobuf()


def _store(path: str, index: ShardIndex, url: str, name: str) -> ShardEntry:
    """Upload a finished tar and, after it, its index with digests."""
    whole = hashlib.sha256()
    digests: list[str] = []
    with open(path, "rb") as tar:
        for size in index.sizes:  # ranges are contiguous from the first byte on
            content = tar.read(size)
            whole.update(content)
            digests.append(digest(content))
        whole.update(tar.read())
        num_bytes = tar.tell()
    raw = dump(dataclasses.replace(index, digests=tuple(digests)))
    entry = ShardEntry(
        name=f"{name}.tar",
        num_samples=len(index.keys),
        num_bytes=num_bytes,
        sha256=whole.hexdigest(),
        index_sha256=hashlib.sha256(raw).hexdigest(),
    )
    storage.upload_file(path, storage.join(url, entry.name))
    storage.write_bytes(storage.join(url, entry.index_name), raw)
    return entry
