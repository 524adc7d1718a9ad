"""LoRA: narrow trained matrices beside frozen linear layers, and their sum with the weights.

An adapter of rank r adds (alpha / r) * up @ down to the weight [O, D] of its layer, without forming
that matrix: down is [r, D], up [O, r]. `up` begins as zeros, so an adapted network first computes
what it did before. Training keeps both apart; `merged` adds them, and the result is an ordinary
network with the same outputs.

Source: arXiv 2106.09685, and its released code for the initial values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist.errors import ConfigError
from svfap_dist.model.layers import Linear, Projection, linear

_UP, _DOWN = "adapter.up", "adapter.down"


class Adapter(nn.Module):
    """The low-rank part of a linear layer: [..., D] -> [..., O].

    Args:
        layer: the layer, for its widths.
        rank: r.
        alpha: the product is scaled by alpha / r.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """See `Adapter`."""
        return linear(linear(x, self.down), self.up) * self.scale


def add_adapters(encoder: nn.Module, rank: int, alpha: float) -> None:
    """Give every linear layer of an encoder (attention and MLP) an adapter, in place.

    Args:
        encoder: the encoder.
        rank: of the adapters.
        alpha: their scale is alpha / rank.

    Raises:
        ConfigError: The encoder has no such layer, or the rank is not below its width.
    """
    found = [layer for layer in encoder.modules() if isinstance(layer, Linear | Projection)]
    width = max((layer.in_features for layer in found), default=0)
    if rank >= width:
        what = f"rank {rank}, where the widest of {len(found)} linear layers takes {width} numbers"
        advice = "lower finetune.lora_rank, or use finetune.mode=full"
        raise ConfigError("LoRA does not fit the encoder", "finetune.lora_rank", what, advice)
    for layer in found:
        layer.adapter = Adapter(layer, rank, alpha)


def merged(
    build: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a network's arguments of `build` and weights with its adapters added to the weights.

    Args:
        build: as stored beside the weights; without "lora", both are returned as they are.
        state: the weights; sums are computed in float32.
    """
    build, state = dict(build), dict(state)
    if (lora := build.pop("lora", None)) is None:
        return build, state
    scale = lora["alpha"] / lora["rank"]
    for name in [name for name in state if name.endswith(_UP)]:
        layer = name.removesuffix(_UP)
        up, down = (state.pop(f"{layer}{part}").float() for part in (_UP, _DOWN))
        state[f"{layer}weight"] = state[f"{layer}weight"].float() + scale * (up @ down)
    return build, state
