"""What the head sees: the mean by default, grids and attention as options, of one stage or all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from svfap_dist.errors import ConfigError
from svfap_dist.model import classifier, flops
from svfap_dist.model.pooling import build_pool
from svfap_dist.model.sizes import resolve

BUILD: dict[str, Any] = {
    "size": "nano",
    "stage_depths": [1, 2],
    "num_frames": 4,
    "frame_size": 64,
    "temporal_kernel_size": 2,
}
SIZE = resolve("nano", {name: value for name, value in BUILD.items() if name != "size"})
SIDE, WIDTH = 4, 32  # patches of a frame's side


def stages() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, tubelets * SIDE**2, WIDTH) for tubelets in (2, 1)]


def test_the_default_is_the_mean_of_the_last_stage() -> None:
    first, last = stages()
    assert torch.equal(build_pool(SIZE)([first, last]), last.mean(dim=1, keepdim=True))
    both = build_pool(SIZE, stages="all")([first, last])
    assert_close(both, torch.stack([first.mean(dim=1), last.mean(dim=1)], dim=1))


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_a_grid_has_the_mean_of_each_cell_over_time(grid: int) -> None:
    tokens = stages()
    pool = build_pool(SIZE, "grid", "all", grid)
    expected = []
    for stage in tokens:
        picture = stage.unflatten(1, (-1, SIDE, SIDE)).mean(dim=1).permute(0, 3, 1, 2)
        cells = torch.nn.functional.adaptive_avg_pool2d(picture, grid)
        expected.append(cells.flatten(2).transpose(1, 2))
    assert_close(pool(tokens), torch.cat(expected, dim=1))
    assert pool.num_vectors == 2 * grid**2


def test_a_grid_finer_than_the_patches_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"finetune.grid or probe.grid. Found: 5 .*4 patches per side"
    ):
        build_pool(SIZE, "grid", grid=5)


def test_the_attentive_pooler_weighs_the_tokens_and_learns() -> None:
    tokens = stages()
    pool = build_pool(SIZE, "attentive", "all")
    out = pool(tokens)
    assert out.shape == (2, 1, WIDTH)
    # Whatever the order of the tokens, and not alike for all of them.
    turned = [stage.flip(1) for stage in tokens]
    assert_close(pool(turned), out)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pool.parameters())


@pytest.mark.parametrize(
    "pool",
    [None, {"stages": "all"}, {"kind": "grid", "grid": 3}, {"kind": "attentive", "stages": "all"}],
)
def test_operations_of_the_head_are_those_that_run(pool: dict[str, Any] | None) -> None:
    model = classifier.build(**BUILD, num_outputs=7, pool=pool).eval()
    tokens = stages()
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.head(model.fc_norm(model.pool(tokens)).flatten(1))
    counted = sum(flops.head(model.size, 7, pool).values())
    if pool and pool.get("kind") == "grid":  # the averages are a product, too
        counted += 2 * 9 * SIDE**2 * WIDTH
    assert counted * len(tokens[0]) == counter.get_total_flops()
