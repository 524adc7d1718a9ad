"""S3 with literal keys.

s3fs interprets some keys: `?versionId=` selects a version of another key, and where it deletes,
copies or reads several keys, `*`, `?` and `[...]` are patterns that match other ones.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import s3fs

_KEYS_PER_DELETION = 1000  # the limit of S3's DeleteObjects


class LiteralS3(s3fs.S3FileSystem):
    """An s3fs file system to which every character of a key is part of its name.

    The class is at the top level of a module because Ray pickles its objects.
    """

    def split_path(self, path: str) -> tuple[str, str, str | None]:
        """See `S3FileSystem.split_path`; a key never names a version."""
        bucket, key = self._find_bucket_key(path.removeprefix("s3://").lstrip("/"))
        return bucket, key, None

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
