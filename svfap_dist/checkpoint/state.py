"""What a checkpoint says about the run it belongs to, beside weights and optimizer state.

The order of samples is a pure function of (manifest, seed, step), so these few numbers are the
whole state of the data side. `check_resumable` refuses to go on with other data or another recipe.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from svfap_dist.config import Config, recipe
from svfap_dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# ZeRO stages that DeepSpeed saves alike: nothing cut, optimizer cut, weights cut as well.
_FAMILY = {0: "plain", 1: "optimizer", 2: "optimizer", 3: "weights"}


class _Objective(Protocol):
    @property
    def build_arguments(self) -> Mapping[str, Any]: ...


class CheckpointEngine(Protocol):
    """What checkpoints need of a training engine; every method is called by all ranks together."""

    @property
    def objective(self) -> _Objective:
        """What is trained; its `build_arguments` rebuild the network for the weights."""
        ...

    def save(self, folder: str, tag: str) -> None:
        """Write this rank's shards to the local folder/tag."""
        ...

    def load(self, folder: str, tag: str) -> None:
        """Read the shards that all ranks wrote to folder/tag."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights on rank 0; other ranks may get an empty dictionary."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainState:
    """A run after `step` optimizer steps.

    epoch: the epoch of the next step, from 0. clips_seen: over all ranks. world_size, zero_stage:
    of the ranks that saved, which decide how their shards can be loaded. config: the resolved
    recipe as nested tables. universal: the shards are in DeepSpeed's universal form (see
    `reshape`).
    """

    step: int
    epoch: int
    clips_seen: int
    manifest_fingerprint: str
    config_fingerprint: str
    seed: int
    world_size: int
    zero_stage: int
    config: dict[str, Any]
    versions: dict[str, str]
    universal: bool = False

    def to_json(self) -> bytes:
        """JSON bytes, for `state.json`."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> TrainState:
        """The state that `to_json` wrote.

        Raises: CheckpointError if it is none.
        """
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                "Unreadable train state",
                where=where,
                found=repr(error),
                do="delete that checkpoint's COMMIT file to fall back to the one before it",
            ) from error


def after(
    step: int, config: Config, steps_per_epoch: int, manifest_fingerprint: str, world_size: int
) -> TrainState:
    """The state of a run of `config` after `step` optimizer steps."""
    return TrainState(
        step=step,
        epoch=step // steps_per_epoch,
        clips_seen=step * config.train.global_batch_size,
        manifest_fingerprint=manifest_fingerprint,
        config_fingerprint=config.fingerprint,
        seed=config.run.seed,
        world_size=world_size,
        zero_stage=config.train.zero_stage,
        config=config.model_dump(mode="json"),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    names = ("svfap-dist", "torch", "deepspeed", "numpy", "av")
    return {name: importlib.metadata.version(name) for name in names}


def check_resumable(
    state: TrainState, config: Config, manifest_fingerprint: str, where: str
) -> None:
    """Check that `config` and its data continue the run that `state` is of.

    Raises: ConfigError naming the data or the keys that differ.
    """
    if state.manifest_fingerprint != manifest_fingerprint:
        raise ConfigError(
            "The run was started on other data",
            where=f"data.url = {config.data.url}",
            found=f"manifest {manifest_fingerprint}, but {where} was trained on "
            f"{state.manifest_fingerprint}",
            do="give the data.url the run was started with, or another run.url to start a new run",
        )
    if state.config_fingerprint != config.fingerprint:
        raise ConfigError(
            "The run was started with another recipe",
            where=where,
            found="; ".join(_differences(state, config, where)) or "another version of the recipe",
            do="set these keys back to go on with the run, or give another run.url for a new one",
        )
    if _FAMILY[state.zero_stage] != _FAMILY[config.train.zero_stage]:
        raise ConfigError(
            "Checkpoint cannot be loaded into this ZeRO stage",
            where="train.zero_stage",
            found=f"{config.train.zero_stage}, but {where} is of stage {state.zero_stage}; only "
            "stages 1 and 2 read each other's",
            do=f"set train.zero_stage={state.zero_stage}",
        )


def _differences(state: TrainState, config: Config, where: str) -> list[str]:
    """Keys whose values differ in a way that the fingerprint minds."""
    saved = recipe.from_tables(state.config, where=where)
    found = []
    for section, values in config:
        earlier = getattr(saved, section)
        if values is None or earlier is None:  # [task] may be left out
            if values != earlier:
                found.append(f"[{section}] is {values!r}, was {earlier!r}")
            continue
        for name, value in values:
            before = getattr(earlier, name)
            put_back = values.model_copy(update={name: before})
            undone = config.model_copy(update={section: put_back})
            if before != value and undone.fingerprint != config.fingerprint:
                found.append(f"{section}.{name} is {value!r}, was {before!r}")
    return found
