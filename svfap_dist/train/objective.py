"""What a run learns: the network, its loss on a batch, and what depends on nothing else.

The loop, the engine and the checkpoints are the same for pre-training (`masked`) and fine-tuning
(`labelled`); what differs between the two is behind this protocol. The recipe decides which it is:
one with a [task] fine-tunes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svfap_dist.config import Config
from svfap_dist.data.clips import ClipBatch


@dataclasses.dataclass(frozen=True)
class Moment:
    """When and where a loss is computed: what its random choices may depend on.

    step: completed optimizer steps; None: an evaluation, without random choices.
    """

    device: torch.device
    rank: int
    step: int | None = None


class Objective(Protocol):
    """What is learned."""

    @property
    def build_arguments(self) -> Mapping[str, Any]:
        """Arguments of the network's `build`, as they are kept beside its weights."""
        ...

    @property
    def layer_decay(self) -> float:
        """Of the learning rate, from layer to layer; see `optim`."""
        ...

    @property
    def flops_per_clip(self) -> int:
        """Operations of a training step for one clip."""
        ...

    @property
    def tokens_per_clip(self) -> int:
        """Tokens that the network makes or predicts of one clip."""
        ...

    def check_start(self) -> None:
        """Raise what is wrong with the weights that a run would start from, before any rank does.

        Raises: ConfigError, CheckpointError, StorageError.
        """
        ...

    def build(self) -> nn.Module:
        """The network as a run starts with it, drawn from torch's global generator."""
        ...

    def train_mode(self, model: nn.Module) -> None:
        """Put the network, or what of it is trained, into training mode."""
        ...

    def loss(
        self, network: Callable[..., Tensor], batch: ClipBatch, part: slice, moment: Moment
    ) -> Tensor:
        """Mean loss, a scalar on the device, over the clips `part` of a batch."""
        ...


def of(config: Config) -> Objective:
    """The objective of a recipe.

    Raises: ConfigError if the dimensions of its network do not fit each other.
    """
    if config.task is None:
        from svfap_dist.train.masked import MaskedReconstruction

        return MaskedReconstruction(config)
    from svfap_dist.train.labelled import Labelled

    return Labelled(config)
