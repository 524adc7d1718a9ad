"""The objective of pre-training: the pixels of masked patches, from the visible ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from svfap_dist.config import Config
from svfap_dist.data import masking
from svfap_dist.data.clips import ClipBatch, frames_on
from svfap_dist.model import autoencoder, flops, loss, sizes
from svfap_dist.rng import Stream
from svfap_dist.train.objective import Moment


def build_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `autoencoder.build` for a recipe."""
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
    """Masked autoencoding; an `Objective`."""

    layer_decay = 1.0

    def __init__(self, config: Config) -> None:
        self._model = config.model
        self.build_arguments = build_arguments(config)
        arguments = dict(self.build_arguments)
        self._size = sizes.resolve(arguments.pop("size"), arguments)
        split = masking.predicted_split(Stream("work"), config)
        self._visible, self._masked = len(split.visible), len(split.masked)
        self.tokens_per_clip = self._visible + self._masked

    @property
    def flops_per_clip(self) -> int:
        return flops.training_step(flops.autoencoder(self._size, self._visible, self._masked))

    def check_start(self) -> None:
        pass  # it starts from nothing

    def build(self) -> nn.Module:
        return autoencoder.build(**self.build_arguments)

    def train_mode(self, model: nn.Module) -> None:
        model.train()

    def loss(
        self, network: Callable[..., Tensor], batch: ClipBatch, part: slice, moment: Moment
    ) -> Tensor:
        frames = frames_on(moment.device, batch, part)
        visible, masked = (
            tensor[part].to(moment.device, non_blocking=True)
            for tensor in (batch.visible, batch.masked)
        )
        target = loss.targets(frames, masked, self._model.tubelet_size, self._model.patch_size)
        return loss.masked_patch_loss(network(frames, visible, masked), target)
