"""The objective of fine-tuning: classes or values of whole clips.

Clips come augmented from the decode workers, or are augmented here, on the device
(augment.run_on); mixing them needs the whole batch and is done here in either case. The random
choices of a step, mixing and drop path, depend on seed, step and rank only, and those for a clip
that the device augments on seed, epoch and sample, so a resumed run continues with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.config import Config, FinetuneConfig
from svfap_dist.data.batch import ClipBatch
from svfap_dist.data.device_augment import augment_batch
from svfap_dist.errors import ConfigError
from svfap_dist.model import classifier, flops, lora, pooling
from svfap_dist.model.patches import normalize
from svfap_dist.model.sizes import size_of_build
from svfap_dist.rng import Stream
from svfap_dist.train.engine import StepContext
from svfap_dist.train.mixing import mix, mix_each, soft_targets


class Labeled:
    """Classification or regression of whole clips; an `Objective`.

    Args:
        config: The recipe; it has a [task].
        classes: Classes of the training samples, for `finetune.class_weights`; None: all count
            alike.
    """

    def __init__(self, config: Config, classes: np.ndarray | None = None) -> None:
        assert config.task is not None
        self._config, self._task, self._finetune = config, config.task, config.finetune
        mode = config.finetune.mode
        self._is_frozen, self._is_lora = mode in ("linear", "attentive"), mode == "lora"
        self.layer_decay = config.finetune.layer_decay if mode == "full" else 1.0
        self.build_arguments: dict[str, Any] = {
            "size": config.model.size,
            "num_outputs": len(config.task.names),
            "num_frames": config.data.num_frames,
            "frame_size": config.data.frame_size,
            "tubelet_size": config.model.tubelet_size,
            "patch_size": config.model.patch_size,
            **config.model.overrides(),
        }
        if pool := _pool_arguments(config.finetune):
            self.build_arguments["pool"] = pool
        if self._is_lora:
            rank, alpha = config.finetune.lora_rank, config.finetune.lora_alpha
            self.build_arguments["lora"] = {"rank": rank, "alpha": alpha}
        self._size = size_of_build(self.build_arguments)
        self._class_weights: Tensor | None = None
        if config.finetune.class_weights == "balanced" and classes is not None:
            self._class_weights = balanced_weights(classes, len(config.task.names))
        self._activation = classifier.ACTIVATIONS[config.finetune.output]()

    @property
    def flops_per_clip(self) -> int:
        """See `Objective.flops_per_clip`; the adapters' own operations are not counted."""
        outputs, pool = len(self._task.names), self.build_arguments.get("pool")
        forward = flops.classifier(self._size, outputs, pool)
        trained = 2 * flops.head(self._size, outputs, pool)["pooling"]
        if self._is_frozen:
            return sum(forward.values()) + trained
        if self._is_lora:  # frozen weights have no gradient, what runs through them has
            return 2 * sum(forward.values()) - forward[flops.EMBEDDING] + trained // 2
        return flops.training_step(forward)

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
            drop_path=0.0 if self._is_frozen else self._finetune.drop_path,
            head_init_scale=self._finetune.head_init_scale,
        )
        if self._finetune.init:
            build, state = load.load_weights(self._finetune.init)
            self._check_same_encoder(build)
            if not self._resumes:
                _, state = lora.merged(build, state)
            model.load_encoder(state)
        if self._is_frozen:
            model.encoder.requires_grad_(False)
        if self._is_lora:
            for name, parameter in model.encoder.named_parameters():
                parameter.requires_grad_(".adapter." in name)
        return model

    @property
    def _resumes(self) -> bool:
        """Whether the initial weights are a checkpoint of this run, whose adapters continue."""
        own = storage.join(self._config.run.url, "checkpoints")
        return self._finetune.init.startswith(f"{own}/")

    def _check_same_encoder(self, build: dict[str, Any]) -> None:
        """Refuse weights of another encoder, naming the key of the recipe."""
        found = size_of_build(build)
        for name in self._size.encoder_fields:
            mine, other = getattr(self._size, name), getattr(found, name)
            if mine != other:
                found = f"{mine}, where {self._finetune.init} has {other}"
                do = f"repeat the [model] of the pre-training here, e.g. model.size={build['size']}"
                title = "Model of finetune.init does not match [model]"
                raise ConfigError(title, f"model.{name}", found, do)

    def train_mode(self, model: nn.Module) -> None:
        """See `Objective.train_mode`."""
        model.train()
        if self._is_frozen:
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
        streams = batch.streams(part) if chance is not None else []
        if streams:
            frames = augment_batch(frames, streams, self._config.augment)
        if self._task.kind == "regression":
            return frames, targets.float()
        if chance is None:
            return frames, targets
        towards = soft_targets(targets, len(self._task.names), self._finetune.label_smoothing)
        if streams:  # after augmentation, which is drawn first
            clips, towards = mix_each(normalize(frames), towards, streams, self._finetune)
        else:
            clips, towards = mix(normalize(frames), towards, chance, self._finetune)
        if self._class_weights is not None:  # the cross-entropy is linear in the targets
            towards = towards * self._class_weights.to(context.device)
        return clips, towards

    def loss(self, network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """See `Objective.loss`."""
        clips, targets = inputs
        return self._reduced(network(clips).float(), targets, "mean")

    def losses(self, network: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.losses`; a mixed clip is one of its own source, not of its partner's."""
        clips, targets = inputs
        output = network(clips).float()
        each = self._reduced(output.detach(), targets, "none")  # [B], or [B, K] of values
        return self._reduced(output, targets, "mean"), each.reshape(len(each), -1).mean(dim=1)

    def _reduced(self, output: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Return the loss with one of torch's reductions."""
        if self._task.kind == "regression":
            outputs = self._activation(output)
            return nn.functional.mse_loss(outputs, targets, reduction=reduction)
        return nn.functional.cross_entropy(output, targets, reduction=reduction)


def balanced_weights(classes: np.ndarray, num_classes: int) -> Tensor:
    """Return the weight of each class, float32 [C]: inverse to its samples, 1 on average over them.

    Args:
        classes: Classes of the training samples, int64 [N].
        num_classes: Number of classes, C; one without samples gets 0.
    """
    counts = np.bincount(classes, minlength=num_classes)
    occurring = np.count_nonzero(counts)
    weights = np.divide(
        len(classes), occurring * counts, out=np.zeros(num_classes), where=counts > 0
    )
    return torch.from_numpy(weights).float()


def _pool_arguments(finetune: FinetuneConfig) -> dict[str, Any]:
    """Return the arguments of `build_pool` that differ from the paper's way."""
    kind = "attentive" if finetune.mode == "attentive" else finetune.pool
    return pooling.arguments(kind, finetune.stages, finetune.grid)
