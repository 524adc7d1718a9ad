"""Checks of free space: for checkpoints before their upload, a local run, and copies of shards."""

from __future__ import annotations

import os
import shutil
import tempfile

import torch

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.doctor.finding import Finding, catch_errors, fail, ok, warn
from svfap_dist.model import autoencoder
from svfap_dist.profiling.memory import checkpoint_bytes
from svfap_dist.train.objective import build_arguments

_CHECKPOINTS, _RUN, _CACHE = "disk for checkpoints", "disk of run.url", "disk of data.cache_dir"


def examine(config: Config) -> list[Finding]:
    """Check the folder that checkpoints are staged in, a local run's, and the cache's.

    Args:
        config: the recipe.
    """
    with torch.device("meta"):
        model = autoencoder.build(**build_arguments(config))
    size = checkpoint_bytes(model, config.train)
    staging = tempfile.gettempdir()
    found = [catch_errors(_CHECKPOINTS, lambda: _check_staging(_free(staging), size, staging))]
    if config.run.url and not storage.is_remote(config.run.url):
        path = storage.local_path(config.run.url)
        kept = (config.train.keep_last + 1) * size
        found.append(catch_errors(_RUN, lambda: _check_run(_free(path), kept, path)))
    if config.data.cache_dir:
        cache = storage.local_path(config.data.cache_dir)
        limit = config.data.cache_bytes
        found.append(catch_errors(_CACHE, lambda: _check_cache(_free(cache), limit, cache)))
    return found


def _free(path: str) -> int:
    """Free bytes where a folder is, or will be."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _check_staging(free: int, checkpoint: int, folder: str) -> Finding:
    """All ranks may be on this machine, and two checkpoints overlap for a moment."""
    text = f"{_gib(free)} free in {folder}, a checkpoint of all ranks takes {_gib(checkpoint)}"
    if free >= 2 * checkpoint:
        return ok(_CHECKPOINTS, text)
    status = fail if free < checkpoint else warn
    return status(_CHECKPOINTS, text, "free space, or set TMPDIR to a larger disk")


def _check_run(free: int, kept: int, folder: str) -> Finding:
    text = f"{_gib(free)} free for {folder}, the checkpoints that are kept take {_gib(kept)}"
    if free < kept:
        return fail(_RUN, text, "free space, or lower train.keep_last")
    return ok(_RUN, text)


def _check_cache(free: int, limit: int, folder: str) -> Finding:
    text = f"{_gib(free)} free for {folder}, data.cache_bytes allows {_gib(limit)}"
    if free < limit:
        return warn(_CACHE, text, "lower data.cache_bytes; existing copies already count")
    return ok(_CACHE, text)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
