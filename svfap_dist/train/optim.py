"""AdamW and what it decays.

torch's own AdamW is handed to DeepSpeed, since DeepSpeed's own needs a C++ compiler at run time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svfap_dist.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels, which are decayed, and the rest, which is not.

    Biases, norms and every other 1-D parameter go without decay, and so does the mask token, a
    vector stored as [1, 1, D] (released code: `no_weight_decay`).
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_vector = parameter.ndim <= 1 or name.endswith("mask_token")
        (free if is_vector else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of a model that already lies on its device, as one fused kernel."""
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=optim.lr,  # a place holder: the engine sets the rate of every step
        betas=optim.betas,
        fused=True,
    )
