"""The network of fine-tuning: encoder over all tokens, mean, LayerNorm, one linear head.

In: normalised clips. Out: one score per class, or one value per regressed dimension. It starts from
a pre-trained encoder (`load_encoder`) or from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svfap_dist.errors import CheckpointError
from svfap_dist.model.layers import init_linear, layer_norm
from svfap_dist.model.sizes import ENCODERS, Size, resolve

HEAD_INIT_SCALE = 0.001  # of the released fine-tuning recipe: the first scores are nearly equal
ACTIVATIONS: Mapping[str, type[nn.Module]] = {  # of the outputs of a regression
    "none": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


class Classifier(nn.Module):
    """Scores of whole clips."""

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
        """Scores [B, num_outputs] of clips [B, 3, F, H, W]."""
        tokens = self.encoder(clips)[-1]  # only the last, coarsest stage goes on: [B, t*S, D]
        return self.head(self.fc_norm(tokens.mean(dim=1)))

    def load_encoder(self, pretrained: Mapping[str, Tensor]) -> None:
        """Take the encoder's weights from the state of a `MaskedAutoencoder`.

        Raises: CheckpointError if an encoder weight is missing, left over or of another shape.
        """
        prefix = "encoder."
        weights = {
            name.removeprefix(prefix): value
            for name, value in pretrained.items()
            if name.startswith(prefix)
        }
        try:
            self.encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                "Pre-trained weights do not fit the classifier's encoder",
                where="encoder",
                found=str(error),
                do="build the classifier with the size and overrides of the pre-training",
            ) from error


def build(
    size: str,
    num_outputs: int,
    drop_path: float = 0.0,
    head_init_scale: float = HEAD_INIT_SCALE,
    **overrides: object,
) -> Classifier:
    """A freshly initialised classifier of a named size; `overrides` are fields of `sizes.Size`.

    drop_path: of the last block in training, see `Encoder`. head_init_scale: of the head's weights.
    Neither is part of the weights.

    Raises: ConfigError for a size or override that does not exist or does not fit.
    """
    return Classifier(resolve(size, overrides), num_outputs, drop_path, head_init_scale)
