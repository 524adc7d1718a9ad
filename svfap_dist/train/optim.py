"""AdamW: what it decays, and how fast each layer learns.

torch's own AdamW is handed to DeepSpeed, since DeepSpeed's own needs a C++ compiler at run time.

Fine-tuning has layer decay: the further a layer is from the head, the smaller its rate, so that
what was pre-trained changes least where it is most general. Layers are numbered as in the released
fine-tuning code: 0 is the patch embedding, 1..L are the blocks of all stages in order, and L + 1 is
all the rest: last norm and head, but also what lies between two stages (temporal and spatial
down-sampling), which thus learns at the full rate.

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

Named = tuple[str, nn.Parameter]


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of what is trained: matrices and kernels, which are decayed, and the rest, which is
    not.

    Biases, norms and every other 1-D parameter go without decay, and so does the mask token, a
    vector stored as [1, 1, D] (released code: `no_weight_decay`). With a layer decay, every layer
    has these two groups, whose `lr_scale` is layer_decay to the power of the layers behind it.
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


def _by_weight_decay(named: Iterable[Named], weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        is_vector = parameter.ndim <= 1 or name.endswith("mask_token")
        (free if is_vector else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def layer_ids(names: Iterable[str], encoder: EncoderSpec) -> dict[str, int]:
    """Return the layer of each parameter of a classifier: 0..L + 1 for L blocks.

    Args:
        names: of all its parameters.
        encoder: row of its encoder, which says how the parameters of blocks are called.
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
    """The optimizer of a model that already lies on its device, as one fused kernel."""
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay, layer_decay),
        lr=optim.lr,  # a place holder: the engine sets the rate of every step
        betas=optim.betas,
        fused=True,
    )
