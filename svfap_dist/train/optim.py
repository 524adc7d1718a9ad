"""AdamW: weight decay and learning rate scale per parameter group.

DeepSpeed gets torch's AdamW, because its own needs a C++ compiler at run time.

Fine-tuning has layer decay: the further a layer is from the head, the smaller its learning rate, so
that general pre-trained features change least. Layers are numbered as in the released fine-tuning
code: 0 is the patch embedding, 1..L are the blocks of all stages in order, and L + 1 is the rest:
last norm and head, and also the temporal and spatial down-sampling between stages, which thus
learns at the full rate.

Source: `get_num_layer_for_vit` of VideoMAE's optim_factory.py (from BEiT, arXiv 2106.08254), which
the released run_class_finetuning.py uses with L = all blocks of the encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from svfap_dist.config import OptimConfig
from svfap_dist.model.sizes import ENCODERS, EncoderSpec, Size


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return parameter groups for AdamW: trained parameters with weight decay, and those without.

    Biases, norms and all other 1-D parameters have no weight decay, nor has the mask token, a
    vector stored as [1, 1, D] (released code: `no_weight_decay`). With layer decay, every layer has
    these two groups, with `lr_scale` = layer_decay to the power of the number of layers after it.

    Args:
        model: Network; with layer decay, a classifier.
        weight_decay: Weight decay of matrices and kernels.
        layer_decay: Factor of the learning rate from a layer to the one before it; 1: none.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if layer_decay == 1:
        return _by_weight_decay(trained, weight_decay)
    encoder = ENCODERS[cast(Size, model.size).encoder]
    ids = layer_ids((name for name, _ in model.named_parameters()), encoder)
    last = max(ids.values())
    return [
        {**group, "lr_scale": layer_decay ** (last - layer)}
        for layer in sorted({ids[name] for name, _ in trained})
        for group in _by_weight_decay([n for n in trained if ids[n[0]] == layer], weight_decay)
    ]


def _by_weight_decay(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    groups: tuple[dict[str, Any], ...] = (
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    )
    for name, parameter in named:
        is_vector = parameter.ndim <= 1 or name.endswith("mask_token")
        groups[is_vector]["params"].append(parameter)
    return list(groups)


def layer_ids(names: Iterable[str], encoder: EncoderSpec) -> dict[str, int]:
    """Return the layer of each parameter of a classifier: 0..L + 1 for L blocks.

    Args:
        names: Names of all its parameters.
        encoder: Row of its encoder, for the names of the parameters of blocks.
    """
    within = {name: name.removeprefix("encoder.") for name in names}
    blocks = {name: re.match(encoder.block, inner) for name, inner in within.items()}
    numbers = {name: int(match[1]) + 1 for name, match in blocks.items() if match}
    last = max(numbers.values()) + 1
    return {
        name: 0 if re.match(encoder.embedding, inner) else numbers.get(name, last)
        for name, inner in within.items()
    }


def adamw(model: nn.Module, optim: OptimConfig, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """Return a fused AdamW for a model that is already on its device.

    Args:
        model: The network.
        optim: [optim] of the recipe.
        layer_decay: See `parameter_groups`.
    """
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay, layer_decay),
        lr=optim.lr,  # a placeholder: the engine sets the rate of every step
        betas=optim.betas,
        fused=True,
    )
