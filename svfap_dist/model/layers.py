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
    """Return whether this CPU has AVX-512 and is not Intel's."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not (capability.startswith("AVX512") and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the vendor is unknown
        return False


# Decided once, by the vendor of the CPU and not by a measurement: a resumed run must compute the
# same bits as before. For the same reason the choice per call depends on the number of rows only.
_CONVOLUTIONS = _prefers_convolutions()
_MIN_ROWS = 256  # below it the overhead of a convolution exceeds what it saves
_MIN_IMAGES = 16  # with a single thread, torch uses MKL for convolutions over fewer images


def use_convolutions(wanted: bool) -> None:
    """Choose whether this process may compute linear layers as convolutions, where that is faster.

    Args:
        wanted: False: never.
    """
    global _CONVOLUTIONS  # noqa: PLW0603  # a process has one CPU
    _CONVOLUTIONS = wanted and _prefers_convolutions()


def uses_convolutions() -> bool:
    """Return whether large float32 linear layers on the CPU are computed as convolutions."""
    return _CONVOLUTIONS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `torch.nn.functional.linear(x, weight, bias)`, [..., O].

    Args:
        x: [..., D].
        weight: [O, D].
        bias: [O], or None.
    """
    is_cpu_float32 = x.device.type == "cpu" and x.dtype is torch.float32
    # Not when compiled: with torch 2.13's inductor a run of these ended in a non-finite loss.
    if _CONVOLUTIONS and is_cpu_float32 and not torch.compiler.is_compiling():
        images = _num_images(x.shape[:-1].numel())
        if images:
            return _linear_by_convolution(x, weight, bias, images)
    return F.linear(x, weight, bias)


def _num_images(rows: int) -> int:
    """Return the number of equal images to split rows into for a convolution; 0: use none."""
    if rows < _MIN_ROWS:
        return 0
    for images in range(_MIN_IMAGES, 2 * _MIN_IMAGES):
        if rows % images == 0:
            return images
    return 1  # faster with several threads only


def _linear_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, images: int) -> Tensor:
    """Compute the linear layer as a convolution; `images` must divide the rows of x."""
    rows = x.reshape(images, 1, -1, x.shape[-1])
    # [images, D, 1, rows of an image], channels last
    out = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))  # a view


class Linear(nn.Linear):
    """A linear layer: [..., D] -> [..., O]. adapter: added to it (see `lora`); None: nothing is."""

    def __init__(self, dim: int, outputs: int, bias: bool = True) -> None:
        super().__init__(dim, outputs, bias)
        self.adapter: nn.Module | None = None

    def forward(self, input: Tensor) -> Tensor:
        """See `Linear`."""
        out = linear(input, self.weight, self.bias)
        return out if self.adapter is None else out + self.adapter(input)


class Projection(nn.Linear):
    """A linear layer whose bias is an argument of the call: [..., D] -> [..., outputs].

    It is a module, and not a bare weight, because ZeRO-3 gathers weights when their module runs.
    """

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__(dim, outputs, bias=False)
        self.adapter: nn.Module | None = None  # as of `Linear`

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Projection`."""
        out = linear(input, self.weight, bias)
        return out if self.adapter is None else out + self.adapter(input)


def layer_norm(dim: int) -> nn.LayerNorm:
    """Return the LayerNorm that is used everywhere in the model.

    Args:
        dim: width of the tokens.
    """
    return nn.LayerNorm(dim, eps=1e-6)


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer with Xavier-uniform weights and zero biases.

    Source: VideoMAE's pre-training network. Its convolutions keep torch's default.

    Args:
        module: any module, as `Module.apply` passes them; others than linear layers are kept.
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
        """See `Mlp`."""
        return self.fc2(F.gelu(self.fc1(x)))


def _from(x: Tensor, first: int) -> Tensor:
    """Return the tokens from `first`; all of them without a view, which would cost a host time."""
    return x[:, first:] if first else x


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return multi-head attention of q [B, N, h, D/h] to k and v [B, K, h, D/h]: [B, N, D]."""
    x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return x.transpose(1, 2).flatten(2)  # [B, h, N, D/h] -> [B, N, D]


class Attention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values."""

    k_bias: Tensor  # zeros, so that all three biases are one vector

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Projection(dim, 3 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Return the attention of the tokens from `first` to all tokens, [B, N - first, D].

        Args:
            x: tokens [B, N, D].
            first: index of the first query; the tokens before it are keys and values only.
        """
        bias = torch.cat((self.q_bias, self.k_bias.to(self.q_bias.dtype), self.v_bias))
        # [B, N, 3*D] -> three of [B, N, h, D/h]
        q, k, v = self.qkv(x, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(_attend(_from(q, first), k, v))

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

    k_bias: Tensor  # zeros, so that both biases of the context are one vector

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Projection(dim, dim)
        self.kv = Projection(dim, 2 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """See `CrossAttention`."""
        kv_bias = torch.cat((self.k_bias.to(self.v_bias.dtype), self.v_bias))
        q = self.q(x, self.q_bias).unflatten(-1, (self.num_heads, -1))  # [B, N, h, D/h]
        # [B, K, 2*D] -> two of [B, K, h, D/h]
        k, v = self.kv(context, kv_bias).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(_attend(q, k, v))


class DropPath(nn.Module):
    """Drops a residual branch [B, N, D] per clip with probability `rate` in training.

    Kept branches are scaled by 1 / (1 - rate), so that the expected value stays the same. Random
    numbers come from torch's global generator, which training seeds before each step. Source:
    stochastic depth, arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate: float | Tensor = rate  # a tensor in compiled blocks, see `train.regions`
        self.drops = rate > 0

    def forward(self, branch: Tensor) -> Tensor:
        """See `DropPath`."""
        if not self.training or not self.drops:
            return branch
        keep = 1 - self.rate
        if isinstance(keep, Tensor):
            kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
            return branch * (kept / keep).to(branch.dtype)
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep)


class CheckpointedBlock(nn.Module):
    """A block with optional activation checkpointing. Subclasses compute in `run`."""

    is_checkpointed = False

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the block.

        Args:
            *args: those of `forward`.
            **kwargs: those of `forward`.
        """
        raise NotImplementedError

    def forward(self, *args: Any) -> Tensor:
        """See `run` of the subclass."""
        if self.is_checkpointed and torch.is_grad_enabled():
            return checkpoint(self.run, *args, use_reentrant=False)
        return self.run(*args)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Make all blocks of a model keep only their inputs for the backward pass.

    Costs a second forward pass; memory then grows by one tensor per block instead of a dozen.
    Source: Chen et al., arXiv 1604.06174.

    Args:
        model: a network made of `CheckpointedBlock`s.
    """
    for module in model.modules():
        if isinstance(module, CheckpointedBlock):
            module.is_checkpointed = True


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
        """Return the tokens from `first`, [B, N - first, D].

        Args:
            x: tokens [B, N, D].
            first: index of the first output; the tokens before it are context only.
        """
        x = _from(x, first) + self.drop_path(self.attn(self.norm1(x), first))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossBlock(CheckpointedBlock):
    """Cross-self block: attention to a context, then a standard block. [B, N, D] -> [B, N, D].

    With bottleneck tokens as queries and positions as context it summarizes; with the roles swapped
    (the "reverse" block) it restores the spatial resolution. Source: method section of the paper.
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
        """Return the updated tokens, [B, N, D].

        Args:
            x: tokens, the queries of the cross-attention, [B, N, D].
            context: its keys and values, [B, K, D].
        """
        x = x + self.drop_path(self.cross_attn(self.cross_norm1(x), self.cross_norm2(context)))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
