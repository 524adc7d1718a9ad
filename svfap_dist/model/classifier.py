"""The network of fine-tuning: encoder over all tokens, pooling, LayerNorm, one linear head.

In: normalized clips. Out: one score per class, or one value per regressed dimension. It starts from
a pre-trained encoder (`load_encoder`) or from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist.errors import CheckpointError
from svfap_dist.model import lora as adapters
from svfap_dist.model.layers import init_linear, layer_norm
from svfap_dist.model.pooling import build_pool
from svfap_dist.model.sizes import ENCODERS, Size, resolve

HEAD_INIT_SCALE = 0.001  # released fine-tuning recipe: the first scores are nearly equal
ACTIVATIONS: Mapping[str, type[nn.Module]] = {  # of the outputs of a regression
    "none": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


class Classifier(nn.Module):
    """Scores whole clips."""

    def __init__(
        self,
        size: Size,
        num_outputs: int,
        drop_path: float = 0.0,
        head_init_scale: float = HEAD_INIT_SCALE,
        pool: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.encoder = ENCODERS[size.encoder].build(size, drop_path)
        if lora is not None:
            adapters.add_adapters(self.encoder, **lora)
        self.pool = build_pool(size, **pool or {})
        self.fc_norm = layer_norm(size.embed_dim)
        self.head = nn.Linear(self.pool.num_vectors * size.embed_dim, num_outputs)
        init_linear(self.head)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    def forward(self, clips: Tensor) -> Tensor:
        """Return scores [B, num_outputs].

        Args:
            clips: normalized floats [B, 3, F, H, W], or frames uint8 [B, F, H, W, 3].
        """
        vectors = self.pool(self.encoder(clips))  # [B, V, D]
        return self.head(self.fc_norm(vectors).flatten(1))

    def load_encoder(self, pretrained: Mapping[str, Tensor]) -> None:
        """Load the encoder's weights from the state of a `MaskedAutoencoder` or a `Classifier`.

        Adapters that the state does not have keep their initial values.

        Args:
            pretrained: its state dict.

        Raises:
            CheckpointError: an encoder weight is missing, unexpected or of another shape.
        """
        prefix = "encoder."
        fresh = {n: value for n, value in self.encoder.state_dict().items() if ".adapter." in n}
        given = {n.removeprefix(prefix): v for n, v in pretrained.items() if n.startswith(prefix)}
        try:
            self.encoder.load_state_dict(fresh | given)
        except RuntimeError as error:
            what = "Pre-trained weights do not fit the classifier's encoder"
            advice = "build the classifier with the size and overrides of the pre-training"
            raise CheckpointError(what, "encoder", str(error), advice) from error


def build(
    size: str,
    num_outputs: int,
    drop_path: float = 0.0,
    head_init_scale: float = HEAD_INIT_SCALE,
    pool: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    **overrides: object,
) -> Classifier:
    """Return a freshly initialized classifier.

    Args:
        size: name of a size.
        num_outputs: classes or dimensions.
        drop_path: rate of the last block in training, see `encoder.Encoder`.
        head_init_scale: factor of the head's initial weights.
        pool: arguments of `pooling.build_pool`; None: the mean of the last stage.
        lora: rank and alpha of the encoder's adapters; None: it has none.
        **overrides: fields of `sizes.Size`.

    Raises:
        ConfigError: a size or override that does not exist or does not fit.
    """
    resolved = resolve(size, overrides)
    return Classifier(resolved, num_outputs, drop_path, head_init_scale, pool, lora)
