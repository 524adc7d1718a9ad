"""Token splits for the model's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svfap_dist.model.sizes import Size

Split = tuple[Tensor, Tensor]


@pytest.fixture
def tubes() -> Callable[..., Split]:
    """Makes `visible` [B, V] and `masked` [B, M] of tubes: the same patches in every frame."""

    def split(size: Size, clips: int, visible_per_frame: int) -> Split:
        generator = torch.Generator().manual_seed(7)
        frames = torch.arange(size.num_tubelets).unsqueeze(1) * size.patches_per_frame
        kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
        for _ in range(clips):
            patches = torch.randperm(size.patches_per_frame, generator=generator)
            parts = patches[:visible_per_frame], patches[visible_per_frame:]
            for kind, part in zip(kinds, parts, strict=True):
                kind.append((frames + part.sort().values).flatten())
        return torch.stack(kinds[0]), torch.stack(kinds[1])

    return split
