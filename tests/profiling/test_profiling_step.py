"""Steps that are timed on this machine."""

from __future__ import annotations

import functools

import pytest
import torch
from clips import make_video

from data_sharding import pipeline as sharding
from svfap_dist.config import recipe
from svfap_dist.profiling.step import StepCost, measure_steps, noise_batch
from svfap_dist.train.engine import open_engine
from svfap_dist.train.objective import build_objective

_SMALL = (
    "model.size=nano",
    "model.patch_size=16",
    "data.num_frames=8",
    "data.frame_size=32",
    "mask.ratio=0.5",
    "train.threads_per_rank=1",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "data.num_lanes=1",
    "cluster.num_workers=1",
)


def test_noise_has_the_shapes_of_the_recipe() -> None:
    batch = noise_batch(recipe.load("tiny_cpu", _SMALL), 3)
    assert batch.frames.shape == (3, 8, 32, 32, 3)
    assert isinstance(batch.frames, torch.Tensor)
    assert batch.frames.dtype == torch.uint8
    assert batch.visible.shape == batch.masked.shape == (3, 8)
    assert len(batch.keys) == len(set(batch.keys)) == 3


def test_the_seconds_of_a_step_are_those_of_its_parts() -> None:
    cost = StepCost(4, 0.5, 0.25, 1.0, None, 0, 1)
    assert cost.step_seconds(3) == pytest.approx(1.75)


@pytest.mark.slow
def test_steps_are_timed_beside_a_loader_with_decode_workers(tmp_path) -> None:
    """Ranks of a measurement may start processes, which daemonic ones may not."""
    for number in range(2):
        make_video(tmp_path / f"in/{number}.mp4", 61, size=(48, 48), seed=number)
    sharding.shard("folder", str(tmp_path / "in"), str(tmp_path / "shards"), workers=0)
    urls = [f"data.url={tmp_path}/shards", "data.decode_workers=1", "data.region=full"]
    config = recipe.load("tiny_cpu", [*_SMALL, *urls, "data.sampling_rate=2"])
    engine = functools.partial(open_engine, build_objective(config))
    cost = measure_steps(config, 1, 1, engine)
    assert cost.slowdown is not None
    assert cost.slowdown > 0
    assert cost.clips == 2
