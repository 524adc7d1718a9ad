"""What the head of a classifier sees: the encoder's tokens pooled to one or more vectors.

In: tokens of every stage. Out: V vectors per clip, [B, V, D], which the classifier normalizes and
lays end to end for its head. The paper's way is the mean of all tokens of the last stage. A grid
keeps where in the picture something was, and the attentive pooler learns where to look: a learned
query attends to all tokens, then an MLP (V-JEPA's attentive probe, arXiv 2404.08471). To add a way
to pool, write a module and add its row to `POOLS`.

Legend: B clips, V vectors, t tubelet frames of a stage, S positions of a frame, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svfap_dist.errors import ConfigError
from svfap_dist.model.layers import MLP_RATIO, CrossAttention, Mlp, init_linear, layer_norm
from svfap_dist.model.sizes import Size

_QUERY_STD = 0.02  # as in V-JEPA's released code


class Pool(nn.Module):
    """A way to pool; the last stage's tokens, or those of all stages.

    Args:
        size: dimensions of the encoder.
        all_stages: whether every stage is pooled.
        grid: cells per side that each stage is pooled to.
    """

    def __init__(self, size: Size, all_stages: bool, grid: int) -> None:
        super().__init__()
        self.all_stages = all_stages
        self.num_vectors = (len(size.stage_depths) if all_stages else 1) * grid**2

    def chosen(self, stages: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the stages that are pooled.

        Args:
            stages: tokens of each stage, [B, t*S, D].
        """
        return stages if self.all_stages else stages[-1:]


class MeanPool(Pool):
    """The mean of a stage's tokens: list of [B, t*S, D] -> [B, V, D]."""

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """See `MeanPool`."""
        return torch.stack([tokens.mean(dim=1) for tokens in self.chosen(stages)], dim=1)


class GridPool(Pool):
    """Means of a stage's tokens over the cells of a grid: list of [B, t*S, D] -> [B, V, D]."""

    cells: Tensor

    def __init__(self, size: Size, all_stages: bool, grid: int) -> None:
        super().__init__(size, all_stages, grid)
        positions = size.patches_per_frame
        side = math.isqrt(positions)
        if grid > side:
            found = f"{grid} cells per side, where a frame has {side} patches per side"
            advice = f"use at most {side}, or a smaller model.patch_size"
            raise ConfigError(
                "Grid is finer than the patches", "finetune.grid or probe.grid", found, advice
            )
        # The share of each position in each cell, [grid * grid, S].
        each = F.adaptive_avg_pool2d(torch.eye(positions).view(positions, side, side), grid)
        self.register_buffer("cells", each.flatten(1).T.contiguous(), persistent=False)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """See `GridPool`."""
        frames = (
            x.unflatten(1, (-1, self.cells.shape[1])).mean(dim=1) for x in self.chosen(stages)
        )
        return torch.cat([self.cells.to(frame.dtype) @ frame for frame in frames], dim=1)


class AttentivePool(Pool):
    """A learned query's attention to all tokens, then an MLP: list of [B, t*S, D] -> [B, 1, D]."""

    def __init__(self, size: Size, all_stages: bool, grid: int) -> None:
        super().__init__(size, all_stages, grid)
        self.num_vectors, dim = 1, size.embed_dim
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=_QUERY_STD))
        self.norm1 = layer_norm(dim)
        self.cross_attn = CrossAttention(dim, size.num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dim)
        self.apply(init_linear)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """See `AttentivePool`."""
        tokens = torch.cat(list(self.chosen(stages)), dim=1)
        x = self.query.expand(len(tokens), -1, -1)
        x = x + self.cross_attn(x, self.norm1(tokens))
        return x + self.mlp(self.norm2(x))


POOLS: Mapping[str, type[Pool]] = {
    "mean": MeanPool,
    "grid": GridPool,
    "attentive": AttentivePool,
}


def build_pool(size: Size, kind: str = "mean", stages: str = "last", grid: int = 1) -> Pool:
    """Return a freshly initialized way to pool.

    Args:
        size: dimensions of the encoder.
        kind: a key of `POOLS`.
        stages: last or all.
        grid: cells per side, of kind grid.

    Raises:
        ConfigError: The grid is finer than the patches.
    """
    return POOLS[kind](size, stages == "all", grid)


def arguments(kind: str, stages: str, grid: int) -> dict[str, Any]:
    """Return the arguments of `build_pool` that differ from the paper's way; {} for that.

    Args:
        kind: See `build_pool`.
        stages: See `build_pool`.
        grid: See `build_pool`.
    """
    given: dict[str, Any] = {} if kind == "mean" else {"kind": kind}
    if stages != "last":
        given["stages"] = stages
    return given | ({"grid": grid} if kind == "grid" else {})
