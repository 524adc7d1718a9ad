"""Write samples to a tar shard and its index.

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
import io
import itertools
import tarfile
from collections.abc import Iterable
from typing import IO, Any

from data_sharding import temporary
from data_sharding.make_sample import Sample
from svfap_dist import storage
from svfap_dist.shards.format import ShardEntry, ShardIndex, digest, dump
from svfap_dist.video.info import dump_info


def pack(samples: Iterable[Sample], url: str, name: str) -> ShardEntry | None:
    """Write samples, in their order, to `NAME.tar` and `NAME.index.json`.

    Args:
        samples: Taken one by one.
        url: URL of the data set.
        name: Name of the shard.

    Returns:
        Its row of the manifest; None if there are no samples, and nothing was written.
    """
    rest = iter(samples)
    first = next(rest, None)
    if first is None:
        return None
    with temporary.file() as (file, path):
        index = _write_tar(file, itertools.chain([first], rest))
        return _store(path, index, url, name)


def _write_tar(file: IO[bytes], samples: Iterable[Sample]) -> ShardIndex:
    """Write a tar; return its index, still without digests."""
    rows: list[tuple[str, int, int, str, int, dict[str, Any]]] = []  # of the index, field by field
    tar = tarfile.open(fileobj=file, mode="w")  # noqa: SIM115 - closed below, where a full disk is reported
    try:
        for sample in samples:
            offset = tar.offset
            with temporary.as_storage_error():
                # JSON first, so that the first kilobytes of a sample suffice to describe it.
                _add(tar, f"{sample.key}.json", dump_info(sample.info))
                _add(tar, f"{sample.key}.{sample.suffix}", sample.data)
            info, size = sample.info, tar.offset - offset
            rows.append((sample.key, offset, size, "", info.num_frames, info.labels))
        with temporary.as_storage_error():
            tar.close()
            file.flush()
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is reported
            tar.close()
        raise
    index = ShardIndex(*zip(*rows, strict=True))
    is_labeled = any("set" in labels for labels in index.labels)
    return index if is_labeled else dataclasses.replace(index, labels=())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without times, owners and names
    member.size, member.mode = len(content), 0o444
    tar.addfile(member, io.BytesIO(content))


def _store(path: str, index: ShardIndex, url: str, name: str) -> ShardEntry:
    """Upload a finished tar and, after it, its index with digests."""
    whole = hashlib.sha256()
    digests: list[str] = []
    with open(path, "rb") as tar:
        for size in index.sizes:  # samples are contiguous from the first byte on
            content = tar.read(size)
            whole.update(content)
            digests.append(digest(content))
        whole.update(tar.read())
        num_bytes = tar.tell()
    raw = dump(dataclasses.replace(index, digests=tuple(digests)))
    entry = ShardEntry(
        name=f"{name}.tar",
        num_samples=len(digests),
        num_bytes=num_bytes,
        sha256=whole.hexdigest(),
        index_sha256=hashlib.sha256(raw).hexdigest(),
    )
    storage.upload_file(path, storage.join(url, entry.name))
    storage.write_bytes(storage.join(url, entry.index_name), raw)
    return entry
