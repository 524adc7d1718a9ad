"""Files by URL: local paths, `file://`, `s3://` and other stores through fsspec.

Shards, manifests, checkpoints and run files are read and written here only. Two guarantees: a write
is atomic, and failures are `StorageError`, never exceptions of a client library.

S3 settings come from the usual AWS variables and `AWS_ENDPOINT_URL`. File system objects are made
lazily in the process that uses them: an s3fs object that crosses a fork deadlocks (s3fs#369).

Start with `files` (read, write, delete) and `listing`; `s3` corrects how s3fs reads keys, and makes
ranged reads cheaper; `credentials` refuses URLs that contain some.
"""

# ruff: noqa: F401 - the names are for others

from svfap_dist.errors import StorageError
from svfap_dist.storage.credentials import refuse_credentials
from svfap_dist.storage.files import (
    OPERATIONS,
    OUTCOMES,
    READ,
    WRITE,
    RequestCounts,
    StorageMissingError,
    StorageUnreachableError,
    add_request_counts,
    check_writable,
    delete,
    delete_unfinished,
    download_file,
    exists,
    explain,
    file_size,
    filesystem,
    is_remote,
    join,
    local_path,
    read_buffer,
    read_bytes,
    read_range,
    request_counts,
    upload_file,
    write_bytes,
)
from svfap_dist.storage.listing import list_files, list_folders, walk_files
