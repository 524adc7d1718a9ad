"""S3 whose keys mean nothing but themselves.

s3fs reads more than a name into some of them: `?versionId=` asks for a version of another key.
"""

from __future__ import annotations

import s3fs


class LiteralS3(s3fs.S3FileSystem):
    """s3fs with every character of a key taken as part of its name.

    It is a class at the top of a module because Ray pickles its objects.
    """

    def split_path(self, path: str) -> tuple[str, str, str | None]:
        """See `S3FileSystem.split_path`; a key never names a version."""
        bucket, key = self._find_bucket_key(path.removeprefix("s3://").lstrip("/"))
        return bucket, key, None
