"""Copies of shards on the node's own disk, shared by its ranks and kept from run to run.

In: a row of the manifest and a byte range. Out: those bytes of the local copy, which whoever first
wants a shard downloads whole; None where no copy can be had, and the store has to be read. A copy
is named by the shard's digest, so that data sets, runs and ranks share it and a remade shard is
another file.

Processes meet in files only: a lock per shard while it is downloaded, a lock on the folder while
room is made. Space is reserved before the first byte comes, so a full disk is found at once and
downloads side by side cannot pass the limit together. The copy that was not read for longest goes
first. Nothing waits for its readers: a file that is deleted lives on for those who have it open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError
from svfap_dist.progress import say
from svfap_dist.shards.format import Manifest, ShardEntry

_PIECE = 16 << 20  # bytes of one request
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardCache:
    """Local copies of shards, below `limit` bytes in all; any number of threads may share one.

    Args:
        folder: made if it is not there; all ranks of a node are given the same.
        limit: bytes that all copies in it may take.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self._folder, self._limit = storage.local_path(folder), limit
        self._lock = threading.Lock()
        self._off = False
        self.bytes_fetched = 0  # from the store, by this process

    def read(self, url: str, entry: ShardEntry, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of a shard of the data set at `url`; None: read the store.

        Raises: StorageError if the shard cannot be downloaded.
        """
        path = self._path(entry)
        data = _part(path, entry.num_bytes, start, stop)
        if data is None and not self._off and entry.num_bytes <= self._limit:
            try:
                if self._obtain(storage.join(url, entry.name), entry, path):
                    data = _part(path, entry.num_bytes, start, stop)
            except OSError as error:
                self._give_up(error)
        return data

    def drop(self, entry: ShardEntry) -> None:
        """Delete the copy of a shard, whose bytes turned out to be wrong."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(entry))

    def _path(self, entry: ShardEntry) -> str:
        return os.path.join(self._folder, f"{entry.sha256}.tar")

    def _obtain(self, where: str, entry: ShardEntry, path: str) -> bool:
        """Download a shard, or wait until another rank has; False if there is no room for it."""
        os.makedirs(self._folder, exist_ok=True)
        with _locked(_lock_of(path)):
            if _has_size(path, entry.num_bytes):
                return True
            part = f"{path}.part"
            file = self._reserve(part, entry.num_bytes)
            if file is None:
                return False
            try:
                complete = self._download(where, entry.num_bytes, file)
                if complete:
                    os.replace(part, path)
            finally:
                os.close(file)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
            return complete

    def _reserve(self, part: str, num_bytes: int) -> int | None:
        """An open file of that size, for which others have made room."""
        with _locked(os.path.join(self._folder, "folder.lock")):
            if not self._make_room(num_bytes):
                return None
            file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(file, 0, num_bytes)
            except OSError:
                os.close(file)
                os.unlink(part)
                raise
            return file

    def _download(self, where: str, num_bytes: int, file: int) -> bool:
        """Write the store's file into `file`; False if it is shorter than the manifest says."""
        for start in range(0, num_bytes, _PIECE):
            piece = storage.read_range(where, start, min(start + _PIECE, num_bytes))
            if len(piece) < min(_PIECE, num_bytes - start):
                return False
            os.pwrite(file, piece, start)
            with self._lock:
                self.bytes_fetched += len(piece)
        return True

    def _make_room(self, wanted: int) -> bool:
        """Delete copies, the least recently read first, until there is room for another."""
        files = []
        for found in os.scandir(self._folder):
            if found.name.endswith((".tar", ".part")):
                with contextlib.suppress(FileNotFoundError):
                    status = found.stat()
                    files.append((status.st_mtime_ns, found.path, status.st_size))
        total = sum(size for _, _, size in files)
        for _, path, size in sorted(files):
            if total + wanted <= self._limit:
                break
            if path.endswith(".part") and _is_locked(_lock_of(path.removesuffix(".part"))):
                continue  # being downloaded; a part that nobody holds was left by a killed rank
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total + wanted <= self._limit

    def _give_up(self, error: OSError) -> None:
        """Read the store from now on; told once."""
        with self._lock:
            first, self._off = not self._off, True
        if first:
            why = "no space left on its disk" if error.errno in _NO_ROOM else str(error)
            say(f"warning: shards are read from the store, not from {self._folder}: {why}")


def _part(path: str, num_bytes: int, start: int, stop: int) -> bytes | None:
    """Bytes of a copy; None if there is none, or one of another size."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(file).st_size != num_bytes:
            return None
        os.utime(file)  # its turn to be deleted comes later now
        data = os.pread(file, stop - start, start)
        return data if len(data) == stop - start else None
    except OSError:
        return None  # a disk that cannot read this: the store can
    finally:
        os.close(file)


def _has_size(path: str, num_bytes: int) -> bool:
    try:
        return os.path.getsize(path) == num_bytes
    except OSError:
        return False


def _lock_of(path: str) -> str:
    return f"{path}.lock"


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Alone among all processes and threads; a process that dies lets go."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _is_locked(path: str) -> bool:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(file)


def shard_cache(config: Config, manifest: Manifest, world: World) -> ShardCache | None:
    """The node's copies of shards, if they are asked for.

    Raises: ConfigError if the cache is smaller than the shards that are in use at a time: each
    would be downloaded again and again.
    """
    data = config.data
    if not data.cache_dir:
        return None
    sizes = sorted((shard.num_bytes for shard in manifest.shards), reverse=True)
    lanes = data.num_lanes * world.local_world_size // world.world_size
    needed = sum(sizes[: 2 * lanes])  # a lane may be at the border of two blocks
    if needed > data.cache_bytes:
        raise ConfigError(
            "Cache of shards is too small",
            where="data.cache_bytes",
            found=f"{data.cache_bytes}, and the {lanes} lanes of a node may use shards of "
            f"{needed} bytes at a time",
            do="make it larger, data.num_lanes or the shards smaller, or leave out data.cache_dir",
        )
    return ShardCache(data.cache_dir, data.cache_bytes)
