"""Measure what a host does to launch the work of a GPU, on a machine without one.

Python, torch's dispatcher and autograd take the same time for operations of any size. So the
recipe's network is run here as deep as it is, but a few numbers wide: what remains is the host's
share. Its operations are counted, too; each is a kernel on a GPU, unless it is compiled.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist.config import Config
from svfap_dist.profiling.operations import counted
from svfap_dist.profiling.timing import seconds_of

NARROW: dict[str, object] = {
    "embed_dim": 8,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_num_heads": 2,
}
_PATCHES = 4  # of a frame's side
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class HostCost:
    """Forward and backward pass of a micro batch of any size."""

    seconds: float  # CPU time of the thread that launches
    operations: int  # that would be kernels


def narrow_recipe(config: Config) -> Config:
    """Return a recipe whose network is as deep, but so narrow that computing takes no time.

    Args:
        config: Recipe.
    """
    data = {"frame_size": _PATCHES * config.model.patch_size}
    train = {"dtype": "float32"}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=NARROW),
            "data": config.data.model_copy(update=data),
            "train": config.train.model_copy(update=train),
        }
    )


def measure_host(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> HostCost:
    """Measure the host's share of a forward and backward pass, in this thread.

    Args:
        model: Network of a narrow recipe, on the CPU.
        loss: Returns its loss on a clip.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that this thread's time is all of it
    # oneDNN prepares small products at length. Its `flags` would also set, and warn of, TF32.
    library: Any = torch.backends.mkldnn
    was_enabled, library.enabled = library.enabled, False
    try:
        loss(model).backward()
        with counted(torch.device("cpu")) as operations:
            loss(model).backward()
        times = [
            seconds_of(lambda: loss(model).backward(), time.thread_time) for _ in range(_REPEATS)
        ]
    finally:
        library.enabled = was_enabled
        torch.set_num_threads(threads)
    return HostCost(statistics.median(times), operations.launched.total())
