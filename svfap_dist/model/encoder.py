"""The encoder: TPSBT (temporal pyramid and spatial bottleneck transformer), of which ViT is a case.

In: clips, and the indices of the visible tokens (all of them when fine-tuning). Out: the tokens of
every stage. Stage 1 is a plain transformer, and alone it is the vanilla ViT of VideoMAE. Each later
stage halves time (pyramid), condenses the positions of a tubelet frame into a few bottleneck
tokens, processes those, and in its last, reverse block writes the result back to the positions.
Pre-training and fine-tuning share this class, so their weights have the same names and shapes. The
context of the reverse block is the bottleneck tokens only: in the released code it is the full
patch embedding, which leaks masked pixels into the encoder.

Source: arXiv 2401.00416, section on the TPSBT encoder.

Legend: B clips, T tubelet frames with visible tokens (all of the clip's unless whole frames are
masked), t of the stage, s positions per tubelet frame (S when all are visible), z bottleneck tokens
per tubelet frame, k temporal kernel, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svfap_dist.model.layers import (
    Attention,
    Block,
    CrossBlock,
    Mlp,
    init_linear,
    layer_norm,
    linear,
)
from svfap_dist.model.patches import PatchEmbed
from svfap_dist.model.sizes import Size


class TemporalDownsample(nn.Conv1d):
    """Merges k tubelet frames into one at each position: [B, t, s, D] -> [B, t/k, s, D].

    A convolution over time whose kernel equals its stride, computed as one linear layer over k
    concatenated tokens; weights keep the convolution's shape [D, D, k].
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, stride=kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """See `TemporalDownsample`."""
        x = input.unflatten(1, (-1, self.kernel_size[0]))  # [B, t/k, k, s, D]
        x = x.transpose(2, 3).flatten(3)  # [B, t/k, s, k*D]
        return linear(x, self.weight.transpose(1, 2).flatten(1), self.bias)


class TemporalPool(nn.Module):
    """Merges k tubelet frames into their mean or maximum: [B, t, s, D] -> [B, t/k, s, D]."""

    def __init__(self, kind: str, kernel_size: int) -> None:
        super().__init__()
        self.kind, self.kernel_size = kind, kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """See `TemporalPool`."""
        groups = x.unflatten(1, (-1, self.kernel_size))  # [B, t/k, k, s, D]
        return groups.mean(2) if self.kind == "average" else groups.amax(2)


def _temporal_downsample(size: Size) -> nn.Module:
    """Return the layer that a later stage begins with."""
    if not size.pyramid:
        return nn.Identity()
    if size.temporal_downsampling == "conv":
        return TemporalDownsample(size.embed_dim, size.temporal_kernel_size)
    return TemporalPool(size.temporal_downsampling, size.temporal_kernel_size)


class SpatialBottleneck(nn.Module):
    """Condenses the positions of each tubelet frame: [B, t, s, D] -> [B, t, z, D].

    Each bottleneck token is a weighted sum over the frame's positions, with softmax weights.
    """

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.norm = layer_norm(dim)
        self.mlp = Mlp(dim, dim // 4, num_tokens)

    def weights(self, x: Tensor) -> Tensor:
        """Return the weight of each position in each token, [B, t, s, z], summing to 1 over s.

        Args:
            x: positions [B, t, s, D].
        """
        return self.mlp(self.norm(x)).softmax(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """See `SpatialBottleneck`."""
        return self.weights(x).transpose(2, 3) @ x


class Encoder(nn.Module):
    """TPSBT or ViT: clips -> tokens of every stage.

    Args:
        size: dimensions and ablations.
        drop_path: rate at which the last block's branches are dropped in training; it grows evenly
            from 0 over the blocks.
    """

    def __init__(self, size: Size, drop_path: float = 0.0) -> None:
        super().__init__()
        self.num_tubelets = size.num_tubelets
        self.num_visible_tubelets = size.num_visible_tubelets or size.num_tubelets
        self.stage_depths = size.stage_depths
        self.has_bottleneck = size.bottleneck
        dim = size.embed_dim
        self.patch_embed = PatchEmbed(size)
        later_block = CrossBlock if size.bottleneck else Block
        # One list for the blocks of all stages, because the released weights number them so.
        kinds = [
            Block if stage == 0 else later_block
            for stage, depth in enumerate(size.stage_depths)
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(
            kind(dim, size.num_heads, drop_path * i / max(len(kinds) - 1, 1))
            for i, kind in enumerate(kinds)
        )
        self.temporal_downsamples = nn.ModuleList(
            _temporal_downsample(size) for _ in size.stage_depths[1:]
        )
        self.spatial_downsamples = nn.ModuleList(
            SpatialBottleneck(dim, tokens) for tokens in size.bottleneck_tokens if size.bottleneck
        )
        self.apply(init_linear)

    def forward(self, clips: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Return the tokens of each stage, [B, t*s, D], finest in time first.

        Args:
            clips: normalized floats [B, 3, F, H, W], or frames uint8 [B, F, H, W, 3], or the
                visible patches [B, V, P] from `patches.visible_patches`.
            visible: sorted indices of the visible tokens, [B, V]; None: all tokens. Every tubelet
                frame that has any has the same number of them, V/T. If they differ between frames
                (mask.kind = random), the i-th visible patches of adjacent frames are merged.
        """
        x = self.patch_embed(clips, visible)  # [B, T*s, D]
        frames = self.num_tubelets if visible is None else self.num_visible_tubelets
        assert x.shape[1] % frames == 0, "unequal numbers of visible tokens in the tubelet frames"
        blocks = iter(self.blocks)
        for _ in range(self.stage_depths[0]):
            x = next(blocks)(x)
        stages = [x]
        for stage, depth in enumerate(self.stage_depths[1:]):
            x = x.unflatten(1, (frames, -1))  # [B, t*s, D] -> [B, t, s, D]
            x = self.temporal_downsamples[stage](x)
            frames = x.shape[1]
            positions = x.flatten(1, 2)  # [B, t*s, D]
            if self.has_bottleneck:
                tokens = self.spatial_downsamples[stage](x).flatten(1, 2)  # [B, t*z, D]
                for _ in range(depth - 1):
                    tokens = next(blocks)(tokens, positions)
                x = next(blocks)(positions, tokens)
            else:
                x = positions
                for _ in range(depth):
                    x = next(blocks)(x)
            stages.append(x)
        return stages


class StageFusion(nn.Module):
    """Sums the stages at the finest time resolution, then normalizes: list -> [B, T*s, D].

    Args:
        dim: width of the tokens.
        num_tubelets: T, tubelet frames with visible tokens.
        last_only: use the last stage alone, repeated in time (ablation).
    """

    def __init__(self, dim: int, num_tubelets: int, last_only: bool = False) -> None:
        super().__init__()
        self.num_tubelets = num_tubelets
        self.last_only = last_only
        self.norm = layer_norm(dim)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the fused tokens [B, T*s, D].

        Args:
            stages: tokens of each stage, [B, t*s, D], finest in time first.
        """
        positions = stages[0].shape[1] // self.num_tubelets
        first, *others = stages[-1:] if self.last_only else stages
        fused = self._at_finest(first, positions)
        for stage in others:
            fused = fused + self._at_finest(stage, positions)
        return self.norm(fused.flatten(1, 2))

    def _at_finest(self, stage: Tensor, positions: int) -> Tensor:
        """Return a stage [B, t*s, D] repeated in time, [B, T, s, D]."""
        x = stage.unflatten(1, (-1, positions))  # [B, t, s, D]
        # Nearest neighbor in time: each coarse frame is repeated for the T/t frames it came from.
        repeats = self.num_tubelets // x.shape[1]
        return x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)


class AttentionMap(NamedTuple):
    """Where some tokens of a stage get their content from, for pictures.

    Attributes:
        label: title of the picture.
        shares: [n, s], for each of n tokens or tubelet frames the shares of the s positions, which
            sum to 1.
        frames: for each of the n, the frame of the clip to show it on.
    """

    label: str
    shares: Tensor
    frames: list[int]


@torch.no_grad()
def attention_maps(encoder: Encoder, clips: Tensor) -> list[AttentionMap]:
    """Return a map per stage: how its last attention, or its bottleneck, weights the positions.

    Args:
        encoder: the encoder.
        clips: one clip, normalized floats [1, 3, F, H, W].
    """
    inputs: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0]

    ends = itertools.accumulate(encoder.stage_depths)
    first, *others = [encoder.get_submodule(f"blocks.{end - 1}.attn") for end in ends]
    watched = [first, *(encoder.spatial_downsamples or others)]
    hooks = [module.register_forward_pre_hook(remember) for module in watched]
    try:
        stages = encoder(clips)
    finally:
        for hook in hooks:
            hook.remove()
    positions = stages[0].shape[1] // encoder.num_tubelets
    found = []
    for number, (module, stage) in enumerate(zip(watched, stages, strict=True), start=1):
        frames = stage.shape[1] // positions  # of the stage, t
        middles = [clips.shape[2] * (2 * t + 1) // (2 * frames) for t in range(frames)]
        if isinstance(module, SpatialBottleneck):
            shares = module.weights(inputs[module])[0, frames // 2].T  # [z, s]
            found.append(
                AttentionMap(f"tokens {number}", shares, [middles[frames // 2]] * len(shares))
            )
        else:
            assert isinstance(module, Attention)
            shares = module.received(inputs[module])[0].unflatten(0, (frames, -1))
            shares = shares / shares.sum(dim=1, keepdim=True)  # [t, s], of each frame's attention
            found.append(AttentionMap(f"attention {number}", shares, middles))
    return found
