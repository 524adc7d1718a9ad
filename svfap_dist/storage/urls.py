"""What a URL names: a local path or a place in a store, and the file system that serves it."""

from __future__ import annotations

import os
import re
from typing import Any

from svfap_dist.storage.counting import counter

# A wrong endpoint must be told within seconds, while a store that is busy (SlowDown, 503) or drops
# a connection gets its second chance. The client retries requests; s3fs on top, broken bodies.
_S3_CLIENT_CONFIG = {
    "connect_timeout": 3,
    "read_timeout": 60,
    "retries": {"total_max_attempts": 3, "mode": "standard"},
}
_S3FS_ATTEMPTS = 2
_REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://")


def is_remote(url: str) -> bool:
    """Whether `url` names an object store and not a local path."""
    return _REMOTE.match(url) is not None


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or path, with a slash where `url` does not end in one.

    The parts stay as they are: to a store, `a//b` and `a/b` are two keys.
    """
    return "/".join([url.removesuffix("/"), *parts])


def local_path(url: str) -> str:
    """The path of a `file://` URL or of a plain path."""
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it, for libraries that take the two."""
    import fsspec

    if not is_remote(url):
        return fsspec.filesystem("file"), local_path(url)
    protocol = url.partition("://")[0]
    # Not `fsspec.core.url_to_fs`, which takes a `::` within a name for a chain of file systems.
    if protocol != "s3":
        kind = fsspec.get_filesystem_class(protocol)
        return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)
    from svfap_dist.storage.s3 import LiteralS3

    # Stores other than AWS often lack the newer checksum headers (Ceph RGW answers 411 or 400).
    if endpoint():
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    # The endpoint is named here, and not only by the environment, because fsspec keeps one
    # file system object per set of options.
    fs: Any = LiteralS3(
        endpoint_url=endpoint(), config_kwargs=_S3_CLIENT_CONFIG, use_listings_cache=False
    )
    fs.retries = _S3FS_ATTEMPTS
    # Again at each call, which is cheap, for s3fs may have made another client meanwhile.
    fs.s3.meta.events.register("request-created.s3", counter.sent, unique_id="svfap-retries")
    return fs, url.removeprefix("s3://")


def endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
