"""The network of fine-tuning: encoder over all tokens, mean, LayerNorm, one linear head.

In: normalized clips. Out: one score per class, or one value per regressed dimension. It starts from
a pre-trained encoder (`load_encoder`) or from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svfap_dist.errors import CheckpointError
from svfap_dist.model.layers import init_linear, layer_norm
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
    ) -> None:
        super().__init__()
        self.size = size
        self.encoder = ENCODERS[size.encoder].build(size, drop_path)
        self.fc_norm = layer_norm(size.embed_dim)
        self.head = nn.Linear(size.embed_dim, num_outputs)
        init_linear(self.head)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    def forward(self, clips: Tensor) -> Tensor:
        """Return scores [B, num_outputs].

        Args:
            clips: normalized floats [B, 3, F, H, W], or frames uint8 [B, F, H, W, 3].
        """
        tokens = self.encoder(clips)[-1]  # of the last, coarsest stage: [B, t*S, D]
        return self.head(self.fc_norm(tokens.mean(dim=1)))

    def load_encoder(self, pretrained: Mapping[str, Tensor]) -> None:
        """Load the encoder's weights from the state of a `MaskedAutoencoder`.

        Args:
            pretrained: its state dict.

        Raises:
            CheckpointError: an encoder weight is missing, unexpected or of another shape.
        """
        prefix = "encoder."
        names = [name for name in pretrained if name.startswith(prefix)]
        try:
            self.encoder.load_state_dict({n.removeprefix(prefix): pretrained[n] for n in names})
        except RuntimeError as error:
            what = "Pre-trained weights do not fit the classifier's encoder"
            advice = "build the classifier with the size and overrides of the pre-training"
            raise CheckpointError(what, "encoder", str(error), advice) from error


def build(
    size: str,
    num_outputs: int,
    drop_path: float = 0.0,
    head_init_scale: float = HEAD_INIT_SCALE,
    **overrides: object,
) -> Classifier:
    """Return a freshly initialized classifier.

    Args:
        size: name of a size.
        num_outputs: classes or dimensions.
        drop_path: rate of the last block in training, see `encoder.Encoder`.
        head_init_scale: factor of the head's initial weights.
        **overrides: fields of `sizes.Size`.

    Raises:
        ConfigError: a size or override that does not exist or does not fit.
    """
    return Classifier(resolve(size, overrides), num_outputs, drop_path, head_init_scale)
