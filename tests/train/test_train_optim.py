from __future__ import annotations

import torch

from svfap_dist.config import OptimConfig
from svfap_dist.model import autoencoder
from svfap_dist.train import optim


def test_only_matrices_and_kernels_decay() -> None:
    model = autoencoder.build("nano", num_frames=8, frame_size=32)
    optimizer = optim.adamw(model, OptimConfig(weight_decay=0.05))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        numbers_in_a_row = parameter.squeeze().ndim <= 1
        assert decay[id(parameter)] == (0.0 if numbers_in_a_row else 0.05), name


def test_betas_come_from_the_recipe() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = optim.adamw(model, OptimConfig(betas=(0.8, 0.9)))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9)] * 2
