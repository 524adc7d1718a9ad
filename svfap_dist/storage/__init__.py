"""Files by URL: plain paths, `file://` and `s3://` through fsspec, with errors a user can act on.

All reads and writes of shards, manifests, checkpoints and run files go through here. Two promises:
a write is whole or absent (local files are written beside their target and renamed; an S3 put is
atomic by itself), and whatever the store answers comes out as `StorageError`, never as a client
library's exception.

S3 settings come from the usual AWS variables and `AWS_ENDPOINT_URL`. The file system object is made
lazily in the process that uses it: an s3fs object that crosses a fork hangs (s3fs#369).
"""

from svfap_dist.errors import StorageError
from svfap_dist.storage.counting import OPERATIONS, OUTCOMES, READ, WRITE, Counts, counts
from svfap_dist.storage.files import (
    delete,
    delete_unfinished,
    download_file,
    exists,
    read_bytes,
    read_range,
    upload_file,
    write_bytes,
)
from svfap_dist.storage.listing import list_files, walk_files
from svfap_dist.storage.requests import StorageMissing, StorageUnreachable, explain
from svfap_dist.storage.urls import filesystem, is_remote, join, local_path

__all__ = [
    "OPERATIONS",
    "OUTCOMES",
    "READ",
    "WRITE",
    "Counts",
    "StorageError",
    "StorageMissing",
    "StorageUnreachable",
    "counts",
    "delete",
    "delete_unfinished",
    "download_file",
    "exists",
    "explain",
    "filesystem",
    "is_remote",
    "join",
    "list_files",
    "local_path",
    "read_bytes",
    "read_range",
    "upload_file",
    "walk_files",
    "write_bytes",
]
