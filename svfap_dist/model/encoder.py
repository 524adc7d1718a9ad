"""The encoder: TPSBT (temporal pyramid and spatial bottleneck transformer), and within it the ViT.

In: clips, and the indices of the visible tokens (all of them when fine-tuning). Out: the tokens of
every stage. Stage 1 is a plain transformer, and alone it is the vanilla ViT of VideoMAE. Each later
stage halves time (pyramid), condenses the positions of a tubelet frame into a few bottleneck
tokens, works on those, and in its last, reverse block hands what they learnt back to the positions.
Pre-training and fine-tuning share this one class, so their weights cannot drift apart. The context
of the reverse block is the bottleneck tokens and nothing else: a wider context is how masked pixels
once leaked into the encoder.

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

    A convolution over time whose kernel equals its stride, computed as one linear layer over the k
    tokens side by side; weights keep the convolution's shape [D, D, k].
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, stride=kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        x = input.unflatten(1, (-1, self.kernel_size[0]))  # [B, t/k, k, s, D]
        x = x.transpose(2, 3).flatten(3)  # [B, t/k, s, k*D]
        return linear(x, self.weight.transpose(1, 2).flatten(1), self.bias)


class TemporalPool(nn.Module):
    """Merges k tubelet frames into their mean or maximum: [B, t, s, D] -> [B, t/k, s, D]."""

    def __init__(self, kind: str, kernel_size: int) -> None:
        super().__init__()
        self.kind, self.kernel_size = kind, kernel_size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (-1, self.kernel_size))  # [B, t/k, k, s, D]
        return groups.mean(2) if self.kind == "average" else groups.amax(2)


def _temporal_downsample(size: Size) -> nn.Module:
    """What a later stage begins with."""
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
        """What each position adds to each token, [B, t, s, z], summing to 1 over s."""
        return self.mlp(self.norm(x)).softmax(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x).transpose(2, 3) @ x


class Encoder(nn.Module):
    """TPSBT or ViT: clips -> tokens of every stage.

    drop_path: rate at which the last block's branches are dropped in training; it grows evenly from
    0 over the blocks.
    """

    def __init__(self, size: Size, drop_path: float = 0.0) -> None:
        super().__init__()
        self.num_tubelets = size.num_tubelets
        self.num_visible_tubelets = size.num_visible_tubelets or size.num_tubelets
        self.stage_depths = size.stage_depths
        self.has_bottleneck = size.bottleneck
        dim = size.embed_dim
        self.patch_embed = PatchEmbed(
            size.num_frames, size.frame_size, size.tubelet_size, size.patch_size, dim
        )
        later_block = CrossBlock if size.bottleneck else Block
        # The blocks of all stages in one list, numbered through, as in the released weights.
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
        """Tokens of each stage, [B, t*s, D], finest first.

        Clips are normalised floats [B, 3, F, H, W]; `visible` [B, V] are the sorted indices of the
        tokens to see, the same number, V/T, in every tubelet frame that has any. Where these are
        other patches in each frame, the i-th visible ones of neighbouring frames are merged. None
        means all.
        """
        x = self.patch_embed(clips, visible)  # [B, T*s, D]
        frames = self.num_tubelets if visible is None else self.num_visible_tubelets
        assert x.shape[1] % frames == 0, "as many visible tokens in each tubelet frame"
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
    """Sums the stages at the finest time resolution, then normalises: list -> [B, T*s, D].

    With `last_only` it is the last stage alone that is brought to that resolution.
    """

    def __init__(self, dim: int, num_tubelets: int, last_only: bool = False) -> None:
        super().__init__()
        self.num_tubelets = num_tubelets
        self.last_only = last_only
        self.norm = layer_norm(dim)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        positions = stages[0].shape[1] // self.num_tubelets
        first, *others = stages[-1:] if self.last_only else stages
        fused = self._at_finest(first, positions)
        for stage in others:
            fused = fused + self._at_finest(stage, positions)
        return self.norm(fused.flatten(1, 2))

    def _at_finest(self, stage: Tensor, positions: int) -> Tensor:
        """A stage [B, t*s, D] repeated in time, [B, T, s, D]."""
        x = stage.unflatten(1, (-1, positions))  # [B, t, s, D]
        # Nearest neighbour in time: each coarse frame stands for the T/t frames it came from.
        repeats = self.num_tubelets // x.shape[1]
        return x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)


class AttentionMap(NamedTuple):
    """Where some tokens of a stage get their content from, for pictures.

    label: of the picture. shares: [n, s], for each of n tokens or tubelet frames the shares of the
    s positions, which sum to 1. frames: for each of them, a frame of the clip to show it on.
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
