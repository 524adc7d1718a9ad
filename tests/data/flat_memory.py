"""What memory a loader and its worker or feeder have in use over 2,000 batches of one clip.

Asked of malloc and of Python, not of the kernel: a heap grows by fragments for thousands of batches
though nothing is held. (glibc before 2.38 seldom uses again what was allocated aligned, as FFmpeg
and torch do, which may be why.) Each process prints its id and how many bytes it has in use, each
100 clips.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

from loaders import config_of

import svfap_dist.data.loader
from svfap_dist.config import Config
from svfap_dist.data.clips import ClipWorker, DecodeJob, DecodeResult
from svfap_dist.data.loader import ClipLoader
from svfap_dist.distributed import World
from svfap_dist.shards import format as shard_format

_PYTHON_BLOCK = 64  # bytes, about


class Mallinfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def in_use() -> int:
    """Bytes that malloc and Python have given out in this process."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo
    found = ask()
    return found.uordblks + found.hblkhd + _PYTHON_BLOCK * sys.getallocatedblocks()


def tell() -> None:
    os.write(
        1, f"{os.getpid()} {in_use()}\n".encode()
    )  # one write per line: processes share the pipe


class Telling(ClipWorker):
    """Reports its process's memory every 100 clips."""

    clips = 0

    def __call__(self, jobs: Sequence[DecodeJob]) -> list[DecodeResult]:
        if self.clips % 100 == 0:
            tell()
        self.clips += 1
        return super().__call__(jobs)


def main(url: str, workers: int, feeders: int) -> None:
    svfap_dist.data.loader.ClipWorker = Telling
    fields = config_of(decode_workers=workers, feeders=feeders, num_lanes=1).model_dump()
    fields["train"] |= {"global_batch_size": 1, "micro_batch_size": 1}
    manifest = shard_format.load_manifest(url)
    loader = ClipLoader(Config.model_validate(fields), url, manifest, World(0, 0, 1, 1))
    for number, batch in enumerate(loader.batches(0, 2000)):
        assert len(batch.frames) == 1
        if workers + feeders and number % 100 == 0:
            tell()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
