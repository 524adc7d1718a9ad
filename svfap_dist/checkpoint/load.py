"""What a run has learned so far, for those who only want to use it: weights and recipe.

In: the URL of a run (its newest committed checkpoint is meant) or of one checkpoint. Out: where its
full weights lie, and the recipe they were trained by. No DeepSpeed is needed to read either.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svfap_dist import storage
from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.state import TrainState
from svfap_dist.config import Config, recipe
from svfap_dist.errors import CheckpointError
from svfap_dist.model import weights


def locate(url: str) -> tuple[str, Config]:
    """URL of the weights (.safetensors) and the recipe of a run or checkpoint.

    Raises: CheckpointError if there is no committed checkpoint; StorageError.
    """
    if not storage.exists(storage.join(url, store.COMMIT)):
        step = store.latest_committed(url)
        if step is None:
            raise _nothing_at(url)
        url = store.checkpoint_url(url, step)
    where = storage.join(url, store.STATE)
    state = TrainState.from_json(storage.read_bytes(where), where)
    return storage.join(url, store.WEIGHTS), recipe.from_tables(state.config, where=where)


def _nothing_at(url: str) -> CheckpointError:
    files = storage.list_files(url)
    folds = sorted({path.partition("/")[0] for path in files if path.startswith("fold-")})
    if folds:
        return CheckpointError(
            "A fine-tuning of several folds has a network for each",
            where=url,
            found=", ".join(folds),
            do=f"give one of them: {storage.join(url, folds[0])}",
        )
    return CheckpointError(
        "No committed checkpoint",
        where=url,
        found=f"none below {storage.join(url, 'checkpoints')}",
        do="give the run.url of a run, or one of its checkpoints/step-... folders",
    )


def load_weights(url: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `build` and weights of a run (its newest checkpoint), a checkpoint, a folder
    that `svfap import` or `svfap export` wrote, or a .safetensors file.

    Raises: CheckpointError if there are none; StorageError.
    """
    return weights.load(_weights_of(url))


def load_build(url: str) -> dict[str, Any]:
    """The first of what `load_weights` gives, without reading the weights."""
    return weights.load_build(_weights_of(url))


def _weights_of(url: str) -> str:
    path = storage.join(url, store.WEIGHTS)
    if url.endswith(".safetensors"):
        path = url
    elif storage.exists(storage.join(url, store.COMMIT)) or not storage.exists(path):
        path, _ = locate(url)
    return path
