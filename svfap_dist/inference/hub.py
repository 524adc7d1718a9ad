"""Networks of the Hugging Face Hub: `HubNetwork.from_pretrained`, and `push`.

In: a repository or folder that `svfap export --format huggingface` wrote. Out: what
`svfap_dist.load` returns, with the methods of huggingface_hub's mixin. Only this package's code
runs: a repository has weights (safetensors), config.json and a model card, and no code.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, PyTorchModelHubMixin

from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.inference.card import CARD
from svfap_dist.inference.load import Network, network_of, open_model
from svfap_dist.model import weights
from svfap_dist.storage.hub import explain_hub

FILES = (weights.WEIGHTS, CARD, weights.BUILD)


class HubNetwork(Network, PyTorchModelHubMixin, library_name="svfap-dist", tags=["svfap"]):
    """A `Network` that loads by `from_pretrained`, from a folder or from the Hub."""

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **overrides: Any,
    ) -> HubNetwork:
        """Return the network; see `ModelHubMixin.from_pretrained`. overrides: as `load.load`."""
        del strict  # weights that do not fit are always an error
        folder = model_id
        if not os.path.isdir(model_id):
            folder = huggingface_hub.snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=list(FILES),
            )
        found = network_of(*open_model(folder, overrides))
        network = cls(found.info, found.encoder, found.fc_norm, found.head, found.pool)
        return network.eval().to(map_location)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Refuse: a network has lost what training needs; `svfap export` writes all of it."""
        raise ConfigError(
            "Saving with save_pretrained is not supported",
            where=str(save_directory),
            found="a call of save_pretrained or push_to_hub",
            do="use `svfap export CHECKPOINT --format huggingface -o DIR --push OWNER/NAME`",
        )


def push(folder: str, repository: str) -> str:
    """Upload an export in one commit; a repository that does not exist is created, as private.

    The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` stored.

    Args:
        folder: path or URL that `svfap export --format huggingface` wrote.
        repository: its name on the Hub, owner/name.

    Returns:
        The URL of the commit.

    Raises:
        ConfigError: The name has another form.
        StorageError: The Hub refuses or does not answer.
    """
    if repository.count("/") != 1:
        raise ConfigError("Not the name of a repository", "--push", repository, "give OWNER/NAME")
    with tempfile.TemporaryDirectory(prefix="svfap-push-") as local:
        operations = []
        for name in FILES:
            path = os.path.join(local, name)
            storage.download_file(storage.join(folder, name), path)
            operations.append(CommitOperationAdd(name, path))
        try:
            api = HfApi(library_name="svfap-dist")
            api.create_repo(repository, private=True, exist_ok=True)
            message = "Upload a network exported by svfap"
            commit = api.create_commit(repository, operations, commit_message=message)
        except Exception as error:
            raise explain_hub(error, f"hf://{repository}", writes=True) from error
    return commit.commit_url
