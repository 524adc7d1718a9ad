"""One job at a time under an output: two would make each other's work count for nothing.

A local folder is locked while a job works on it, by the kernel, which lets go when the job ends,
however it ends. So whoever holds the lock may also remove the half-written files of jobs that were
killed. Stores of objects have neither locks nor half-written files; there two equal jobs do the
same work twice, and of two different ones the manifest is refused (`manifest.gather`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from svfap_dist import storage
from svfap_dist.errors import ConfigError


@contextlib.contextmanager
def hold(url: str) -> Iterator[None]:
    """Keep other jobs away from `url`, and remove what killed ones have left there unfinished.

    Raises: ConfigError if another job works there; StorageError if the folder cannot be made.
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
        alone = _lock(folder, url)
        if alone:
            storage.delete_unfinished(url)
        yield
        if alone:  # what workers left that were ended
            storage.delete_unfinished(url)
    finally:
        os.close(folder)


def _lock(folder: int, url: str) -> bool:
    """Whether the folder is locked now; some network file systems have no locks for folders."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            "Another job is writing to this output",
            where=url,
            found=_holder(folder),
            do="wait until it has ended, or use another URL",
        ) from error
    except OSError:
        return False
    return True


def _holder(folder: int) -> str:
    """Who has locked it, as far as the kernel tells."""
    with contextlib.suppress(OSError), open("/proc/locks") as locks:
        for line in locks:
            kind, _, _, process, place = line.split()[1:6]
            if kind == "FLOCK" and place.endswith(f":{os.fstat(folder).st_ino}"):
                return f"its folder is locked by process {process}"
    return "its folder is locked"
