"""Length of a run and learning rate of each step: pure functions of the recipe.

Steps are counted from 0 here: `learning_rate(..., step)` is the rate of the update that turns
`step` completed steps into `step + 1`. The rate is set on the optimizer before every update, so a
resumed run needs no scheduler state.
"""

from __future__ import annotations

import math

from svfap_dist.config import OptimConfig, TrainConfig

REFERENCE_BATCH = 256  # clips; the recipe's learning rates are for this global batch


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Return the optimizer steps of the whole run: `max_steps`, or those of all epochs.

    Args:
        train: The recipe's section.
        steps_per_epoch: Optimizer steps of an epoch.
    """
    whole = train.epochs * steps_per_epoch
    return min(train.max_steps, whole) if train.max_steps else whole


def warmup_steps(optim: OptimConfig, total: int) -> int:
    """Return the optimizer steps over which the rate rises.

    Args:
        optim: The recipe's section.
        total: Optimizer steps of the run.
    """
    return round(total * optim.warmup_fraction)


def learning_rate(optim: OptimConfig, global_batch_size: int, total: int, step: int) -> float:
    """Return the learning rate of one update: linear warm-up, then half a cosine to `min_lr`.

    The three rates of the recipe are scaled by global_batch_size / 256. The warm-up's last step
    and the cosine's first one both have the full rate, as in the released code (VideoMAE's
    `cosine_scheduler`).

    Args:
        optim: The recipe's section.
        global_batch_size: Clips of a step, over all ranks.
        total: Optimizer steps of the run.
        step: Completed steps, from 0 to total - 1.
    """
    assert 0 <= step < total
    scale = global_batch_size / REFERENCE_BATCH
    start, peak, end = optim.warmup_lr * scale, optim.lr * scale, optim.min_lr * scale
    warmup = warmup_steps(optim, total)
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - 1)
    progress = (step - warmup) / (total - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2
