"""The inputs and the loss of pre-training, from RGB frames and from planes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from svfap_dist.config import recipe
from svfap_dist.data.batch import ClipBatch
from svfap_dist.model import patches
from svfap_dist.profiling.step import noise_batch
from svfap_dist.train.engine import StepContext
from svfap_dist.train.objective import MaskedReconstruction
from svfap_dist.video.frames import Colors, YuvClips, YuvFrames
from svfap_dist.video.info import Crop

CONTEXT = StepContext(torch.device("cpu"), 0, 3)


def small_objective(dtype: str) -> tuple[MaskedReconstruction, ClipBatch]:
    tables = {
        "data": {"num_frames": 8, "frame_size": 64, "num_lanes": 1},
        "model": {"size": "nano"},
        "train": {"global_batch_size": 3, "micro_batch_size": 3, "dtype": dtype},
    }
    config = recipe.from_tables(tables, where="test")
    torch.manual_seed(0)
    return MaskedReconstruction(config), noise_batch(config, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["rgb", "planes"])
def test_the_loss_is_that_of_whole_clips(kind: str, dtype: str) -> None:
    objective, batch = small_objective(dtype)
    if kind == "planes":
        rng = np.random.default_rng(0)
        shapes = [(8, 70, 81), (8, 35, 41), (8, 35, 41)]
        clips = [
            YuvFrames(*(rng.integers(0, 256, shape, np.uint8) for shape in shapes), Colors())
            for _ in range(3)
        ]
        crops = [Crop(0, 0, 64, 64), Crop(1, 3, 60, 70), Crop(20, 31, 50, 50)]
        batch = dataclasses.replace(batch, frames=YuvClips.stack(clips, crops, 64))
    network = objective.build().to(getattr(torch, dtype))
    part = slice(1, 3)
    frames = batch.frames_on(CONTEXT.device, part)
    visible, masked = batch.visible[part], batch.masked[part]
    target = patches.targets(frames, masked)
    expected = patches.masked_patch_loss(network(frames, visible, masked), target)
    inputs = objective.inputs(batch, part, CONTEXT)
    assert torch.equal(objective.loss(network, *inputs), expected)
    loss, of_clips = objective.losses(network, *inputs)
    assert torch.equal(loss, expected)
    assert loss.requires_grad
    assert not of_clips.requires_grad
    for row, of_clip in enumerate(of_clips):
        one = slice(1 + row, 2 + row)
        alone = objective.loss(network, *objective.inputs(batch, one, CONTEXT))
        torch.testing.assert_close(
            of_clip, alone, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=0
        )
    assert not any(tensor.requires_grad for tensor in inputs)
    assert inputs[0].dtype == getattr(torch, dtype)
