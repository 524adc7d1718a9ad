"""A node's own copies of checkpoints, in the folder for temporary files.

Ranks upload from them, and a restart on the node reads the newest one. A process holds a lock on
those it has written, which ends with it and shows which of them belong to a run that still runs.
The others are removed by the next checkpoint of their run, or after a day by any other run that
starts on the node.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_MAX_AGE_SECONDS = 24 * 3600.0  # of the copies of other runs that do not run any more
_ABANDONED = ("svfap-*-rank-*", "svfap-step-*")  # the latter are of restores that were killed

log = logging.getLogger(__name__)


class LocalCopy:
    """A new folder for a rank's files of a checkpoint, locked until it is removed.

    path: the folder.

    Args:
        run_url: URL of the run.
        rank: Number of the rank.
    """

    def __init__(self, run_url: str, rank: int) -> None:
        self.path = tempfile.mkdtemp(prefix=f"{_prefix(run_url)}{rank:05d}-")
        self._lock = _locked(self.path)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Unlock the folder, and leave it to another attempt."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _prefix(run_url: str) -> str:
    return f"svfap-{hashlib.sha256(run_url.encode()).hexdigest()[:12]}-rank-"


def _locked(path: str) -> int | None:
    """Lock a folder and return its descriptor; None if it is locked or cannot be."""
    if fcntl is None:
        return None
    file = None
    try:
        file = os.open(path, os.O_RDONLY)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if file is not None:
            os.close(file)
        return None
    return file


def _own_folders(pattern: str) -> Iterator[str]:
    """Yield folders for temporary files; those of other users are neither read nor removed."""
    for name in glob.glob(pattern, root_dir=tempfile.gettempdir()):
        path = os.path.join(tempfile.gettempdir(), name)
        with contextlib.suppress(OSError):  # another process removes it
            if os.lstat(path).st_uid == os.getuid():
                yield path


def find(run_url: str) -> list[str]:
    """Return the folders of what this node's ranks saved last; a killed rank leaves them.

    Args:
        run_url: URL of the run.
    """
    # Another user of a shared folder could replace a file between its check and its use.
    return list(_own_folders(f"{_prefix(run_url)}*"))


def remove_others(run_url: str, tag: str) -> None:
    """Remove this node's copies of all other checkpoints of a run.

    Args:
        run_url: URL of the run.
        tag: Name of the checkpoint whose copies are kept.
    """
    for path in find(run_url):
        if not os.path.isdir(os.path.join(path, tag)):
            shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(run_url: str) -> None:
    """Remove old copies of other runs whose processes have ended.

    Args:
        run_url: URL of the run whose copies are kept.
    """
    found = {path for pattern in _ABANDONED for path in _own_folders(pattern)}
    for path in found - {*find(run_url)}:
        with contextlib.suppress(OSError):
            if time.time() - os.stat(path).st_mtime < _MAX_AGE_SECONDS:
                continue
        if (lock := _locked(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            log.info("Removed %s, which a run has left", path)
