"""Where batches are made: a ring of them in shared memory, and the threads and workers for it.

In: the configuration and how many clips a batch has. Out: memory that workers write frames to and
the rank reads tensors from, and a pool of threads for the loader's tasks. A batch's place is free
again when the one after it has been asked for, so the ring bounds the memory of all that is
prepared ahead.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from svfap_dist.config import Config
from svfap_dist.data.device_cutter import DeviceCutter
from svfap_dist.data.shared_arrays import SharedArrays, shapes
from svfap_dist.data.workers import Workers
from svfap_dist.errors import ConfigError
from svfap_dist.video.backends import DEFAULT, capabilities
from svfap_dist.video.color import YuvClips

_MOST_SLOTS_AT_A_TIME = 16
_FEWEST_AHEAD, _MOST_AHEAD = 2, 16  # batches; more than a few gain nothing, whatever the memory


def ring_length(config: Config, clips: int, planes: tuple[int, int] | None = None) -> int:
    """Batches of so many clips that `data.prefetch_bytes` allows, and one that is in use."""
    ((_, one), *_) = shapes(config, 1, clips, planes).values()
    batch_bytes = math.prod(one) if planes is None else math.prod(one) * 3 // 2
    fitting = config.data.prefetch_bytes // batch_bytes
    return 1 + min(max(fitting, _FEWEST_AHEAD), _MOST_AHEAD)


class Ring:
    """Batches in shared memory (on the device, for a batched backend), and the threads and workers
    that fill them; a context manager.

    Args:
        clips: of a batch. length: batches; 0: as many as data.prefetch_bytes allows, and one that
            is in use. planes: height and width of planes to hand over; None: RGB.
    """

    def __init__(
        self, config: Config, clips: int, length: int = 0, planes: tuple[int, int] | None = None
    ) -> None:
        self._size = config.data.frame_size
        self._pinned = config.cluster.use_gpu and not length
        self.length = length = length or ring_length(config, clips, planes)
        threads = config.data.decode_threads
        self._shared: SharedArrays | None = None
        if capabilities(config.decode.backend).batched:
            device = "cuda" if config.cluster.use_gpu else "cpu"
            ((_, shape),) = shapes(config, length, clips, None).values()
            self._tensors = {"rgb": torch.empty(shape, dtype=torch.uint8, device=device)}
            self.workers = DeviceCutter(config, self.rgb)
            # They wait for one another: so many fetch as make a batch, and as many for the next.
            threads = max(threads, 2 * clips // config.data.repeated_sampling)
        else:
            self._shared = SharedArrays(shapes(config, length, clips, planes))
            self._tensors = {name: torch.from_numpy(a) for name, a in self._shared.arrays.items()}
            self.workers = Workers(config, self._shared)
        self.slots_at_a_time = self._slots_at_a_time(config, clips)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="clips")

    def _slots_at_a_time(self, config: Config, clips: int) -> int:
        """A few where workers have to be woken, but so that each has its share of a batch."""
        workers = config.data.decode_workers
        if self._shared is None or not workers:
            return 1
        slots = clips // config.data.repeated_sampling
        return max(1, min(_MOST_SLOTS_AT_A_TIME, slots // (2 * workers)))

    @property
    def rgb(self) -> torch.Tensor:
        """All frames, where they are RGB: uint8 [length, B, F, S, S, 3]."""
        return self._tensors["rgb"]

    def frames(self, place: int) -> torch.Tensor | YuvClips:
        """The clips of one batch."""
        if "rgb" in self._tensors:
            return self.rgb[place]
        return YuvClips(**{k: t[place] for k, t in self._tensors.items()}, size=self._size)

    def __enter__(self) -> Ring:
        shared = self._shared
        if self._pinned and shared:  # lets the copy to a GPU run beside the computation
            torch.cuda.check_error(_cuda().cudaHostRegister(shared.address, shared.num_bytes, 0))
        return self

    def __exit__(self, *_: object) -> None:
        """However the block is left, threads and processes are gone afterwards."""
        self.workers.interrupt()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.workers.close()
        if self._shared is None:
            return
        self._shared.close()
        if self._pinned:
            torch.cuda.check_error(_cuda().cudaHostUnregister(self._shared.address))


def check_made_by_workers(config: Config) -> None:
    """Check that a task's clips, which are augmented as RGB, are made where this is done.

    Raises: ConfigError if the recipe asks for the device.
    """
    if config.task is None:
        return
    backend, colors = config.decode.backend, config.data.colors
    for key, value, other, is_on_device in (
        ("decode.backend", backend, DEFAULT, capabilities(backend).batched),
        ("data.colors", colors, "workers", colors == "device"),
    ):
        if is_on_device:
            raise ConfigError(
                "Clips of a task are augmented before they come to the device",
                where=key,
                found=f"{value}, with a [task]",
                do=f"set {key}={other}, or leave it out",
            )


def _cuda() -> Any:
    return torch.cuda.cudart()
