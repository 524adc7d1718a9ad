"""The learning rate of each optimizer step."""

from __future__ import annotations

import math

from svfap_dist.config import OptimConfig

_REFERENCE_BATCH = 256  # clips; the recipe's learning rates are for this global batch


def learning_rate_at(optim: OptimConfig, global_batch_size: int, total: int, step: int) -> float:
    """Return the learning rate of one update: linear warm-up, then half a cosine to `min_lr`.

    The warm-up's last step and the cosine's first one both have the full rate, as in the released
    code (VideoMAE's `cosine_scheduler`). A pure function: a resumed run needs no scheduler state.

    Args:
        optim: The recipe's section; its rates are scaled by global_batch_size / 256.
        global_batch_size: Clips of a step, over all ranks.
        total: Optimizer steps of the run.
        step: Steps completed before this update, from 0 to total - 1.
    """
    assert 0 <= step < total
    scale = global_batch_size / _REFERENCE_BATCH
    start, peak, end = optim.warmup_lr * scale, optim.lr * scale, optim.min_lr * scale
    warmup = round(total * optim.warmup_fraction)
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - 1)
    progress = (step - warmup) / (total - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2
