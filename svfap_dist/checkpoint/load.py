"""Loading a checkpoint: its weights alone, or the whole state into a training engine.

In: the URL of a run (for its newest committed checkpoint) or of one checkpoint. Out: the URL of the
full weights and the recipe they were trained with, without DeepSpeed; or an engine whose weights
and optimizer continue the run: with the ZeRO stage and the number of ranks that saved from
DeepSpeed's shards as they are, with others from the states of the parameters in them.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from svfap_dist import distributed, storage
from svfap_dist.checkpoint import local_copies, parameter_states, store, untrusted
from svfap_dist.checkpoint.best import read_best, resolve_best
from svfap_dist.checkpoint.parameter_states import ParameterState
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config, recipe
from svfap_dist.distributed import World
from svfap_dist.errors import CheckpointError, SvfapError
from svfap_dist.model import weights
from svfap_dist.storage.hub import local_folder

log = logging.getLogger(__name__)


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

    @property
    def parameter_names(self) -> Sequence[str]:
        """Return the names of the trained parameters in the order of the optimizer's groups."""
        ...

    def load(self, folder: str, tag: str) -> None:
        """See `train.engine.Engine.load`."""
        ...

    def load_states(self, states: Mapping[str, ParameterState]) -> None:
        """See `train.engine.Engine.load_states`."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights on rank 0; other ranks may get an empty dictionary."""
        ...


def locate_weights(url: str, newest: bool = False) -> tuple[str, Config]:
    """Return the URL of the full weights (.safetensors) and the recipe they were trained with.

    Args:
        url: URL of a run or of one of its checkpoints; RUN/checkpoints/best is the best that is
            marked.
        newest: Whether those of a run are always of its newest checkpoint; otherwise a fine-tuning
            with finetune.validation has those that it tests, the best ones.

    Raises:
        CheckpointError: If there is no committed checkpoint.
    """
    url, run_url = resolve_best(url), ""
    if not storage.exists(storage.join(url, store.COMMIT)):
        step = store.latest_committed(url)
        if step is None:
            raise _no_checkpoint(url)
        run_url, url = url, store.checkpoint_url(url, step)
    where = storage.join(url, store.STATE)
    state = TrainState.from_json(storage.read_bytes(where), where)
    config = recipe.from_stored(state.config, where=where)
    if run_url and not newest and config.task is not None and config.finetune.validation:
        best = read_best(run_url)
        if best is not None and best.step != state.step:
            return locate_weights(store.checkpoint_url(run_url, best.step))
    return storage.join(url, store.WEIGHTS), config


def _no_checkpoint(url: str) -> CheckpointError:
    files = storage.list_files(url)
    folds = sorted(
        {path.partition("/")[0] for path in files if path.startswith(("fold-", "seed-"))}
    )
    if folds:
        title = "Ambiguous network: each fold and seed of a fine-tuning has its own"
        advice = f"give one of them: {storage.join(url, folds[0])}"
        return CheckpointError(title, url, ", ".join(folds), advice)
    found = f"none below {storage.join(url, 'checkpoints')}"
    advice = "give the run.url of a run, or one of its checkpoints/step-... folders"
    return CheckpointError("No committed checkpoint", url, found, advice)


def load_weights(url: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of the network's `build` and its weights.

    Args:
        url: Of a run (see `locate_weights`), a checkpoint, a folder that `svfap import` or `svfap
            export` wrote, a .safetensors file, or hf://owner/name.

    Raises:
        CheckpointError: If there are none.
    """
    return weights.load(weights_url(url))


def load_build(url: str) -> dict[str, Any]:
    """Return the arguments of the network's `build` without reading its weights.

    Args:
        url: See `load_weights`.
    """
    return weights.load_build(weights_url(url))


def load_info(url: str) -> weights.ModelInfo | None:
    """Return the description of the network without reading its weights; None if it has none.

    Args:
        url: See `load_weights`.
    """
    return weights.load_info(weights_url(url))


def load_license(url: str) -> str:
    """Return the license of weights: as stored, or that of the weights they were fine-tuned from.

    Args:
        url: See `load_weights`.

    Returns:
        Empty where none of these weights states one.

    Raises:
        SvfapError: If one of them cannot be read.
    """
    seen = set[str]()
    while url and url not in seen:
        seen.add(url)
        info = load_info(url)
        if info is None or info.license:
            return info.license if info else ""
        url = info.provenance.get("init", "")
    return ""


def load_license_of_run(config: Config, state: TrainState | None) -> str:
    """Return the license of the weights that a fine-tuning starts from; empty: none, or unknown.

    A run that resumes has stored it, since finetune.init may be gone by then.

    Args:
        config: The run's recipe.
        state: Of the checkpoint that it resumes from; None: a new run.
    """
    if config.task is None:
        return ""
    init = config.finetune.init
    if state is not None:
        init = storage.join(store.checkpoint_url(config.run.url, state.step), store.WEIGHTS)
    try:
        return load_license(init)
    except SvfapError as error:
        log.warning("License of the initial weights unknown: %s", error)
        return ""


def weights_url(url: str) -> str:
    """Return the URL of the .safetensors file that `load_weights` reads.

    Args:
        url: See `load_weights`.

    Raises:
        CheckpointError: If there is none.
    """
    url = local_folder(url)
    if url.endswith(".safetensors"):
        return url
    path = storage.join(url, store.WEIGHTS)
    if storage.exists(storage.join(url, store.COMMIT)) or not storage.exists(path):
        path, _ = locate_weights(url)
    return path


def needs_resharding(state: TrainState, config: Config, world: World) -> bool:
    """Return whether DeepSpeed cannot load the shards as they are.

    Args:
        state: Train state of the checkpoint.
        config: The recipe to continue with.
        world: The ranks to continue with.
    """
    same_ranks = state.zero_stage == 0 or state.world_size == world.world_size
    return state.universal or not same_ranks or state.zero_stage != config.train.zero_stage


def restore_engine(
    run_url: str, state: TrainState, engine: CheckpointEngine, reshard: bool
) -> None:
    """Restore weights and optimizer; a collective of all ranks.

    Each node downloads once: only its own ranks' files unless they are resharded, and of these only
    what its ranks have not kept when they saved.

    Args:
        run_url: URL of the run.
        state: Train state of the checkpoint to load.
        engine: Made for the same recipe, in any ZeRO stage.
        reshard: What `needs_resharding` returned.

    Raises:
        CheckpointError: On every rank, if the checkpoint is damaged for any.
        StorageError: On every rank, if the store failed on any.
    """
    tag = store.checkpoint_tag(state.step)
    with tempfile.TemporaryDirectory(prefix=f"svfap-{tag}-") as folder:
        nodes = distributed.all_gather_object((socket.gethostname(), folder))
        shared = next(path for host, path in nodes if host == socket.gethostname())
        own = {rank for rank, (host, _) in enumerate(nodes) if host == socket.gethostname()}
        ranks = None if reshard else own  # DeepSpeed reads a rank's own files only
        fetch = functools.partial(_fetch_for_engine, run_url, state, folder, ranks)
        distributed.run_long_on_all_ranks(fetch if shared == folder else lambda: None)
        if reshard:
            read = functools.partial(_read_states, shared, state, engine.parameter_names)
            engine.load_states(distributed.run_long_on_all_ranks(read))
        else:
            engine.load(shared, tag)
        distributed.barrier()  # the node's folder is removed only after its last reader
        if shared == folder:
            local_copies.remove_others(run_url, tag)


def _fetch_for_engine(
    run_url: str, state: TrainState, folder: str, ranks: Collection[int] | None
) -> None:
    tag = store.checkpoint_tag(state.step)
    if not state.universal:
        store.fetch(run_url, state.step, os.path.join(folder, tag), ranks=ranks)
    else:
        store.fetch(run_url, state.step, folder, names=(store.UNIVERSAL,))
        packed = os.path.join(folder, store.UNIVERSAL)
        untrusted.extract_files(packed, os.path.join(folder, tag))
        os.unlink(packed)
    untrusted.refuse_code(os.path.join(folder, tag))


def _read_states(folder: str, state: TrainState, names: Sequence[str]) -> dict[str, ParameterState]:
    files = os.path.join(folder, store.checkpoint_tag(state.step))
    read = parameter_states.read_universal if state.universal else parameter_states.read_shards
    try:
        found = read(files, names)
        return {name: found[name] for name in names}
    except (OSError, LookupError, RuntimeError) as error:
        title = "Checkpoint does not hold the optimizer state of this network"
        advice = "resume with the recipe that saved it, or delete its COMMIT to use the one before"
        raise CheckpointError(title, files, repr(error), advice) from error
