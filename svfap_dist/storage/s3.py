"""S3 with literal keys, and with ranged reads that cost little.

s3fs interprets some keys: `?versionId=` selects a version of another key, and where it deletes,
copies or reads several keys, `*`, `?` and `[...]` are patterns that match other ones.

A request of s3fs takes 1 to 2 ms of Python, all in one thread. Ranged reads are most of a run's
requests, so they are made by obstore, if it is installed: Rust, on threads of its own (`svfap bench
storage` measures both). What fails there is repeated by s3fs, so retries, redirects and errors are
its own.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import s3fs

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 10.0  # after a failure, in which s3fs makes the requests
_CREDENTIAL_MINUTES = 10  # obstore asks again for credentials; botocore renews them
_stores_lock = threading.Lock()
_KEYS_PER_DELETION = 1000  # the limit of S3's DeleteObjects


class LiteralS3(s3fs.S3FileSystem):
    """An s3fs file system to which every character of a key is part of its name.

    The class is at the top level of a module because Ray pickles its objects.
    """

    _range_stores: dict[str, _RangeStore] | None = None  # by bucket

    def split_path(self, path: str) -> tuple[str, str, str | None]:
        """See `S3FileSystem.split_path`; a key never names a version."""
        bucket, key = self._find_bucket_key(path.removeprefix("s3://").lstrip("/"))
        return bucket, key, None

    def read_directly(
        self, path: str, start: int, stop: int, on_failure: Callable[[], None]
    ) -> memoryview | None:
        """Return the bytes [start, stop) of an object by obstore, or None where that cannot be.

        Args:
            path: Bucket and key.
            start: First byte.
            stop: Byte after the last one.
            on_failure: Called where a request failed that s3fs may succeed with.
        """
        bucket, key, _ = self.split_path(path)
        if key != key.strip("/"):  # obstore would strip it
            return None
        with _stores_lock:
            if self._range_stores is None:
                self._range_stores = {}
            if bucket not in self._range_stores:
                self._range_stores[bucket] = _RangeStore(bucket, self.endpoint_url)
            store = self._range_stores[bucket]
        return store.read(key, start, stop, on_failure)

    async def _expand_path(
        self,
        path: str | Sequence[str],
        recursive: bool = False,
        maxdepth: int | None = None,
        assume_literal: bool = True,
    ) -> list[str]:
        # Given a str, the method of s3fs calls itself without `assume_literal`.
        paths = [path] if isinstance(path, str) else path
        return await super()._expand_path(paths, recursive, maxdepth, assume_literal=True)

    async def _rm(self, path: str | Sequence[str], recursive: bool = False, **_: Any) -> None:
        # The method of s3fs strips the slashes that a prefix begins with, so it finds other keys,
        # and given a bucket it deletes the bucket itself, too.
        for each in [path] if isinstance(path, str) else path:
            bucket, key, _version = self.split_path(each)
            keys = [key] if await self._is_key(each) else []
            if recursive:
                prefix = key if not key or key.endswith("/") else f"{key}/"
                keys += [found async for found in self._keys_below(bucket, prefix)]
            for start in range(0, len(keys), _KEYS_PER_DELETION):
                objects = [{"Key": key} for key in keys[start : start + _KEYS_PER_DELETION]]
                request = {"Objects": objects, "Quiet": True}
                answer = await self._call_s3("delete_objects", Bucket=bucket, Delete=request)
                for refused in answer.get("Errors", []):
                    kind = PermissionError if refused["Code"] == "AccessDenied" else OSError
                    raise kind(f"{refused['Key']}: {refused['Code']}")

    async def _is_key(self, path: str) -> bool:
        try:
            return (await self._info(path))["type"] == "file"
        except FileNotFoundError:
            return False

    async def _keys_below(self, bucket: str, prefix: str) -> AsyncIterator[str]:
        more: dict[str, str] | None = {}
        while more is not None:
            request = {"Bucket": bucket, "Prefix": prefix} | more
            page = await self._call_s3("list_objects_v2", **request)
            for file in page.get("Contents", []):
                yield file["Key"]
            token = page.get("NextContinuationToken")
            more = {"ContinuationToken": token} if token else None


class _RangeStore:
    """Ranged reads of a bucket by obstore.

    Args:
        bucket: The bucket.
        endpoint: URL of the store; None: AWS.
    """

    def __init__(self, bucket: str, endpoint: str | None) -> None:
        self._store, self._paused_until = _open_store(bucket, endpoint), 0.0

    def read(
        self, key: str, start: int, stop: int, on_failure: Callable[[], None]
    ) -> memoryview | None:
        """See `LiteralS3.read_directly`."""
        if self._store is None or time.monotonic() < self._paused_until:
            return None
        try:
            return memoryview(self._store.get_range(key, start=start, end=stop))
        except (FileNotFoundError, ValueError):  # no such key; or one that obstore would change
            return None
        except Exception as error:
            if "status code: 416" not in str(error):  # a range after the end
                log.debug("obstore cannot read %s: %s", key, error)
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                on_failure()
            return None


def _open_store(bucket: str, endpoint: str | None) -> Any:
    """Return obstore's client of a bucket, with botocore's credentials; None: there is none."""
    try:
        from obstore.store import S3Store
    except ImportError:
        return None
    import botocore.session

    session = botocore.session.get_session()
    credentials = session.get_credentials()
    if credentials is None:
        return None
    # A node has many processes that read; by default each would have a thread per core.
    os.environ.setdefault("TOKIO_WORKER_THREADS", "2")

    def provide() -> dict[str, Any]:
        keys = credentials.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=_CREDENTIAL_MINUTES),
        }

    config: dict[str, Any] = {
        "region": session.get_config_variable("region") or "us-east-1",
        "virtual_hosted_style_request": False,
    }
    if endpoint:
        config["endpoint"] = endpoint
    client = {"allow_http": True, "connect_timeout": "3s", "timeout": "120s"}
    if bundle := session.get_config_variable("ca_bundle"):  # AWS_CA_BUNDLE
        client["root_certificate"] = Path(bundle).read_bytes()
    return S3Store(
        bucket,
        config=config,  # pyright: ignore[reportArgumentType] - a TypedDict that exists for checkers only
        client_options=client,  # pyright: ignore[reportArgumentType] - the same
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=120)},
        credential_provider=provide,  # pyright: ignore[reportArgumentType] - the same
    )
