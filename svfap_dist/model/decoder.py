"""The light pixel decoder of pre-training: visible tokens and positions in, masked patches out.

It is thrown away after pre-training. The visible tokens come first, one learned mask token per
masked position behind them, each with its fixed position, so no un-shuffling is needed: the last M
tokens are the answer.

Legend: B clips, V visible and M masked tokens, N = V + M, D encoder width, E decoder width,
P numbers of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svfap_dist.model.layers import Block, init_linear, layer_norm
from svfap_dist.model.linear import Linear
from svfap_dist.model.patches import sine_cosine_table
from svfap_dist.model.sizes import Size


class Decoder(nn.Module):
    """Predicts the standardised pixels of the masked patches."""

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
        """Encoder tokens [B, V, D], their indices [B, V] and those wanted [B, M] -> [B, M, P]."""
        seen = self.embed(tokens)
        positions = self.table.to(seen.dtype)  # DeepSpeed's bfloat16 leaves tables in float32
        wanted = self.mask_token + positions[masked]
        x = torch.cat((seen + positions[visible], wanted), dim=1)  # [B, V + M, E]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = last(x, visible.shape[1])  # of this block only the masked tokens are asked for
        return self.head(self.norm(x))
