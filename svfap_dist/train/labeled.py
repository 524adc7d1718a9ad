"""The objective of fine-tuning: classes or values of whole clips.

Clips come augmented from the decode workers; mixing them needs the whole batch and is done here,
on the device. The random choices of a step, mixing and drop path, depend on seed, step and rank
only, so a resumed run continues with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist.checkpoint import load
from svfap_dist.config import Config
from svfap_dist.data.batch import ClipBatch
from svfap_dist.errors import ConfigError
from svfap_dist.model import classifier, flops
from svfap_dist.model.patches import normalize
from svfap_dist.model.sizes import size_of_build
from svfap_dist.rng import Stream
from svfap_dist.train.engine import StepContext
from svfap_dist.train.mixing import mix, soft_targets


class Labeled:
    """Classification or regression of whole clips; an `Objective`.

    Args:
        config: The recipe; it has a [task].
    """

    def __init__(self, config: Config) -> None:
        assert config.task is not None
        self._config, self._task, self._finetune = config, config.task, config.finetune
        self._is_linear = config.finetune.mode == "linear"
        self.layer_decay = 1.0 if self._is_linear else config.finetune.layer_decay
        self.build_arguments: dict[str, Any] = {
            "size": config.model.size,
            "num_outputs": len(config.task.names),
            "num_frames": config.data.num_frames,
            "frame_size": config.data.frame_size,
            "tubelet_size": config.model.tubelet_size,
            "patch_size": config.model.patch_size,
            **config.model.overrides(),
        }
        self._size = size_of_build(self.build_arguments)
        self._activation = classifier.ACTIVATIONS[config.finetune.output]()

    @property
    def flops_per_clip(self) -> int:
        """See `Objective.flops_per_clip`."""
        forward = flops.classifier(self._size, len(self._task.names))
        return sum(forward.values()) if self._is_linear else flops.training_step(forward)

    @property
    def tokens_per_clip(self) -> int:
        """See `Objective.tokens_per_clip`."""
        return self._size.num_tokens

    def check_initial_weights(self) -> None:
        """See `Objective.check_initial_weights`."""
        if self._finetune.init:
            self._check_same_encoder(load.load_build(self._finetune.init))

    def build(self) -> nn.Module:
        """See `Objective.build`."""
        model = classifier.build(
            **self.build_arguments,
            drop_path=0.0 if self._is_linear else self._finetune.drop_path,
            head_init_scale=self._finetune.head_init_scale,
        )
        if self._finetune.init:
            build, state = load.load_weights(self._finetune.init)
            self._check_same_encoder(build)
            model.load_encoder(state)
        if self._is_linear:
            model.encoder.requires_grad_(False)
        return model

    def _check_same_encoder(self, build: dict[str, Any]) -> None:
        """Refuse weights of another encoder, naming the key of the recipe."""
        found = size_of_build(build)
        for name in self._size.encoder_fields:
            mine, other = getattr(self._size, name), getattr(found, name)
            if mine != other:
                found = f"{mine}, where {self._finetune.init} has {other}"
                do = f"repeat the [model] of the pre-training here, e.g. model.size={build['size']}"
                title = "finetune.init does not match [model]"
                raise ConfigError(title, f"model.{name}", found, do)

    def train_mode(self, model: nn.Module) -> None:
        """See `Objective.train_mode`."""
        model.train()
        if self._is_linear:
            model.get_submodule("encoder").eval()

    def inputs(self, batch: ClipBatch, part: slice, context: StepContext) -> tuple[Tensor, ...]:
        """See `Objective.inputs`."""
        assert batch.targets is not None
        frames = batch.frames_on(context.device, part)
        targets = batch.targets[part].to(context.device, non_blocking=True)
        chance = None
        if context.step is not None:
            seed = self._config.run.seed
            chance = Stream(seed, "fine-tuning", context.step, context.rank, part.start)
            torch.manual_seed(chance.integer(1 << 62))  # drop path draws from torch's generator
        if self._task.kind == "regression":
            return frames, targets.float()
        if chance is None:
            return frames, targets
        towards = soft_targets(targets, len(self._task.names), self._finetune.label_smoothing)
        return mix(normalize(frames), towards, chance, self._finetune)

    def loss(self, network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """See `Objective.loss`."""
        clips, targets = inputs
        output = network(clips).float()
        if self._task.kind == "regression":
            return nn.functional.mse_loss(self._activation(output), targets)
        return nn.functional.cross_entropy(output, targets)
