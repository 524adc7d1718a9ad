"""Keep a GPU's rank on the cores next to its GPU.

On a machine with several sockets, a batch that is decoded on one and copied to a GPU of another
crosses the link between them twice. NVML knows which cores are near a GPU. Threads and processes
that are started later inherit them: feeders, decode workers, the threads that fetch.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from typing import Any

log = logging.getLogger(__name__)

_WORD = 64  # cores in a number of NVML's mask


def bind_to_gpu(device: int, min_cores: int) -> set[int]:
    """Restrict this thread, and what it starts from now on, to the cores next to a GPU.

    Args:
        device: torch's index of the GPU.
        min_cores: Cores that the rank needs; with fewer near ones, nothing is restricted.

    Returns:
        The cores that it may use now: unchanged if NVML or its package is missing, or if too few
        near cores are known.
    """
    allowed = os.sched_getaffinity(0)
    near = _cores_near(device) & allowed
    if len(near) < max(min_cores, 1) or near == allowed:
        return allowed
    os.sched_setaffinity(0, near)
    log.info("GPU %d: bound to the %d of %d cores next to it.", device, len(near), len(allowed))
    return near


def _cores_near(device: int) -> set[int]:
    """Return the cores of the socket that a GPU is attached to, by NVML; empty: unknown."""
    # NVML's errors have no base class of their own; without an answer a run is only slower.
    with contextlib.suppress(Exception):
        import torch

        pynvml: Any = importlib.import_module("pynvml")  # of nvidia-ml-py
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            words = pynvml.nvmlDeviceGetCpuAffinity(handle, -(-(os.cpu_count() or 1) // _WORD))
        finally:
            pynvml.nvmlShutdown()
        mask = sum(word << _WORD * number for number, word in enumerate(words))
        return {core for core in range(mask.bit_length()) if mask >> core & 1}
    return set()
