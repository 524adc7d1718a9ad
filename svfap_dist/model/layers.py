"""Transformer layers: attention, cross-attention, MLP and the two kinds of block made of them.

Used by the encoder and the decoder. All blocks are pre-norm with LayerNorm eps 1e-6; queries and
values have a bias, keys have none (a bias on keys would not change the softmax). Attention goes
through `scaled_dot_product_attention`, so no [N, N] matrix is kept. Parameter names are those of
the released SVFAP and VideoMAE weights.

Legend: B clips, N tokens, K context tokens, D width, h heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svfap_dist.model.linear import Linear, Projection

MLP_RATIO = 4


def layer_norm(dim: int) -> nn.LayerNorm:
    """The LayerNorm used everywhere in the model."""
    return nn.LayerNorm(dim, eps=1e-6)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for a linear layer; to be used with `Module.apply`.

    Source: VideoMAE's pre-training network. Its convolutions keep torch's default.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Mlp(nn.Module):
    """Two linear layers with GELU between them: [B, N, dim] -> [B, N, outputs]."""

    def __init__(self, dim: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head attention over heads laid out as [B, N or K, h, D/h] -> [B, N, D]."""
    x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return x.transpose(1, 2).flatten(2)  # [B, h, N, D/h] -> [B, N, D]


class Attention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Projection(dim, 3 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """What the tokens from `first` on take from all tokens: [B, N, D] -> [B, N - first, D]."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        # [B, N, 3*D] -> three of [B, N, h, D/h]
        q, k, v = self.qkv(x, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(_attend(q[:, first:], k, v))


class CrossAttention(nn.Module):
    """Attention of tokens [B, N, D] to a context [B, K, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Projection(dim, dim)
        self.kv = Projection(dim, 2 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        kv_bias = torch.cat((torch.zeros_like(self.v_bias), self.v_bias))
        q = self.q(x, self.q_bias).unflatten(-1, (self.num_heads, -1))  # [B, N, h, D/h]
        # [B, K, 2*D] -> two of [B, K, h, D/h]
        k, v = self.kv(context, kv_bias).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(_attend(q, k, v))


class DropPath(nn.Module):
    """Leaves a residual branch [B, N, D] out, clip by clip, with probability `rate`, when training.

    Kept branches are scaled by 1 / (1 - rate), so that what is expected stays the same. The choice
    is torch's global generator's: who trains seeds it before each step. Source: stochastic depth,
    arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keeping = 1 - self.rate
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keeping).div_(keeping)


class Recomputing(nn.Module):
    """A block that may forget what is inside it and compute it again in the backward pass.

    Subclasses say in `run` what they compute.
    """

    recomputes = False

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, *args: Any) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.run, *args, use_reentrant=False)
        return self.run(*args)


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing: from now on all blocks of `model` keep only what goes in.

    Costs a second forward pass; memory then grows by one tensor per block instead of a dozen.
    Source: Chen et al., arXiv 1604.06174.
    """
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.recomputes = True


class Block(Recomputing):
    """Standard transformer block: self-attention, then MLP. [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dim)
        self.drop_path = DropPath(drop_path)

    def run(self, x: Tensor, first: int = 0) -> Tensor:
        """The tokens from `first` on alone, [B, N - first, D]; the others are context."""
        x = x[:, first:] + self.drop_path(self.attn(self.norm1(x), first))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossBlock(Recomputing):
    """Cross-self block: attention to a context, then a standard block. [B, N, D] -> [B, N, D].

    With the bottleneck tokens as queries and the positions as context it summarises; the other way
    round ("reverse") it brings the spatial resolution back. Source: method section of the paper.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.cross_norm1 = layer_norm(dim)  # of the queries
        self.cross_norm2 = layer_norm(dim)  # of the context
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm1 = layer_norm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dim)
        self.drop_path = DropPath(drop_path)

    def run(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.drop_path(self.cross_attn(self.cross_norm1(x), self.cross_norm2(context)))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
