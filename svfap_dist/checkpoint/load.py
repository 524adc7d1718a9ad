"""Loading a checkpoint: its weights alone, or the whole state into a training engine.

In: the URL of a run (for its newest committed checkpoint) or of one checkpoint. Out: the URL of the
full weights and the recipe they were trained with, without DeepSpeed; or an engine whose weights
and optimizer continue the run, on the number of ranks that saved (DeepSpeed's shards as they are)
or on another (through DeepSpeed's universal form).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import socket
import tarfile
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from svfap_dist import distributed, storage
from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config, recipe
from svfap_dist.distributed import World
from svfap_dist.errors import CheckpointError
from svfap_dist.model import weights


class _Objective(Protocol):
    @property
    def build_arguments(self) -> Mapping[str, Any]: ...


class CheckpointEngine(Protocol):
    """What checkpoints need of a training engine; every method is a collective of all ranks."""

    @property
    def objective(self) -> _Objective:
        """Return the training objective; its `build_arguments` rebuild the network."""
        ...

    def save(self, folder: str, tag: str) -> None:
        """See `train.engine.Engine.save`."""
        ...

    def load(self, folder: str, tag: str) -> None:
        """See `train.engine.Engine.load`."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights on rank 0; other ranks may get an empty dictionary."""
        ...


def locate_weights(url: str) -> tuple[str, Config]:
    """Return the URL of the full weights (.safetensors) and the recipe they were trained with.

    Args:
        url: URL of a run or of one of its checkpoints.

    Raises:
        CheckpointError: If there is no committed checkpoint.
    """
    if not storage.exists(storage.join(url, store.COMMIT)):
        step = store.latest_committed(url)
        if step is None:
            raise _no_checkpoint(url)
        url = store.checkpoint_url(url, step)
    where = storage.join(url, store.STATE)
    state = TrainState.from_json(storage.read_bytes(where), where)
    return storage.join(url, store.WEIGHTS), recipe.from_stored(state.config, where=where)


def _no_checkpoint(url: str) -> CheckpointError:
    files = storage.list_files(url)
    folds = sorted({path.partition("/")[0] for path in files if path.startswith("fold-")})
    if folds:
        title = "Ambiguous network: each fold of a fine-tuning has its own"
        advice = f"give one of them: {storage.join(url, folds[0])}"
        return CheckpointError(title, url, ", ".join(folds), advice)
    found = f"none below {storage.join(url, 'checkpoints')}"
    advice = "give the run.url of a run, or one of its checkpoints/step-... folders"
    return CheckpointError("No committed checkpoint", url, found, advice)


def load_weights(url: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of the network's `build` and its weights.

    Args:
        url: Of a run (its newest checkpoint), a checkpoint, a folder that `svfap import` or `svfap
            export` wrote, or a .safetensors file.

    Raises:
        CheckpointError: If there are none.
    """
    return weights.load(_weights_url(url))


def load_build(url: str) -> dict[str, Any]:
    """Return the arguments of the network's `build` without reading its weights.

    Args:
        url: See `load_weights`.
    """
    return weights.load_build(_weights_url(url))


def _weights_url(url: str) -> str:
    if url.endswith(".safetensors"):
        return url
    path = storage.join(url, store.WEIGHTS)
    if storage.exists(storage.join(url, store.COMMIT)) or not storage.exists(path):
        path, _ = locate_weights(url)
    return path


def needs_resharding(state: TrainState, config: Config, world: World) -> bool:
    """Return whether loading goes through the universal form: other ranks or another ZeRO stage.

    Args:
        state: Train state of the checkpoint.
        config: The recipe to continue with.
        world: The ranks to continue with.
    """
    same = (state.world_size, state.zero_stage) == (world.world_size, config.train.zero_stage)
    return state.universal or (state.zero_stage > 0 and not same)


def restore_engine(
    run_url: str, state: TrainState, engine: CheckpointEngine, reshard: bool
) -> None:
    """Restore weights and optimizer; a collective of all ranks. Each node downloads once.

    Args:
        run_url: URL of the run.
        state: Train state of the checkpoint to load.
        engine: Made with `universal=reshard`.
        reshard: What `needs_resharding` returned.

    Raises:
        CheckpointError: On every rank, if the checkpoint is damaged for any.
        StorageError: On every rank, if the store failed on any.
    """
    tag = store.checkpoint_tag(state.step)
    with tempfile.TemporaryDirectory(prefix=f"svfap-{tag}-") as folder:
        nodes = distributed.all_gather_object((socket.gethostname(), folder))
        shared = next(path for host, path in nodes if host == socket.gethostname())
        fetch = functools.partial(_fetch_for_engine, run_url, state, folder, reshard)
        distributed.run_on_all_ranks(fetch if shared == folder else lambda: None)
        engine.load(shared, f"{tag}-universal" if reshard else tag)
        distributed.barrier()  # the node's folder is removed only after its last reader


def _fetch_for_engine(run_url: str, state: TrainState, folder: str, reshard: bool) -> None:
    tag = store.checkpoint_tag(state.step)
    if state.universal:
        store.fetch(run_url, state.step, folder, names=(store.UNIVERSAL,))
        packed = os.path.join(folder, store.UNIVERSAL)
        with tarfile.open(packed) as tar:
            tar.extractall(os.path.join(folder, f"{tag}-universal"), filter="data")
        os.unlink(packed)
        return
    store.fetch(run_url, state.step, os.path.join(folder, tag))
    if reshard:
        convert_to_universal(os.path.join(folder, tag))


def convert_to_universal(folder: str) -> str:
    """Write DeepSpeed's universal form beside a local checkpoint and return its folder.

    Args:
        folder: What DeepSpeed saved, of all ranks.

    Raises:
        CheckpointError: If DeepSpeed cannot convert it.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # keeps it from searching for a GPU
    options = argparse.Namespace(
        input_folder=folder,
        output_folder=f"{folder}-universal",
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            from deepspeed.checkpoint import ds_to_universal

            ds_to_universal.main(options)
    except Exception as error:  # `run_on_all_ranks` passes only our own errors to all ranks
        title = "Checkpoint cannot be resharded for this number of ranks or ZeRO stage"
        advice = "resume with the number of ranks and the ZeRO stage it was saved with"
        raise CheckpointError(title, folder, repr(error), advice) from error
    return options.output_folder
