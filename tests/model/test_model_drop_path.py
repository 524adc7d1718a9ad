"""Drop path: nothing changes without it, and on average nothing changes with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from svfap_dist.model import classifier, layers
from svfap_dist.model.classifier import Classifier


def _classifier(drop_path: float = 0.0, **more: float) -> Classifier:
    torch.manual_seed(0)
    return classifier.build("nano", 3, drop_path, num_frames=16, frame_size=32, **more)


def _clips(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 32, 32, generator=torch.Generator().manual_seed(1))


def test_rates_grow_evenly_from_0_over_all_blocks() -> None:
    rates = [block.drop_path.rate for block in _classifier(0.1).encoder.blocks]
    assert rates == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08, 0.1])
    alone = classifier.build("nano", 3, 0.1, encoder="vit", stage_depths=[1])
    assert [block.drop_path.rate for block in alone.encoder.blocks] == [0.0]


def test_weights_are_the_same_with_and_without_it() -> None:
    plain, dropping = _classifier().state_dict(), _classifier(0.5).state_dict()
    assert list(plain) == list(dropping)
    assert all(torch.equal(plain[name], dropping[name]) for name in plain)


def test_outputs_are_bit_identical_at_rate_0_and_outside_training() -> None:
    plain, dropping, clips = _classifier(), _classifier(0.5), _clips()
    generator = torch.get_rng_state()
    assert torch.equal(plain.train()(clips), plain.eval()(clips))
    assert torch.equal(dropping.eval()(clips), plain(clips))
    assert torch.equal(torch.get_rng_state(), generator), "nothing was drawn"
    assert not torch.equal(dropping.train()(clips), plain(clips))


@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25)])  # a tensor in compiled blocks
def test_each_branch_of_each_clip_is_whole_or_gone_and_right_on_average(
    rate: float | Tensor,
) -> None:
    torch.manual_seed(2)
    drop = layers.DropPath(0.25).train()
    drop.rate = rate
    branch = torch.randn(4000, 3, 5)
    factors = drop(branch) / branch  # [B, N, D]
    assert torch.allclose(factors, factors[:, :1, :1].expand_as(factors))
    factor = factors[:, 0, 0]
    kept = factor > 0
    assert torch.allclose(factor[kept], torch.tensor(4 / 3))
    assert abs(kept.float().mean() - 0.75) < 0.035  # standard error 0.007
    assert abs(factor.mean() - 1) < 0.05


@pytest.mark.parametrize("kind", [layers.Block, layers.CrossBlock])
def test_a_block_without_its_branches_is_the_identity(kind: type) -> None:
    block, x = kind(32, 4, 0.999999).train(), torch.randn(2, 5, 32)
    context = (torch.randn(2, 3, 32),) if kind is layers.CrossBlock else ()
    assert torch.equal(block(x, *context), x)
    assert not torch.equal(block.eval()(x, *context), x)


def test_recomputed_blocks_drop_what_they_dropped_before() -> None:
    model = _classifier(0.5, head_init_scale=1.0).train()
    frugal = copy.deepcopy(model)
    layers.enable_activation_checkpointing(frugal)
    for network in (model, frugal):
        torch.manual_seed(3)
        network(_clips(4)).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_the_head_starts_as_small_as_configured() -> None:
    small, large = _classifier(), _classifier(head_init_scale=1.0)
    assert torch.allclose(small.head.weight, large.head.weight * classifier.HEAD_INIT_SCALE)
