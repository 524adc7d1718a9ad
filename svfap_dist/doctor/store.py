"""Checks of the store: put, get, list and delete below run.url, and read from data.url.

This machine's clock is compared with the store's in the same place, because S3 refuses requests
whose time is 15 minutes off.
"""

from __future__ import annotations

import os
import time
import uuid
from email.utils import parsedate_to_datetime

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.data.read_ahead import plan_reads
from svfap_dist.distributed import World
from svfap_dist.doctor.finding import OK, Finding, catch_errors, fail, ok, warn
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.mixture import open_training_data
from svfap_dist.shards.reader import BadSample, SampleReader

_BYTES = 1 << 16
_SKEW_WARNED, _SKEW_REFUSED = 30.0, 900.0  # seconds


def examine_run(url: str) -> list[Finding]:
    """Check put, get, list and delete below a run's URL, or its nearest existing folder.

    Args:
        url: run.url.
    """
    name = "run.url"
    if not url:
        return [warn(name, "not checked: it is empty", "give run.url=a folder or s3:// prefix")]
    folder = storage.join(_existing_folder(url), f"doctor-{uuid.uuid4().hex[:8]}")
    try:
        found = catch_errors(name, lambda: _put_get_list(url, folder))
        clocks = []
        if found.status == OK:
            clocks = [catch_errors("clock", lambda: _compare_clocks(folder))]
    finally:
        deleted = catch_errors("run.url, deleting", lambda: _delete(folder))
    return [deleted if found.status == OK and deleted.status != OK else found, *clocks]


def _existing_folder(url: str) -> str:
    """Return `url`, or the nearest existing folder above a local path, so that none is left."""
    if storage.is_remote(url):
        return url
    path = storage.local_path(url)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _put_get_list(url: str, folder: str) -> Finding:
    name, where, data = "run.url", storage.join(folder, "probe"), os.urandom(_BYTES)
    began = time.perf_counter()
    storage.write_bytes(where, data)
    if storage.read_bytes(where) != data:
        return fail(name, f"{url}: read back other bytes than written", "do not train on it")
    if storage.list_files(folder) != {"probe": _BYTES}:
        advice = "use a store that lists new files immediately, as S3 does: checkpoints rely on it"
        return fail(name, f"{url}: a file just written is not listed", advice)
    milliseconds = (time.perf_counter() - began) * 1000
    return ok(name, f"{url}: put, get and list in {milliseconds:.0f} ms")


def _delete(folder: str) -> Finding:
    storage.delete(folder)
    if storage.exists(storage.join(folder, "probe")):
        found = f"{folder}: still there after deletion"
        return fail("run.url", found, "allow deleting (s3:DeleteObject)")
    return ok("run.url", "deleted")


def _compare_clocks(folder: str) -> Finding:
    """Compare this machine's clock with the store's."""
    where = storage.join(folder, "probe")
    before = time.time()
    if where.startswith("s3://"):
        fs, path = storage.filesystem(where)
        bucket, _, key = path.partition("/")
        answer = fs.call_s3("head_object", Bucket=bucket, Key=key)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        if not date:
            return ok("clock", "the store sends no time")
        theirs = parsedate_to_datetime(date).timestamp() + 0.5  # it comes in whole seconds
    elif storage.is_remote(where):
        return ok("clock", "not compared: only S3 and folders have one")
    else:
        storage.write_bytes(where, b"")
        theirs = os.stat(storage.local_path(where)).st_mtime
    return _check_clock((before + time.time()) / 2 - theirs)


def _check_clock(ahead: float) -> Finding:
    """Judge by how many seconds this machine's clock is ahead of the store's."""
    name, advice = "clock", "set it by NTP: systemctl enable --now systemd-timesyncd (or chrony)"
    text = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
    if abs(ahead) >= _SKEW_REFUSED:
        return fail(name, f"{text}: S3 refuses requests", advice)
    if abs(ahead) >= _SKEW_WARNED:
        return warn(name, text, advice)
    return ok(name, text)


def examine_data(config: Config) -> list[Finding]:
    """Check that the shards of data.url can be listed and a sample be read.

    Args:
        config: the recipe.
    """
    name = "data.url"
    if not any(config.data.urls):
        return [warn(name, "not checked: it is empty", "give data.url=a folder or s3:// prefix")]
    return [catch_errors(name, lambda: _read_sample(config))]


def _read_sample(config: Config) -> Finding:
    name = "data.url"
    manifest = open_training_data(config)
    text = f"{', '.join(config.data.urls)}: {manifest.num_samples} samples in "
    text += f"{len(manifest.shards)} shards, profile {manifest.profile}"
    if manifest.num_samples < config.samples_per_step:
        advice = "lower train.global_batch_size, or shard more videos"
        return fail(name, f"{text}; a step takes {config.samples_per_step}", advice)
    sample = SampleReader(config.data.url, manifest, range_bytes=1, cache_bytes=1).read(0)
    if isinstance(sample, BadSample):
        advice = "run `svfap shards verify` on data.url"
        return fail(name, f"{text}; the first is {sample.reason}: {sample.detail}", advice)
    return _judge_reads(config, manifest, text)


def _judge_reads(config: Config, manifest: Manifest, text: str) -> Finding:
    """Judge whether this node has the memory to read each byte once."""
    import torch

    name, ranks, gpus = "data.url", config.world_sizes[-1], torch.cuda.device_count()
    if config.cluster.on_gpu and not gpus:  # ranks are on nodes of other memory
        return ok(name, text)
    world = World(0, 0, ranks, min(ranks, gpus) if config.cluster.on_gpu else ranks)
    reads = plan_reads(config, manifest, world)
    text += f"; a rank keeps {reads.needed >> 20} MiB of samples"
    if reads.passes == 1:
        return ok(name, text)
    advice = "more memory (data.read_ahead_bytes), more ranks or a smaller data.shuffle_block"
    found = f"{text}, of which {reads.limit >> 20} MiB fit: each byte is read {reads.passes} times"
    return warn(name, found, advice)
