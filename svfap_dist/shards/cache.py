"""Copies of shards on a node's disk, shared by its ranks and kept from run to run.

A copy is named by the shard's digest, so data sets and runs share it and a remade shard is another
file. It is filled piece by piece, as pieces are needed: in an epoch, training needs a phase of each
sample, and reads ahead anyway (`shards.blocks`). So nothing waits for a whole shard.

Processes share state only in files. `DIGEST.tar.part` has room for all of a shard and
`DIGEST.tar.map` a byte per piece, which is locked while one process fetches the piece; complete,
the copy is `DIGEST.tar`. A lock on the folder is held while room is made. Space is reserved before
the first byte arrives, so a full disk is found at once and copies cannot exceed the limit together.
The least recently read copy is evicted first, without waiting for its readers: a deleted file stays
readable for processes that have it open.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator

from svfap_dist import storage
from svfap_dist.config import DataConfig
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError
from svfap_dist.shards.format import Manifest, ShardEntry

try:
    import fcntl
except ImportError:  # Windows, where everything but the cache works
    fcntl = None

log = logging.getLogger(__name__)

_PIECE_BYTES = 2 << 20
_POLL_SECONDS = 0.005
_MAX_OPEN = 128  # unfinished copies
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardCache:
    """Copies of shards on the node's disk, below a limit of bytes; thread- and process-safe.

    Args:
        folder: Made if it does not exist; the same for all ranks of a node.
        limit: Bytes that all copies in it may take.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self._folder, self._limit = storage.local_path(folder), limit
        self._lock = threading.Lock()
        self._parts: collections.OrderedDict[str, _Part] = collections.OrderedDict()  # by digest
        self._is_off = False
        self.bytes_fetched = 0  # from the store, by this process

    @classmethod
    def of_node(cls, data: DataConfig, manifest: Manifest, world: World) -> ShardCache | None:
        """Return the node's cache that data.cache_dir names, if any.

        Args:
            data: Folder and limit of the cache, lanes.
            manifest: The data set.
            world: This rank, and the ranks on its node.

        Raises:
            ConfigError: The cache is smaller than the shards in use at a time, each of which would
                be downloaded over and over; or the system has no file locks.
        """
        if not data.cache_dir:
            return None
        if fcntl is None:
            found, do = "no fcntl, which ranks need to share copies", "leave out data.cache_dir"
            raise ConfigError("No file locks on this system", "data.cache_dir", found, do)
        sizes = sorted((shard.num_bytes for shard in manifest.shards), reverse=True)
        lanes = data.num_lanes * world.local_world_size // world.world_size
        at_a_time = 2 * lanes * len(manifest.shards_of_sources)
        needed = sum(sizes[:at_a_time])  # a lane may be at the border of two blocks
        if needed > data.cache_bytes:
            found = f"{data.cache_bytes}, while the {lanes} lanes of a node may use shards of "
            found += f"{needed} bytes at a time"
            do = "raise it, lower data.num_lanes, make smaller shards, or leave out data.cache_dir"
            raise ConfigError("Shard cache is too small", "data.cache_bytes", found, do)
        return cls(data.cache_dir, data.cache_bytes)

    def read(self, url: str, entry: ShardEntry, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) of a shard; what the copy lacks of them is fetched first.

        Args:
            url: Folder or prefix of the data set.
            entry: The shard.
            start: First byte.
            stop: Byte after the last one.

        Returns:
            The bytes, or None if there can be no copy and the store has to be read.

        Raises:
            StorageError: The shard cannot be read.
        """
        data = _read_copy(self._path(entry), entry.num_bytes, start, stop)
        if data is not None or self._is_off or entry.num_bytes > self._limit:
            return data
        try:
            part = self._part_of(entry)
            if part is None or not self._fill(part, storage.join(url, entry.name), start, stop):
                return None
            data = part.read(start, stop)
            if part.is_complete:
                self._finish(part, entry)
            return data
        except OSError as error:
            self._turn_off(error)
            return None

    def drop(self, entry: ShardEntry) -> None:
        """Delete the copy of a shard, whose bytes turned out to be wrong.

        Args:
            entry: The shard.
        """
        with self._lock:
            self._parts.pop(entry.sha256, None)
        _delete_copy(self._path(entry))

    def _path(self, entry: ShardEntry) -> str:
        return os.path.join(self._folder, f"{entry.sha256}.tar")

    def _part_of(self, entry: ShardEntry) -> _Part | None:
        """Return the unfinished copy of a shard, made if need be; None: there is no room."""
        with self._lock:
            part = self._parts.get(entry.sha256)
            if part is None or part.is_deleted:
                os.makedirs(self._folder, exist_ok=True)
                with _locked(os.path.join(self._folder, "folder.lock")):
                    part = self._open_part(self._path(entry), entry.num_bytes)
                if part is None:
                    self._parts.pop(entry.sha256, None)
                    return None
                self._parts[entry.sha256] = part
            self._parts.move_to_end(entry.sha256)
            while len(self._parts) > _MAX_OPEN:
                self._parts.popitem(last=False)  # closed when no thread uses it any more
            return part

    def _open_part(self, path: str, num_bytes: int) -> _Part | None:
        if _size_of(path) == num_bytes:  # another process has finished it just now
            return None
        with contextlib.suppress(OSError, ValueError):
            return _Part(path, num_bytes)
        _delete_copy(path)  # of another size, or without its map
        if not self._make_room(num_bytes):
            return None
        file = os.open(f"{path}.part", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, num_bytes)
            else:  # macOS, which then finds a full disk while writing
                os.truncate(file, num_bytes)
            with open(f"{path}.map", "wb") as states:
                states.write(bytes(-(-num_bytes // _PIECE_BYTES)))
        except OSError:
            _delete_copy(path)
            raise
        finally:
            os.close(file)
        return _Part(path, num_bytes)

    def _fill(self, part: _Part, where: str, start: int, stop: int) -> bool:
        """Fetch the pieces that a copy lacks; return False if the manifest says it is longer."""
        first, end = start // _PIECE_BYTES, -(-stop // _PIECE_BYTES)
        while (first := part.next_missing(first, end)) < end:
            with part.claim(first, end) as claimed_end:
                begin, until = first * _PIECE_BYTES, min(claimed_end * _PIECE_BYTES, part.num_bytes)
                if claimed_end > first:
                    data = storage.read_buffer(where, begin, until)
                    with self._lock:
                        self.bytes_fetched += len(data)
                    if len(data) < until - begin:
                        return False
                    part.write(data, first, claimed_end)
        return True

    def _finish(self, part: _Part, entry: ShardEntry) -> None:
        """Give a complete copy its name."""
        path = self._path(entry)
        with _locked(os.path.join(self._folder, "folder.lock")):
            if not part.is_deleted:
                os.replace(f"{path}.part", path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{path}.map")
        with self._lock:
            self._parts.pop(entry.sha256, None)

    def _make_room(self, needed: int) -> bool:
        """Delete copies, the least recently read first, until there is room for another."""
        files = []
        for found in os.scandir(self._folder):
            if found.name.endswith((".tar", ".part")):
                with contextlib.suppress(FileNotFoundError):
                    status = found.stat()
                    files.append((status.st_mtime_ns, found.path, status.st_size))
        total = sum(size for _, _, size in files)
        for _, path, size in sorted(files):
            if total + needed <= self._limit:
                break
            _delete_copy(path.removesuffix(".part"))
            total -= size
        return total + needed <= self._limit

    def _turn_off(self, error: OSError) -> None:
        """Read the store from now on; warn once."""
        with self._lock:
            first, self._is_off = not self._is_off, True
        if first:
            why = "no space left on its disk" if error.errno in _NO_ROOM else str(error)
            log.warning("Shards are read from the store, not from %s: %s.", self._folder, why)


class _Part:
    """An unfinished copy of a shard.

    Args:
        path: Name that it gets when it is complete.
        num_bytes: Bytes of the shard.

    Raises:
        OSError, ValueError: There is none of that size.
    """

    def __init__(self, path: str, num_bytes: int) -> None:
        self._path, self.num_bytes = f"{path}.part", num_bytes
        self._files: list[int] = []
        self._files.append(os.open(self._path, os.O_RDWR | os.O_CLOEXEC))
        self._files.append(os.open(f"{path}.map", os.O_RDWR | os.O_CLOEXEC))
        self._file, self._map_file = self._files
        self._num_pieces = -(-num_bytes // _PIECE_BYTES)
        sizes = [os.fstat(file).st_size for file in self._files]
        if sizes != [num_bytes, self._num_pieces]:
            raise ValueError(f"sizes are {sizes}")
        self._states = mmap.mmap(self._map_file, self._num_pieces)  # of each piece: 1: it is there
        self._busy: set[int] = set()  # pieces that threads of this process are fetching
        self._changed = threading.Condition()

    def __del__(self) -> None:
        for file in self._files:  # its locks are released
            os.close(file)

    @property
    def is_deleted(self) -> bool:
        """Whether it was evicted, dropped or finished."""
        try:
            return os.stat(self._path).st_ino != os.fstat(self._file).st_ino
        except FileNotFoundError:
            return True

    @property
    def is_complete(self) -> bool:
        """Whether all pieces are there."""
        return 0 not in self._states[:]

    def next_missing(self, first: int, end: int) -> int:
        """Return the first piece of [first, end) that is not there, or `end`."""
        found = self._states.find(b"\0", first, end)
        return end if found < 0 else found

    @contextlib.contextmanager
    def claim(self, first: int, end: int) -> Iterator[int]:
        """Hold a piece and the missing ones behind it, once no other thread or process fetches it.

        Args:
            first: The piece.
            end: Piece after the last one that is wanted.

        Yields:
            Piece after the last one that is held; `first` if others have fetched it.
        """
        assert fcntl is not None
        with self._changed:
            while first in self._busy:
                self._changed.wait()
            claimed = first
            while claimed < end and not self._states[claimed] and claimed not in self._busy:
                claimed += 1
            self._busy.update(range(first, claimed))
        try:
            # Locks are between processes. One that waits for another's would look like a
            # deadlock if the other waits for one of this process's, which other threads hold.
            while claimed > first and not self._lock_pieces(first, claimed):
                time.sleep(_POLL_SECONDS)
            missing = self._states[first:claimed]
            yield first + len(missing) - len(missing.lstrip(b"\0"))
        finally:
            if claimed > first:
                fcntl.lockf(self._map_file, fcntl.LOCK_UN, claimed - first, first)
            with self._changed:
                self._busy.difference_update(range(first, claimed))
                self._changed.notify_all()

    def _lock_pieces(self, first: int, end: int) -> bool:
        assert fcntl is not None
        try:
            fcntl.lockf(self._map_file, fcntl.LOCK_EX | fcntl.LOCK_NB, end - first, first)
            return True
        except (BlockingIOError, PermissionError):
            return False

    def write(self, data: bytes | memoryview, first: int, end: int) -> None:
        """Write the pieces [first, end)."""
        view, place = memoryview(data), first * _PIECE_BYTES
        while view:
            written = os.pwrite(self._file, view, place)
            view, place = view[written:], place + written
        self._states[first:end] = b"\1" * (end - first)

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes of pieces that are there."""
        os.utime(self._file)  # marks it as recently read
        data = os.pread(self._file, stop - start, start)
        if len(data) < stop - start:
            raise OSError(errno.EIO, f"{self._path} is shorter than it was")
        return data


def _delete_copy(path: str) -> None:
    for name in (path, f"{path}.part", f"{path}.map"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _size_of(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None


def _read_copy(path: str, num_bytes: int, start: int, stop: int) -> bytes | None:
    """Return bytes of a copy; None if it is missing, unreadable or of another size."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(file).st_size != num_bytes:
            return None
        os.utime(file)  # marks it as recently read
        data = os.pread(file, stop - start, start)
        return data if len(data) == stop - start else None
    except OSError:
        return None  # a bad disk: the store is read instead
    finally:
        os.close(file)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock among all processes and threads; a process that dies releases it."""
    assert fcntl is not None
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
