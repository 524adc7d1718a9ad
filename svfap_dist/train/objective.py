"""The objective of pre-training, and the choice of a recipe's objective.

Pre-training learns to predict the pixels of masked patches from the visible ones. A recipe with a
[task] fine-tunes (`labeled`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist.config import Config
from svfap_dist.data import masking
from svfap_dist.data.batch import ClipBatch
from svfap_dist.evaluate.protocol import TaskSplit
from svfap_dist.model import autoencoder, flops, patches, planes, sizes
from svfap_dist.rng import Stream
from svfap_dist.train.engine import Objective, StepContext
from svfap_dist.train.labeled import Labeled


def build_objective(config: Config, split: TaskSplit | None = None) -> Objective:
    """Return the objective of a recipe.

    Args:
        config: The recipe.
        split: Samples of its task, for finetune.class_weights; None: all classes count alike.

    Raises:
        ConfigError: If the dimensions of its network do not fit each other.
    """
    is_classes = config.task is not None and config.task.kind == "classification"
    classes = split.train.targets if split is not None and is_classes else None
    return MaskedReconstruction(config) if config.task is None else Labeled(config, classes)


def build_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of `autoencoder.build` for a recipe.

    Args:
        config: The recipe.
    """
    return {
        "size": config.model.size,
        "num_frames": config.data.num_frames,
        "frame_size": config.data.frame_size,
        "tubelet_size": config.model.tubelet_size,
        "patch_size": config.model.patch_size,
        "num_visible_tubelets": config.num_visible_tubelets,
        **config.model.overrides(),
    }


class MaskedReconstruction:
    """Masked autoencoding: mean squared error of the masked patches; an `Objective`.

    Args:
        config: The run's recipe.
    """

    layer_decay = 1.0

    def __init__(self, config: Config) -> None:
        self._model, self._dtype = config.model, getattr(torch, config.train.dtype)
        self.build_arguments = build_arguments(config)
        self._size = sizes.size_of_build(self.build_arguments)
        split = masking.split_tokens(
            Stream("work"), config.mask, config.num_tubelets, config.num_patches
        )
        self._visible, self._masked = len(split.visible), len(split.masked)
        self.tokens_per_clip = self._visible + self._masked

    @property
    def flops_per_clip(self) -> int:
        """See `Objective.flops_per_clip`."""
        return flops.training_step(flops.autoencoder(self._size, self._visible, self._masked))

    def check_initial_weights(self) -> None:
        """See `Objective.check_initial_weights`; there are none, since it starts from scratch."""

    def build(self) -> nn.Module:
        """See `Objective.build`."""
        return autoencoder.build(**self.build_arguments)

    def train_mode(self, model: nn.Module) -> None:
        """See `Objective.train_mode`."""
        model.train()

    def inputs(self, batch: ClipBatch, part: slice, context: StepContext) -> tuple[Tensor, ...]:
        """See `Objective.inputs`."""
        frames = batch.frames[part].to(context.device, non_blocking=True)
        visible, masked = (  # int32 in the ring, half as wide on the way
            tokens[part].to(context.device, non_blocking=True).long()
            for tokens in (batch.visible, batch.masked)
        )
        seen, target = planes.patches_and_targets(
            frames, visible, masked, self._model.patch, self._dtype
        )
        return seen, visible, masked, target

    def loss(self, network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """See `Objective.loss`."""
        seen, visible, masked, target = inputs
        return patches.masked_patch_loss(network(seen, visible, masked), target)

    def losses(self, network: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.losses`."""
        seen, visible, masked, target = inputs
        prediction = network(seen, visible, masked)
        of_clips = patches.losses_of_clips(prediction.detach(), target)
        return patches.masked_patch_loss(prediction, target), of_clips
