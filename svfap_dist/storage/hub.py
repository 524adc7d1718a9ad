"""Networks on the Hugging Face Hub by URL: `hf://owner/name[@revision]` becomes a local folder.

The Hub's client keeps what it has downloaded in its cache and checks for newer versions; with
HF_HUB_OFFLINE=1 it uses the cache alone. Private repositories need HF_TOKEN.
"""

from __future__ import annotations

import errno
import re

from svfap_dist.errors import ConfigError, StorageError
from svfap_dist.storage.files import (
    READ,
    StorageMissingError,
    StorageUnreachableError,
    counted_request,
)

HUB = "hf://"
# All after @ is the revision, slashes included: refs/pr/1, feature/x.
_REPOSITORY = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@][^@]*?))?/?")
_FILES = ("model.safetensors", "config.json", "README.md")
_TITLE = "Cannot use the Hugging Face Hub"
_NO_ANSWER = ConnectionError | TimeoutError
_HTTP_CLIENTS = ("httpx", "httpx2")  # that versions of huggingface_hub use
_TOO_MANY_REQUESTS, _SERVER_ERROR, _REFUSED = 429, 500, (401, 403)  # HTTP statuses


def local_folder(url: str) -> str:
    """Return the folder with the files of a network on the Hub, downloaded if they are not cached.

    Args:
        url: `hf://owner/name` or `hf://owner/name@revision`; any other URL is returned as it is.

    Raises:
        ConfigError: The URL has another form.
        StorageMissingError: There is no such repository or revision for this user.
        StorageError: The Hub refuses or does not answer.
    """
    if not url.startswith(HUB):
        return url
    parts = _REPOSITORY.fullmatch(url)
    if parts is None:
        raise ConfigError(
            "Not the URL of a network on the Hub",
            where="CHECKPOINT",
            found=url,
            do="give hf://owner/name or hf://owner/name@revision",
        )
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with counted_request(READ, url):
        try:
            return huggingface_hub.snapshot_download(
                parts["name"], revision=parts["revision"], allow_patterns=list(_FILES)
            )
        except Exception as error:
            raise explain_hub(error, url) from error


def explain_hub(error: Exception, url: str, writes: bool = False) -> StorageError:
    """Return the `StorageError` for an exception of the Hub's client.

    Args:
        error: The exception.
        url: Repository concerned.
        writes: Whether it was to be written to.
    """
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        error = cause  # the Hub's answer, where the client's error is about its cache
    found = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, errors.GatedRepoError):
        do = "accept its conditions on its page, then set HF_TOKEN"
        return StorageError(_TITLE, url, "a gated repository", do)
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        needed = "a token with the right to write to it" if writes else "that of a private one"
        do = f"check the name and revision, and HF_TOKEN: {needed}"
        return StorageMissingError(_TITLE, url, "no such repository or revision", do)
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(error.response.status_code, found, url, writes)
    is_of_client = type(error).__module__.partition(".")[0] in _HTTP_CLIENTS
    if is_of_client or isinstance(error, _NO_ANSWER | errors.LocalEntryNotFoundError):
        do = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then run the same command again"
        return StorageUnreachableError(_TITLE, url, f"no answer ({found})", do)
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_disk(error)
    return StorageError(_TITLE, url, f"{type(error).__name__}: {found}", "see the Hub's message")


def _explain_answer(status: int, found: str, url: str, writes: bool) -> StorageError:
    """Return the error for an answer with an HTTP status that means a failure."""
    if status == _TOO_MANY_REQUESTS or status >= _SERVER_ERROR:
        do = "wait, then run the same command again"
        return StorageUnreachableError(_TITLE, url, f"status {status}: {found}", do)
    do = "see the Hub's message"
    if status in _REFUSED:
        do = f"set HF_TOKEN to a valid token with the right to {'write' if writes else 'read'}"
    return StorageError(_TITLE, url, f"status {status}: {found}", do)


def _explain_disk(error: OSError) -> StorageError:
    """Return the error for a cache that cannot be written."""
    from huggingface_hub import constants

    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free space there" if is_full else "check the permissions there"
    where, found = error.filename or constants.HF_HUB_CACHE, error.strerror or str(error)
    do = f"{advice}, or set HF_HUB_CACHE to another folder"
    return StorageError("Cannot write to the cache of the Hugging Face Hub", where, found, do)
