"""`svfap bench storage`: what a ranged read costs this process, and how fast bytes come.

An object is written below a URL, and ranges of it are read by some threads at a time. `training` is
the way that training reads, on S3 by obstore if it is installed; `s3fs` is the way without it. CPU
time is that of the whole process, so it includes obstore's own threads; a store on the same machine
is not part of it.
"""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from svfap_dist import storage
from svfap_dist.text_table import format_table

_OBJECT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class RangeCost:
    """Reads of one size by one client."""

    client: str
    range_bytes: int
    requests: int
    cpu_ms_per_request: float
    cpu_ms_per_megabyte: float
    megabytes_per_second: float


@dataclasses.dataclass(frozen=True)
class StorageBench:
    """Costs by client and size."""

    url: str
    threads: int
    rows: tuple[RangeCost, ...]

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        header = ("client", "KB", "requests", "CPU ms", "CPU ms per MB", "MB/s")
        rows = [
            (
                row.client,
                f"{row.range_bytes / 1000:.0f}",
                str(row.requests),
                f"{row.cpu_ms_per_request:.2f}",
                f"{row.cpu_ms_per_megabyte:.2f}",
                f"{row.megabytes_per_second:.0f}",
            )
            for row in self.rows
        ]
        title = f"{self.url}, {self.threads} reads at a time"
        return [title, *format_table(rows, header, right=range(1, 6))]


def run(
    url: str,
    *,
    sizes: Sequence[int] = (240_000, 8 << 20),
    total_bytes: int = 256 << 20,
    threads: int = 8,
    rounds: int = 3,
) -> StorageBench:
    """Read ranges of an object, and delete it.

    Args:
        url: Folder or prefix.
        sizes: Bytes of a range.
        total_bytes: Read per size, client and round.
        threads: Reads at a time.
        rounds: Clients take turns in each; the one of least CPU time counts.

    Raises:
        StorageError: It cannot be written to or read from.
    """
    place = storage.join(url, f"bench-{uuid.uuid4().hex[:8]}")
    storage.write_bytes(place, os.urandom(_OBJECT_BYTES))
    clients: dict[str, Callable[[int, int], object]] = {
        "training": lambda start, stop: storage.read_buffer(place, start, stop)
    }
    if place.startswith("s3://"):
        fs, path = storage.filesystem(place)
        clients["s3fs"] = lambda start, stop: fs.cat_file(path, start=start, end=stop)
    try:
        found = [
            _measure(name, read, size, max(total_bytes // size, 1), threads)
            for _ in range(rounds)
            for size in sizes
            for name, read in clients.items()
        ]
    finally:
        storage.delete(place)
    keys = [(size, name) for size in sizes for name in clients]
    best = [
        min(
            (row for row in found if (row.range_bytes, row.client) == key),
            key=lambda row: row.cpu_ms_per_request,
        )
        for key in keys
    ]
    return StorageBench(url, threads, tuple(best))


def _measure(
    name: str, read: Callable[[int, int], object], size: int, requests: int, threads: int
) -> RangeCost:
    starts = [number * size % (_OBJECT_BYTES - size) for number in range(requests)]
    read(0, size)  # connects
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda start: read(start, start + size), starts):
            pass
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    megabytes = size * requests / 1e6
    per_request = cpu / requests * 1e3
    return RangeCost(name, size, requests, per_request, cpu / megabytes * 1e3, megabytes / wall)
