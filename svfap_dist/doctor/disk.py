"""Room on this machine's disks: for checkpoints on their way to the store, and copies of shards."""

from __future__ import annotations

import os
import shutil
import tempfile

import torch

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.doctor.finding import Finding, fail, failing, ok, warn
from svfap_dist.model import autoencoder
from svfap_dist.profiling import memory
from svfap_dist.train.objective import build_arguments


def examine(config: Config) -> list[Finding]:
    """Of the folder that checkpoints are written to first, of the cache, of a local run."""
    with torch.device("meta"):
        model = autoencoder.build(**build_arguments(config))
    size = memory.checkpoint_bytes(model, config.train)
    staging = tempfile.gettempdir()
    found = [failing("disk for checkpoints", lambda: staged(_free(staging), size, staging))]
    if config.run.url and not storage.is_remote(config.run.url):
        path = storage.local_path(config.run.url)
        kept = (config.train.keep_last + 1) * size
        found.append(failing("disk of run.url", lambda: stored(_free(path), kept, path)))
    if config.data.cache_dir:
        path = storage.local_path(config.data.cache_dir)
        limit = config.data.cache_bytes
        found.append(failing("disk of data.cache_dir", lambda: cached(_free(path), limit, path)))
    return found


def _free(path: str) -> int:
    """Bytes free where a folder is, or will be."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def staged(free: int, checkpoint: int, folder: str) -> Finding:
    """Bytes free, and of one checkpoint of all ranks: they might all be here."""
    name = "disk for checkpoints"
    text = f"{_gib(free)} free in {folder}, a checkpoint of all ranks takes {_gib(checkpoint)}"
    if free < checkpoint:
        return fail(name, text, "free space, or set TMPDIR to a larger disk")
    if free < 2 * checkpoint:
        return warn(name, text, "free space, or set TMPDIR to a larger disk")
    return ok(name, text)


def stored(free: int, kept: int, folder: str) -> Finding:
    """Bytes free, and of the checkpoints that are kept with one that is being written."""
    text = f"{_gib(free)} free for {folder}, the checkpoints that are kept take {_gib(kept)}"
    if free < kept:
        return fail("disk of run.url", text, "free space, or lower train.keep_last")
    return ok("disk of run.url", text)


def cached(free: int, limit: int, folder: str) -> Finding:
    """Bytes free, and that copies of shards may take."""
    text = f"{_gib(free)} free for {folder}, data.cache_bytes allows {_gib(limit)}"
    if free < limit:
        advice = "lower data.cache_bytes; copies that are there already count"
        return warn("disk of data.cache_dir", text, advice)
    return ok("disk of data.cache_dir", text)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
