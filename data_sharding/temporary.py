"""What lies on the temporary disk (TMPDIR) while a data set is made, and goes with its process.

Lists of millions of videos are SQLite's business: it keeps two megabytes of them in memory. Shards
are written here before they are uploaded. Both are files without a name: the kernel takes them away
when the process ends, however it ends, so a job that was killed leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from typing import IO

from svfap_dist import storage
from svfap_dist.errors import StorageError


def database(tables: str) -> sqlite3.Connection:
    """An empty database with these tables, deleted when it is closed or forgotten."""
    opened = sqlite3.connect("")  # SQLite's name for a temporary file
    opened.executescript(f"pragma journal_mode = off; {tables}")
    return opened


@contextlib.contextmanager
def file() -> Iterator[tuple[IO[bytes], str]]:
    """An empty file to write, and a path that names it as long as it is open, in this process."""
    with explained():
        opened = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed below
    try:
        yield opened, f"/proc/{os.getpid()}/fd/{opened.fileno()}"
    finally:
        with contextlib.suppress(OSError):  # a full disk was told when it was written
            opened.close()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what a full or broken temporary disk raises into a `StorageError`."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        where = f"{tempfile.gettempdir()} (TMPDIR)"
        told = storage.explain("write temporary file", where, error)
        do = "free space, or set TMPDIR to a disk with more"
        raise StorageError(told.what, where=where, found=told.found, do=do) from error
