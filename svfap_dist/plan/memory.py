"""Bytes that a rank needs, by ZeRO stage: arithmetic on what `profiling.memory` counted.

Weights, gradients and the optimizer's numbers follow from their count and from what DeepSpeed
partitions at each stage (tests compare with a running engine). Batches prepared ahead are the
loader's ring, which is in the host's memory where there is a GPU. Not counted: torch's own context
(about a gigabyte on a GPU), fragmentation, temporary copies, DeepSpeed's and the reader's caches.
"""

from __future__ import annotations

import dataclasses

from svfap_dist.profiling.memory import ADAM_MOMENTS, FLOAT_BYTES, ModelBytes
from svfap_dist.train.engine import REDUCE_BUCKET


@dataclasses.dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank. `total` is the device's; it includes prefetch where that is the host."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    prefetch: int
    total: int


def rank_bytes_by_stage(
    model: ModelBytes, world_size: int, clips: int, prefetch: int, on_gpu: bool
) -> dict[int, RankBytes]:
    """Return the bytes of a rank for each ZeRO stage that the model's type can have.

    Args:
        model: counted by `profiling.memory.count_model`.
        world_size: ranks that share what a stage partitions.
        clips: of a micro batch.
        prefetch: bytes of the ring of batches.
        on_gpu: whether the ring is outside of the device's memory.
    """
    activations = clips * model.kept_per_clip
    found = {}
    for stage in (0, 1, 2, 3) if model.number_bytes == FLOAT_BYTES else (1, 2, 3):
        weights, gradients, optimizer = _states(model, world_size, stage)
        device = weights + gradients + optimizer + activations
        total = device if on_gpu else device + prefetch
        found[stage] = RankBytes(weights, gradients, optimizer, activations, prefetch, total)
    return found


def _states(model: ModelBytes, world_size: int, stage: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer, as DeepSpeed 0.19 holds them.

    Stage 0 updates the weights in place; the others a rank's share of float32 copies, in float32
    runs, too. Stage 3 partitions the weights, but keeps gathered ones below 1e9 weights, and all
    models here are smaller. Stages 2 and 3 reduce gradients by the bucket.
    """
    numbers, weights = model.parameters, model.parameters * model.number_bytes
    share = -(-numbers // world_size)
    bucket = min(numbers, REDUCE_BUCKET) * model.number_bytes
    if stage == 0:
        return weights + model.buffers, weights, ADAM_MOMENTS * FLOAT_BYTES * numbers
    optimizer = (1 + ADAM_MOMENTS) * FLOAT_BYTES * share
    if stage == 1:
        return weights + model.buffers, weights, optimizer
    gradients = share * model.number_bytes + bucket
    if stage == 2:
        return weights + model.buffers, gradients, optimizer
    return share * model.number_bytes + weights + model.buffers, gradients, optimizer
