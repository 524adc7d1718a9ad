"""The TPSBT encoder: temporal pyramid and spatial bottleneck transformer.

In: clips, and the indices of the visible tokens (all of them when fine-tuning). Out: the tokens of
every stage. Stage 1 is a plain transformer. Each later stage halves time (pyramid), condenses the
positions of a tubelet frame into a few bottleneck tokens, works on those, and in its last, reverse
block hands what they learnt back to the positions. Pre-training and fine-tuning share this one
class, so their weights cannot drift apart. The context of the reverse block is the bottleneck
tokens and nothing else: a wider context is how masked pixels once leaked into the encoder.

Source: arXiv 2401.00416, section on the TPSBT encoder.

Legend: B clips, T tubelet frames of the clip, t of the stage, s positions per tubelet frame (S when
all are visible), z bottleneck tokens per tubelet frame, k temporal kernel, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from svfap_dist.model.layers import Block, CrossBlock, Mlp, init_linear, layer_norm
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
        return F.linear(x, self.weight.transpose(1, 2).flatten(1), self.bias)


class SpatialBottleneck(nn.Module):
    """Condenses the positions of each tubelet frame: [B, t, s, D] -> [B, t, z, D].

    Each bottleneck token is a weighted sum over the frame's positions, with softmax weights.
    """

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.norm = layer_norm(dim)
        self.mlp = Mlp(dim, dim // 4, num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.mlp(self.norm(x)).softmax(dim=2)  # [B, t, s, z], summing to 1 over s
        return weights.transpose(2, 3) @ x


class Encoder(nn.Module):
    """TPSBT: clips -> tokens of every stage."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_tubelets = size.num_tubelets
        self.stage_depths = size.stage_depths
        dim, later_stages = size.embed_dim, range(1, len(size.stage_depths))
        self.patch_embed = PatchEmbed(
            size.num_frames, size.frame_size, size.tubelet_size, size.patch_size, dim
        )
        # The blocks of all stages in one list, numbered through, as in the released weights.
        self.blocks = nn.ModuleList(
            (Block if stage == 0 else CrossBlock)(dim, size.num_heads)
            for stage, depth in enumerate(size.stage_depths)
            for _ in range(depth)
        )
        self.temporal_downsamples = nn.ModuleList(
            TemporalDownsample(dim, size.temporal_kernel_size) for _ in later_stages
        )
        self.spatial_downsamples = nn.ModuleList(
            SpatialBottleneck(dim, size.num_bottleneck_tokens) for _ in later_stages
        )
        self.apply(init_linear)

    def forward(self, clips: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Tokens of each stage, [B, t*s, D], finest first.

        Clips are normalised floats [B, 3, F, H, W]; `visible` [B, V] are the sorted indices of the
        tokens to see, tubes: the same number, V/T, in every tubelet frame. None means all.
        """
        x = self.patch_embed(clips, visible)  # [B, T*s, D]
        assert x.shape[1] % self.num_tubelets == 0, "as many visible tokens in each tubelet frame"
        blocks = iter(self.blocks)
        for _ in range(self.stage_depths[0]):
            x = next(blocks)(x)
        stages = [x]
        x = x.unflatten(1, (self.num_tubelets, -1))  # [B, T*s, D] -> [B, T, s, D]
        for depth, merge, condense in zip(
            self.stage_depths[1:], self.temporal_downsamples, self.spatial_downsamples, strict=True
        ):
            x = merge(x)  # [B, t, s, D]
            positions = x.flatten(1, 2)  # [B, t*s, D]
            bottleneck = condense(x).flatten(1, 2)  # [B, t*z, D]
            for _ in range(depth - 1):
                bottleneck = next(blocks)(bottleneck, positions)
            positions = next(blocks)(positions, bottleneck)
            stages.append(positions)
            x = positions.view_as(x)
        return stages


class StageFusion(nn.Module):
    """Sums the stages at the finest time resolution, then normalises: list -> [B, T*s, D]."""

    def __init__(self, dim: int, num_tubelets: int) -> None:
        super().__init__()
        self.num_tubelets = num_tubelets
        self.norm = layer_norm(dim)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        finest = stages[0].unflatten(1, (self.num_tubelets, -1))  # [B, T, s, D]
        fused = finest
        for coarse in stages[1:]:
            x = coarse.unflatten(1, (-1, finest.shape[2]))  # [B, t, s, D]
            # Nearest neighbour in time: each coarse frame stands for the T/t frames it came from.
            repeats = self.num_tubelets // x.shape[1]
            x = x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)  # [B, T, s, D]
            fused = fused + x
        return self.norm(fused.flatten(1, 2))
