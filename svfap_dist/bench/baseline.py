"""The baseline of `bench model`: our autoencoder computed as the released code computes it.

As in the released code of SVFAP and VideoMAE, all patches are embedded by a convolution and then
selected by a boolean mask, attention is two products with a softmax between them, targets are
computed for all patches and then selected, and every token passes through the whole decoder. It
runs on the weights of one of our models and calls only layers that both have in common (linear
layers, norms, MLPs, the spatial bottleneck, the fusion), so equal weights must give an equal loss.

Legend: B clips, T tubelet frames, t of a stage, s positions per tubelet frame, N tokens, V visible
and M masked ones, K context tokens, D width, h heads, P numbers of a patch.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.model.encoder import Encoder, TemporalDownsample
from svfap_dist.model.layers import Attention, Block, CrossAttention, CrossBlock
from svfap_dist.model.patches import denormalize


class Straightforward(nn.Module):
    """Computes the forward pass of `model`, with its weights, as the released code does."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor, mask: Tensor) -> Tensor:
        """Return predictions [B, M, P].

        Args:
            clips: normalized floats [B, 3, F, H, W].
            mask: bool [B, N], True where masked.
        """
        model = self.model
        tokens = model.fusion(_encode(model, clips, mask))
        seen = model.decoder.embed(tokens)  # [B, V, E]
        positions = model.decoder.table.to(seen.dtype).expand(len(clips), -1, -1)
        visible = positions[~mask].reshape(len(clips), -1, positions.shape[-1])
        masked = positions[mask].reshape(len(clips), -1, positions.shape[-1])
        x = torch.cat((seen + visible, model.decoder.mask_token + masked), dim=1)  # [B, N, E]
        for block in model.decoder.blocks:
            x = _block(cast(Block, block), x)
        return model.decoder.head(model.decoder.norm(x[:, -masked.shape[1] :]))


def targets(clips: Tensor, mask: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return the standardized pixels of masked patches [B, M, P], computed for all patches.

    Args:
        clips: normalized floats [B, 3, F, H, W].
        mask: bool [B, N], True where masked.
        patch: frames and pixels of a patch.
    """
    tubelet_size, patch_size = patch
    x = denormalize(clips).unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    x = x.unflatten(2, (-1, tubelet_size))  # [B, 3, T, pt, Sy, p, Sx, p]
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)  # [B, N, pt*p*p, 3]
    deviation = x.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6
    x = ((x - x.mean(dim=2, keepdim=True)) / deviation).flatten(2)
    return x[mask].reshape(len(clips), -1, x.shape[-1])


def _encode(model: MaskedAutoencoder, clips: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the tokens of each stage, [B, t*s, D], finest in time first."""
    encoder = cast(Encoder, model.encoder)
    embed = encoder.patch_embed
    dense = F.conv3d(
        clips.to(embed.proj.weight.dtype),
        embed.proj.weight,
        embed.proj.bias,
        stride=embed.proj.stride,
    )
    dense = dense.flatten(2).transpose(1, 2) + embed.table.to(dense.dtype)  # [B, N, D]
    x = dense[~mask].reshape(len(clips), -1, dense.shape[-1])  # [B, V, D]
    blocks = iter(encoder.blocks)
    for _ in range(encoder.stage_depths[0]):
        x = _block(cast(Block, next(blocks)), x)
    stages, frames = [x], encoder.num_visible_tubelets
    for stage, depth in enumerate(encoder.stage_depths[1:]):
        downsample = cast(TemporalDownsample, encoder.temporal_downsamples[stage])
        merged = _merge(downsample, x.unflatten(1, (frames, -1)))
        frames = merged.shape[1]
        positions = merged.flatten(1, 2)  # [B, t*s, D]
        tokens = encoder.spatial_downsamples[stage](merged).flatten(1, 2)  # [B, t*z, D]
        for _ in range(depth - 1):
            tokens = _cross_block(cast(CrossBlock, next(blocks)), tokens, positions)
        x = _cross_block(cast(CrossBlock, next(blocks)), positions, tokens)
        stages.append(x)
    return stages


def _merge(downsample: TemporalDownsample, x: Tensor) -> Tensor:
    """Merge tubelet frames by a strided convolution: [B, t, s, D] -> [B, t/k, s, D]."""
    clips, _, positions, _ = x.shape
    series = x.permute(0, 2, 3, 1).flatten(0, 1)  # [B*s, D, t]
    merged = F.conv1d(series, downsample.weight, downsample.bias, stride=downsample.stride)
    return merged.unflatten(0, (clips, positions)).permute(0, 3, 1, 2)


def _block(block: Block | CrossBlock, x: Tensor) -> Tensor:
    x = x + _self_attention(block.attn, block.norm1(x))
    return x + block.mlp(block.norm2(x))


def _cross_block(block: CrossBlock, x: Tensor, context: Tensor) -> Tensor:
    x = x + _cross_attention(block.cross_attn, block.cross_norm1(x), block.cross_norm2(context))
    return _block(block, x)


def _self_attention(module: Attention, x: Tensor) -> Tensor:
    bias = torch.cat((module.q_bias, torch.zeros_like(module.q_bias), module.v_bias))
    qkv = F.linear(x, module.qkv.weight, bias).unflatten(-1, (3, module.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of [B, h, N, D/h]
    return module.proj(_attend(q, k, v))


def _cross_attention(module: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
    bias = torch.cat((torch.zeros_like(module.v_bias), module.v_bias))
    q = F.linear(x, module.q.weight, module.q_bias).unflatten(-1, (module.num_heads, -1))
    kv = F.linear(context, module.kv.weight, bias).unflatten(-1, (2, module.num_heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4)  # two of [B, h, K, D/h]
    return module.proj(_attend(q.transpose(1, 2), k, v))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention [B, N, D], with the [N, K] matrix in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, h, N, K]
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
