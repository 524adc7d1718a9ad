"""Transformer layers: linear layers, attention, MLP, and the two kinds of block made of them.

The encoder and the decoder are built from these. All blocks are pre-norm with LayerNorm eps 1e-6;
queries and values have a bias, keys have none (a bias on keys would not change the softmax).
Attention calls `scaled_dot_product_attention`, so no [N, N] matrix is kept. Parameter names are
those of the released SVFAP and VideoMAE weights.

Linear layers on the CPU use the faster of torch's two libraries. torch computes float32 matrix
products with MKL and convolutions with oneDNN. MKL does not use its AVX-512 code on CPUs that are
not Intel's, where a product takes twice as long as the same numbers as a convolution with a 1x1
kernel over images whose pixels are the tokens (`svfap bench model` prints both rates). On GPUs, on
Intel's CPUs, for other types, for few rows and in compiled programs, `F.linear` runs.

Legend: B clips, N tokens, K context tokens, D width, h heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MLP_RATIO = 4


def _prefers_convolutions() -> bool:
    """Whether this CPU has AVX-512, but not from Intel."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not (capability.startswith("AVX512") and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: nothing is known
        return False


# Decided once and by the make of the CPU, not by a measurement: a run that is resumed must compute
# as it did before, bit by bit. What follows goes by the number of rows alone for the same reason.
_CONVOLUTIONS = _prefers_convolutions()
# Below so many rows a convolution's own preparations cost more than it saves.
_FEWEST_ROWS = 256
# In a process with a single thread torch sends convolutions over fewer images to MKL after all.
_FEWEST_IMAGES = 16


def use_convolutions(wanted: bool) -> None:
    """Let the linear layers of this process be convolutions where that pays, or never."""
    global _CONVOLUTIONS  # noqa: PLW0603  # a process has one CPU
    _CONVOLUTIONS = wanted and _prefers_convolutions()


def uses_convolutions() -> bool:
    """Whether large float32 linear layers on the CPU are computed as convolutions."""
    return _CONVOLUTIONS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: [..., D], [O, D] and [O] -> [..., O]."""
    is_theirs = x.device.type == "cpu" and x.dtype is torch.float32
    # Not when compiled: under torch 2.13's inductor a run of these ended in a non-finite loss.
    if _CONVOLUTIONS and is_theirs and not torch.compiler.is_compiling():
        images = _num_images(x.shape[:-1].numel())
        if images:
            return _linear_by_convolution(x, weight, bias, images)
    return F.linear(x, weight, bias)


def _num_images(rows: int) -> int:
    """Images of equal size into which `rows` are laid for a convolution; 0 where none is faster."""
    if rows < _FEWEST_ROWS:
        return 0
    for images in range(_FEWEST_IMAGES, 2 * _FEWEST_IMAGES):
        if rows % images == 0:
            return images
    return 1  # which is faster with several threads only


def _linear_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, images: int) -> Tensor:
    """The same as a convolution over so many images, which must divide the rows of x."""
    rows = x.reshape(images, 1, -1, x.shape[-1])
    # [images, D, 1, rows of an image], channels last
    out = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))  # moves nothing


class Linear(nn.Linear):
    """A linear layer: [..., D] -> [..., O]."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Projection(nn.Linear):
    """A linear layer whose bias comes with the call: [..., D] -> [..., outputs].

    The layer itself runs, rather than its weight being borrowed, because ZeRO-3 gathers a module's
    weights when that module runs.
    """

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__(dim, outputs, bias=False)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(input, self.weight, bias)


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

    def received(self, x: Tensor) -> Tensor:
        """Return the attention that each token receives, mean over queries and heads: [B, N].

        Args:
            x: tokens [B, N, D].
        """
        query, key, _ = self.qkv.weight.chunk(3)
        heads = (self.num_heads, -1)
        q = F.linear(x, query, self.q_bias).unflatten(-1, heads)  # [B, N, h, D/h]
        k = F.linear(x, key).unflatten(-1, heads)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return scores.softmax(dim=-1).mean(dim=(1, 2))


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


class CheckpointedBlock(nn.Module):
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


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Activation checkpointing: from now on all blocks of `model` keep only what goes in.

    Costs a second forward pass; memory then grows by one tensor per block instead of a dozen.
    Source: Chen et al., arXiv 1604.06174.
    """
    for module in model.modules():
        if isinstance(module, CheckpointedBlock):
            module.recomputes = True


class Block(CheckpointedBlock):
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


class CrossBlock(CheckpointedBlock):
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
