"""The masked autoencoder of pre-training: encoder, fusion of its stages, pixel decoder.

In: normalized clips and two sorted index tensors, visible and masked. Out: predictions for the
masked patches, to be compared with `patches.targets`. Everything in this file is discarded after
pre-training; the encoder is the one that the classifier uses. The decoder's input is the visible
tokens followed by one learned mask token per masked position, each with its fixed position, so
nothing has to be un-shuffled: the last M tokens are the prediction.

Legend: B clips, V visible and M masked tokens, N = V + M, D encoder width, E decoder width,
P values per patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svfap_dist.model.encoder import StageFusion
from svfap_dist.model.layers import Block, Linear, init_linear, layer_norm
from svfap_dist.model.patches import sine_cosine_table
from svfap_dist.model.sizes import ENCODERS, Size, resolve


class Decoder(nn.Module):
    """Predicts the standardized pixels of the masked patches."""

    table: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        dim = size.decoder_embed_dim
        self.embed = Linear(size.embed_dim, dim, bias=False)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.register_buffer("table", sine_cosine_table(size.num_tokens, dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, size.decoder_num_heads) for _ in range(size.decoder_depth)
        )
        self.norm = layer_norm(dim)
        self.head = Linear(dim, size.patch_dim)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return predictions [B, M, P].

        Args:
            tokens: the encoder's, [B, V, D].
            visible: their indices, [B, V].
            masked: indices of the patches to predict, [B, M].
        """
        seen = self.embed(tokens)
        positions = self.table.to(seen.dtype)  # DeepSpeed's bfloat16 leaves tables in float32
        hidden = self.mask_token + positions[masked]
        x = torch.cat((seen + positions[visible], hidden), dim=1)  # [B, V + M, E]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = last(x, visible.shape[1])  # the last block outputs the masked tokens only
        return self.head(self.norm(x))


class MaskedAutoencoder(nn.Module):
    """Predicts the pixels of masked patches from the visible ones."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.encoder = ENCODERS[size.encoder].build(size)
        tubelets = size.num_visible_tubelets or size.num_tubelets
        self.fusion = StageFusion(size.embed_dim, tubelets, last_only=not size.fusion)
        self.decoder = Decoder(size)

    def forward(
        self, clips: Tensor, visible: Tensor | None = None, masked: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Return the standardized pixels [B, M, P] of the masked patches.

        Without indices nothing is masked, and it returns the tokens of each stage of the encoder:
        at ZeRO-3 only a call of the whole network gathers weights.

        Args:
            clips: normalized floats [B, 3, F, H, W], or frames uint8 [B, F, H, W, 3], or only the
                visible patches [B, V, P] from `patches.visible_patches`.
            visible: sorted indices of the visible tokens, int64 [B, V].
            masked: sorted indices of the tokens to predict, int64 [B, M]; may leave out masked ones
                that need not be predicted.
        """
        if visible is None or masked is None:
            return self.encoder(clips)
        tokens = self.fusion(self.encoder(clips, visible))  # [B, V, D]
        return self.decoder(tokens, visible, masked)


def build(size: str, **overrides: object) -> MaskedAutoencoder:
    """Return a freshly initialized autoencoder.

    Args:
        size: name of a size.
        **overrides: fields of `sizes.Size`.

    Raises:
        ConfigError: a size or override that does not exist or does not fit.
    """
    return MaskedAutoencoder(resolve(size, overrides))
