"""The released fine-tuned network restated from the paper, einsum by einsum: an oracle.

It reads a state dict in the released layout directly; none of our modules takes part in it."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]

SMALL = {"width": 32, "depths": (2, 3, 2), "tokens": (4, 4), "kernel": 2, "outputs": 7}

# Build arguments that the tables do not have for such small networks.
SMALL_CLIP = {"num_heads": 4, "stage_depths": (2, 3, 2), "frame_size": 48}


class _Released(dict[str, Tensor]):
    """A random state dict, filled name by name; no value is at a default that hides a mistake."""

    def linear(self, name: str, outputs: int, *inputs: int, bias: bool = True) -> None:
        fan_in = torch.Size(inputs).numel()
        self[f"{name}.weight"] = torch.randn(outputs, *inputs) / fan_in**0.5
        if bias:
            self[f"{name}.bias"] = torch.randn(outputs) * 0.2

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = 1 + torch.randn(width) * 0.2
        self[f"{name}.bias"] = torch.randn(width) * 0.2

    def biases(self, name: str, width: int) -> None:
        self[f"{name}.q_bias"] = torch.randn(width) * 0.2
        self[f"{name}.v_bias"] = torch.randn(width) * 0.2

    def block(self, name: str, width: int, crosses: bool) -> None:
        if crosses:
            self.norm(f"{name}.cross_norm1", width)
            self.norm(f"{name}.cross_norm2", width)
            self.linear(f"{name}.cross_attn.q", width, width, bias=False)
            self.linear(f"{name}.cross_attn.kv", 2 * width, width, bias=False)
            self.biases(f"{name}.cross_attn", width)
            self.linear(f"{name}.cross_attn.proj", width, width)
        self.norm(f"{name}.norm1", width)
        self.linear(f"{name}.attn.qkv", 3 * width, width, bias=False)
        self.biases(f"{name}.attn", width)
        self.linear(f"{name}.attn.proj", width, width)
        self.norm(f"{name}.norm2", width)
        self.linear(f"{name}.mlp.fc1", 4 * width, width)
        self.linear(f"{name}.mlp.fc2", width, 4 * width)


def released(
    width: int, depths: tuple[int, ...], tokens: tuple[int, ...], kernel: int, outputs: int
) -> State:
    """A fine-tuned network in the released layout."""
    torch.manual_seed(0)
    state = _Released()
    state.linear("patch_embed.proj", width, 3, 2, 16, 16)
    for number in range(sum(depths)):
        state.block(f"blocks.{number}", width, crosses=number >= depths[0])
    for stage, count in enumerate(tokens):
        state.linear(f"temporal_downsamples.{stage}", width, width, kernel)
        state.norm(f"spatial_downsamples.{stage}.norm", width)
        state.linear(f"spatial_downsamples.{stage}.mlp.fc1", width // 4, width)
        state.linear(f"spatial_downsamples.{stage}.mlp.fc2", count, width // 4)
    state.norm("fc_norm", width)
    state.linear("head", outputs, width)
    return dict(state)


def _norm(x: Tensor, w: State, name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centered / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(x: Tensor, w: State, name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def _mlp(x: Tensor, w: State, name: str) -> Tensor:
    hidden = _linear(x, w, f"{name}.fc1")
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return _linear(gelu, w, f"{name}.fc2")


def _softmax(x: Tensor, dim: int) -> Tensor:
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


def _attention(x: Tensor, context: Tensor, weight: Tensor, w: State, name: str, h: int) -> Tensor:
    """Attention with the rows of `weight` making queries of x, keys and values of the context."""
    q, k, v = (part.unflatten(0, (h, -1)) for part in weight.chunk(3))  # [h, d, D]
    bias_q, bias_v = (w[f"{name}.{bias}"].unflatten(0, (h, -1)) for bias in ("q_bias", "v_bias"))
    queries = torch.einsum("bni,hdi->bhnd", x, q) + bias_q[:, None]
    keys = torch.einsum("bki,hdi->bhkd", context, k)
    values = torch.einsum("bki,hdi->bhkd", context, v) + bias_v[:, None]
    scores = torch.einsum("bhnd,bhkd->bhnk", queries, keys) * q.shape[1] ** -0.5
    mixed = torch.einsum("bhnk,bhkd->bnhd", _softmax(scores, -1), values).flatten(2)
    return _linear(mixed, w, f"{name}.proj")


def _block(x: Tensor, w: State, name: str, h: int, context: Tensor | None = None) -> Tensor:
    if context is not None:
        cross = f"{name}.cross_attn"
        weight = torch.cat((w[f"{cross}.q.weight"], w[f"{cross}.kv.weight"]))
        x = x + _attention(
            _norm(x, w, f"{name}.cross_norm1"),
            _norm(context, w, f"{name}.cross_norm2"),
            weight,
            w,
            cross,
            h,
        )
    y = _norm(x, w, f"{name}.norm1")
    x = x + _attention(y, y, w[f"{name}.attn.qkv.weight"], w, f"{name}.attn", h)
    return x + _mlp(_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp")


def _embedded(clips: Tensor, w: State) -> Tensor:
    """Tokens [B, N, D] of clips [B, 3, F, H, W] with their positions."""
    pixels = clips.unfold(2, 2, 2).unfold(3, 16, 16).unfold(4, 16, 16)  # [B, 3, T, y, x, 2, p, p]
    x = torch.einsum("bctyxfuv,dcfuv->btyxd", pixels, w["patch_embed.proj.weight"]).flatten(1, 3)
    width = x.shape[2]
    pairs = torch.arange(width) // 2 * 2 / width
    angles = torch.arange(x.shape[1])[:, None].double() / 10000**pairs
    table = torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())
    return x + w["patch_embed.proj.bias"] + table.to(x.dtype)


def released_forward(clips: Tensor, w: State, depths: tuple[int, ...], heads: int) -> Tensor:
    """Scores of the released fine-tuned network."""
    x, t = _embedded(clips, w), clips.shape[2] // 2
    numbers = iter(range(sum(depths)))
    for _ in range(depths[0]):
        x = _block(x, w, f"blocks.{next(numbers)}", heads)
    for stage, depth in enumerate(depths[1:]):
        convolution = w[f"temporal_downsamples.{stage}.weight"]  # [D, D, k]
        kernel = convolution.shape[2]
        frames = x.unflatten(1, (t // kernel, kernel, -1))  # [B, t, k, s, D]
        merged = torch.einsum("btksi,oik->btso", frames, convolution)
        merged, t = merged + w[f"temporal_downsamples.{stage}.bias"], t // kernel
        name = f"spatial_downsamples.{stage}"
        shares = _softmax(_mlp(_norm(merged, w, f"{name}.norm"), w, f"{name}.mlp"), dim=2)
        x = merged.flatten(1, 2)
        z = torch.einsum("btsz,btsd->btzd", shares, merged).flatten(1, 2)
        for _ in range(depth - 1):
            z = _block(z, w, f"blocks.{next(numbers)}", heads, context=x)
        x = _block(x, w, f"blocks.{next(numbers)}", heads, context=z)
    return _linear(_norm(x.mean(1), w, "fc_norm"), w, "head")
