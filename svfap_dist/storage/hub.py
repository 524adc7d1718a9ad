"""Networks on the Hugging Face Hub by URL: `hf://owner/name[@revision]` becomes a local folder.

The Hub's client keeps what it has downloaded in its cache and checks for newer versions; with
HF_HUB_OFFLINE=1 it uses the cache alone. Private repositories need HF_TOKEN.
"""

from __future__ import annotations

import re

from svfap_dist.errors import ConfigError, StorageError
from svfap_dist.storage.files import (
    READ,
    StorageMissingError,
    StorageUnreachableError,
    counted_request,
)

HUB = "hf://"
_REPOSITORY = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?/?")
_FILES = ("model.safetensors", "config.json", "README.md")


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


def explain_hub(error: Exception, url: str) -> StorageError:
    """Return the `StorageError` for an exception of the Hub's client.

    Args:
        error: The exception.
        url: Repository concerned.
    """
    from huggingface_hub import errors

    title, found = "Cannot use the Hugging Face Hub", str(error).strip().splitlines() or [""]
    if isinstance(error, errors.GatedRepoError):
        do = "accept its conditions on its page, then set HF_TOKEN"
        return StorageError(title, url, "a gated repository", do)
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        do = "check the name and revision; a private repository needs HF_TOKEN"
        return StorageMissingError(title, url, "no such repository or revision", do)
    if isinstance(error, errors.LocalEntryNotFoundError | OSError | TimeoutError) and not (
        isinstance(error, errors.HfHubHTTPError)
    ):
        do = "check the network and HF_ENDPOINT, then run the same command again"
        return StorageUnreachableError(title, url, f"no answer ({found[0]})", do)
    do = "see the Hub's message; writing needs a token with that right in HF_TOKEN"
    return StorageError(title, url, f"{type(error).__name__}: {found[0]}", do)
