"""One attempt at a time writes to a run: the newest.

An attempt that starts puts its mark into the run's folder. A restart after a crash must be free to
do so at once, so nobody is kept waiting for a lease: whoever was there before finds another mark at
its next checkpoint and ends without touching the run. The same mark tells whether all ranks see one
folder, which a local path on several hosts is not.
"""

from __future__ import annotations

import os
import re
import socket
import uuid

from svfap_dist import distributed, storage
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError, HealthError

MARK = "OWNER"


def mark_of(run_url: str) -> str:
    """The mark of the latest attempt, "nobody" without one."""
    try:
        return storage.read_bytes(storage.join(run_url, MARK)).decode()
    except storage.StorageMissing:
        return "nobody"


def is_gone(mark: str) -> bool:
    """Whether a mark is of a process of this host that is no more; False where nobody can say."""
    named = re.match(r"pid (\d+) on (.+), \w+$", mark)
    if named is None or named[2] != socket.gethostname():
        return False
    return not os.path.exists(f"/proc/{named[1]}")


class Ownership:
    """The mark of this attempt; made by all ranks together.

    Raises: ConfigError on every rank if one does not see what rank 0 wrote.
    """

    def __init__(self, run_url: str, world: World) -> None:
        self._run_url, self._world = run_url, world
        self._url = storage.join(run_url, MARK)
        mine = f"pid {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"
        self._mark = distributed.broadcast_object(mine)
        distributed.run_on_all_ranks(self._write)
        distributed.run_on_all_ranks(self._look)

    def _write(self) -> None:
        if self._world.is_main:
            storage.write_bytes(self._url, self._mark.encode())

    def _look(self) -> None:
        if mark_of(self._run_url) != self._mark:
            raise ConfigError(
                "Ranks do not share the run's folder",
                where=f"run.url = {self._run_url}, rank {self._world.rank}, {socket.gethostname()}",
                found="what rank 0 wrote there is not to be seen",
                do="give a run.url that every host reaches: s3://... or a shared file system",
            )

    def check(self) -> None:
        """Collective, before anything of the run is replaced.

        Raises: HealthError on every rank if a newer attempt has taken the run over.
        """
        distributed.run_on_all_ranks(self._check_on_main)

    def _check_on_main(self) -> None:
        if self._world.is_main and (owner := mark_of(self._run_url)) != self._mark:
            raise HealthError(
                "Another process has taken over this run",
                where=self._url,
                found=f"the mark of {owner}; this is {self._mark}",
                do="give each run a run.url of its own; this process has changed nothing since",
            )
