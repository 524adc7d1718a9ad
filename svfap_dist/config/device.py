"""Decide where a recipe with `cluster.use_gpu = "auto"` computes.

The command that starts a run decides, once, and the run stores what was decided.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from svfap_dist.config.config import Config

log = logging.getLogger(__name__)


def with_device(config: Config, has_gpus: Callable[[], bool]) -> Config:
    """Return the recipe with cluster.use_gpu decided; one that decides itself is returned as it is.

    Args:
        config: The recipe.
        has_gpus: Returns whether there is a GPU for each rank.
    """
    if config.cluster.use_gpu != "auto":
        return config
    found = has_gpus()
    if found:
        log.info("Computing on GPUs (cluster.use_gpu = auto).", extra={"once": True})
    else:
        message = "Computing on the CPU: no GPU for each rank (cluster.use_gpu = auto)."
        log.warning(message, extra={"once": True})
    cluster = config.cluster.model_copy(update={"use_gpu": found})
    return config.model_copy(update={"cluster": cluster})
