"""The baseline of the benchmark computes what the model computes, only in another way."""

from __future__ import annotations

import copy

import pytest
import torch

from svfap_dist.bench import baseline
from svfap_dist.bench.steps import bench_recipe
from svfap_dist.model import autoencoder, patches
from svfap_dist.profiling.step import noise_batch


@pytest.mark.parametrize("encoder", ["tpsbt", "vit"])
def test_equal_weights_give_an_equal_loss_and_gradient(encoder: str) -> None:
    torch.manual_seed(0)
    model = autoencoder.build("nano", encoder=encoder)
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # zero at first, where a mistake could not be seen
            torch.nn.init.normal_(parameter)
    other = baseline.Straightforward(copy.deepcopy(model))
    batch = noise_batch(bench_recipe("nano", 2), 2)
    frames, visible, masked = batch.frames, batch.visible, batch.masked
    target = patches.targets(frames, masked)
    ours = patches.masked_patch_loss(model(frames, visible, masked), target)

    clips = patches.normalize(frames)
    mask = torch.ones(2, 800, dtype=torch.bool).scatter(1, visible, False)
    their_target = baseline.targets(clips, mask, (2, 16))
    theirs = patches.masked_patch_loss(other(clips, mask), their_target)
    torch.testing.assert_close(their_target, target, atol=1e-4, rtol=1e-4)
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-4)

    ours.backward()
    theirs.backward()
    gradients = dict(other.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-3)
