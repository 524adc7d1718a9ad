"""Files on the temporary disk (TMPDIR), and the lock of an output folder.

SQLite sorts lists of millions of videos there, with two megabytes of them in memory, and shards are
written there before they are uploaded. These files have no name: the kernel removes them when the
process ends, however it ends, so a job that was killed leaves nothing behind.

A local output folder is locked by the kernel while a job works on it, since two jobs would undo
each other's work. The holder of the lock also deletes half-written files of jobs that were killed.
Object stores have neither locks nor half-written files: there two equal jobs do the same work
twice, and two different ones end with an error (`manifest.gather_markers`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from typing import IO

from svfap_dist import storage
from svfap_dist.errors import ConfigError, StorageError


def database(tables: str) -> sqlite3.Connection:
    """Return an empty database, deleted when it is closed or garbage-collected.

    Args:
        tables: SQL that creates its tables.
    """
    opened = sqlite3.connect("")  # SQLite's name for a temporary file
    opened.executescript(f"pragma journal_mode = off; {tables}")
    return opened


@contextlib.contextmanager
def file() -> Iterator[tuple[IO[bytes], str]]:
    """Open an empty file to write; also yield a path of it, valid in this process while open."""
    with as_storage_error():
        opened = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed below
    try:
        yield opened, f"/proc/{os.getpid()}/fd/{opened.fileno()}"
    finally:
        with contextlib.suppress(OSError):  # a full disk was reported by the write
            opened.close()


@contextlib.contextmanager
def as_storage_error() -> Iterator[None]:
    """Turn what a full or broken temporary disk raises into a `StorageError`."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        where = f"{tempfile.gettempdir()} (TMPDIR)"
        cause = storage.explain("write temporary file", where, error)
        advice = "free space, or set TMPDIR to a disk with more"
        raise StorageError(cause.what, where, cause.found, advice) from error


@contextlib.contextmanager
def output_lock(url: str) -> Iterator[None]:
    """Lock a local output, and remove what killed jobs have left there unfinished.

    Args:
        url: Output folder; nothing is done for a prefix of an object store.

    Raises:
        ConfigError: Another job works there.
        StorageError: The folder cannot be made.
    """
    if storage.is_remote(url):
        yield
        return
    try:
        os.makedirs(storage.local_path(url), exist_ok=True)
        folder = os.open(storage.local_path(url), os.O_RDONLY)
    except OSError as error:
        raise storage.explain("write", url, error) from error
    try:
        if is_locked := _lock(folder, url):
            storage.delete_unfinished(url)
        yield
        if is_locked:  # files of workers that were killed
            storage.delete_unfinished(url)
    finally:
        os.close(folder)


def _lock(folder: int, url: str) -> bool:
    """Return whether the folder is locked now; some network file systems have no such locks."""
    import fcntl

    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fix = "wait until it has ended, or use another URL"
        what = "Another job is writing to this output"
        raise ConfigError(what, url, _holder(folder), fix) from error
    except OSError:
        return False
    return True


def _holder(folder: int) -> str:
    """Return which process holds the lock, if the kernel says."""
    with contextlib.suppress(OSError), open("/proc/locks") as locks:
        for line in locks:
            kind, _, _, process, place = line.split()[1:6]
            if kind == "FLOCK" and place.endswith(f":{os.fstat(folder).st_ino}"):
                return f"its folder is locked by process {process}"
    return "its folder is locked"
