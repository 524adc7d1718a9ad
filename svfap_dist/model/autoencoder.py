"""The masked autoencoder of pre-training: encoder, fusion of its stages, pixel decoder.

In: normalised clips and two sorted index tensors, visible and masked. Out: predictions for the
masked patches, to be compared with `loss.targets`. Only what this file assembles is specific to
pre-training; the encoder is the class that the classifier uses.
"""

from __future__ import annotations

from torch import Tensor, nn

from svfap_dist.model.decoder import Decoder
from svfap_dist.model.encoder import Encoder, StageFusion
from svfap_dist.model.sizes import Size, resolve


class MaskedAutoencoder(nn.Module):
    """Predicts the pixels of masked patches from the visible ones."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.encoder = Encoder(size)
        seen = size.num_visible_tubelets or size.num_tubelets
        self.fusion = StageFusion(size.embed_dim, seen, last_only=not size.fusion)
        self.decoder = Decoder(size)

    def forward(self, clips: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Standardised pixels [B, M, P] of the masked patches.

        Clips are floats [B, 3, F, H, W]; `visible` [B, V] and `masked` [B, M] int64, sorted;
        `masked` may leave out masked patches that need not be predicted.
        """
        tokens = self.fusion(self.encoder(clips, visible))  # [B, V, D]
        return self.decoder(tokens, visible, masked)


def build(size: str, **overrides: object) -> MaskedAutoencoder:
    """A freshly initialised autoencoder of a named size; `overrides` are fields of `sizes.Size`.

    Raises: ConfigError for a size or override that does not exist or does not fit.
    """
    return MaskedAutoencoder(resolve(size, overrides))
