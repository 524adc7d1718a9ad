"""What the store allows: put, get, list and delete where the run will live, and the shards read.

The clock is compared with the store's, too, in the same place: S3 refuses requests whose time is a
quarter of an hour off, long before anybody looks at a clock.
"""

from __future__ import annotations

import os
import time
import uuid
from email.utils import parsedate_to_datetime

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.doctor.finding import Finding, fail, failing, ok, warn
from svfap_dist.shards.reader import BadSample, SampleReader, open_data

_BYTES = 1 << 16
_SKEW_TOLD, _SKEW_REFUSED = 30.0, 900.0  # seconds


def examine_run(config: Config) -> list[Finding]:
    """Put, get, list and delete below run.url, or below the nearest folder that is there."""
    name = "run.url"
    if not config.run.url:
        return [warn(name, "not checked: it is empty", "give run.url=a folder or s3:// prefix")]
    folder = storage.join(_existing(config.run.url), f"doctor-{uuid.uuid4().hex[:8]}")
    try:
        found = failing(name, lambda: _put_get_list(config.run.url, folder))
        clock = failing("clock", lambda: _clock(folder)) if found.status == "ok" else None
    finally:
        gone = failing("run.url, deleting", lambda: _deleted(folder))
    found = gone if found.status == "ok" and gone.status != "ok" else found
    return [found, *([clock] if clock else [])]


def _existing(url: str) -> str:
    """`url`, or of a local path the nearest folder above that exists: the others would be left."""
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
        return fail(name, f"{url}: other bytes came back than were put", "do not train on it")
    if storage.list_files(folder) != {"probe": _BYTES}:
        return fail(
            name,
            f"{url}: a file just put is not listed",
            "use a store that lists what was put at once, as S3 does: checkpoints rely on it",
        )
    milliseconds = (time.perf_counter() - began) * 1000
    return ok(name, f"{url}: put, get and list in {milliseconds:.0f} ms")


def _deleted(folder: str) -> Finding:
    storage.delete(folder)
    name = "run.url"
    if storage.exists(storage.join(folder, "probe")):
        return fail(name, f"{folder}: deleted, and still there", "allow deleting (s3:DeleteObject)")
    return ok(name, "deleted")


def _clock(folder: str) -> Finding:
    """This machine's clock against the store's."""
    where = storage.join(folder, "probe")
    before = time.time()
    if where.startswith("s3://"):
        fs, path = storage.filesystem(where)
        bucket, _, key = path.partition("/")
        answer = fs.call_s3("head_object", Bucket=bucket, Key=key)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        if not date:
            return ok("clock", "the store tells no time")
        theirs = parsedate_to_datetime(date).timestamp() + 0.5  # told in whole seconds
    elif storage.is_remote(where):
        return ok("clock", "not compared: only S3 and folders tell theirs")
    else:
        storage.write_bytes(where, b"")
        theirs = os.stat(storage.local_path(where)).st_mtime
    return clock((before + time.time()) / 2 - theirs)


def clock(ahead: float) -> Finding:
    """ahead: seconds that this machine's clock is before the store's."""
    name, advice = "clock", "set it by NTP: systemctl enable --now systemd-timesyncd (or chrony)"
    text = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
    if abs(ahead) >= _SKEW_REFUSED:
        return fail(name, f"{text}: S3 refuses requests", advice)
    if abs(ahead) >= _SKEW_TOLD:
        return warn(name, text, advice)
    return ok(name, text)


def examine_data(config: Config) -> list[Finding]:
    """List the shards of data.url and read a sample."""
    name, url = "data.url", config.data.url
    if not url:
        return [warn(name, "not checked: it is empty", "give data.url=a folder or s3:// prefix")]
    return [failing(name, lambda: _sample_read(config))]


def _sample_read(config: Config) -> Finding:
    name, url = "data.url", config.data.url
    manifest = open_data(config, url)
    text = f"{url}: {manifest.num_samples} samples in {len(manifest.shards)} shards, profile "
    text += manifest.profile
    if manifest.num_samples < config.samples_per_step:
        return fail(
            name,
            f"{text}; a step takes {config.samples_per_step}",
            "lower train.global_batch_size, or shard more videos",
        )
    sample = SampleReader(url, manifest, range_bytes=1, cache_bytes=1).read(0)
    if isinstance(sample, BadSample):
        advice = "run `svfap shards verify` on data.url"
        return fail(name, f"{text}; the first is {sample.reason}: {sample.detail}", advice)
    return ok(name, text)
