"""What the tests of isolated work call in the child process."""

from __future__ import annotations

import mmap
import os
import time

from svfap_dist.parallel.processes import ChildProcess


def behave(request: str) -> object:
    """Do what the request says."""
    if request == "hang":
        time.sleep(600)
    if request == "decode":
        hang_in_decoder()
    if request == "feed":
        with ChildProcess(behave, seconds=600) as worker:
            worker("decode")
    if request == "crash":
        os._exit(7)
    if request == "raise":
        raise ValueError("no such frame")
    if request == "eat":
        return len(bytearray(8 << 30))
    if request == "niceness":
        return os.nice(0)
    if request == "threads":
        return os.environ.get("OPENBLAS_NUM_THREADS"), os.environ.get("OMP_NUM_THREADS")
    return os.getpid() if request == "pid" else request.upper()


def hang_in_decoder() -> None:
    """Read a video whose bytes never come."""
    import av
    from clips import make_video

    from svfap_dist.video.probe import probe

    video = make_video(None, 2)
    av.open = lambda *_, **__: time.sleep(600)  # type: ignore[assignment]
    probe(video, 1)


class MapsOnArrival:
    """A function whose import maps address space, as a CUDA build of torch does."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    def __call__(self, request: str) -> object:
        return behave(request)

    def __setstate__(self, state: dict[str, int]) -> None:
        self._mapped = mmap.mmap(-1, state["_num_bytes"], prot=mmap.PROT_READ)


class DiesOnArrival:
    """A function that ends the process it is unpickled in."""

    def __call__(self, request: str) -> str:
        return request

    def __setstate__(self, state: object) -> None:
        os._exit(3)

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}  # else `__setstate__` is not called
