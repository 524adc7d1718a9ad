"""The output of an extraction, checked before hours of work go into it."""

from __future__ import annotations

import os

from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.video.names import suffix_of


def check_output(url: str, format: str) -> None:
    """Check that an output fits its format; an NPZ file also that it can be written.

    Args:
        url: path or URL of an NPZ file, or folder or prefix of Parquet files.
        format: npz or parquet.

    Raises:
        ConfigError: It is a name of the other format.
        StorageError: It cannot be written.
    """
    path = "" if storage.is_remote(url) else storage.local_path(url)
    if format == "parquet":
        if suffix_of(url) == "npz" or os.path.isfile(path):
            raise ConfigError(
                "Parquet needs a folder or prefix",
                where="--output",
                found=f"{url}, the name of a file",
                do="name a folder, or use --format npz",
            )
        return
    is_folder = url.endswith("/") or os.path.isdir(path)
    if is_folder or suffix_of(url) == "parquet":
        raise ConfigError(
            "NPZ needs the name of a file",
            where="--output",
            found=f"{url}, {'a folder' if is_folder else 'a name of Parquet files'}",
            do="name a file such as features.npz, or use --format parquet",
        )
    storage.check_writable(url)
