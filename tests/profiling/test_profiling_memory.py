"""Bytes per rank, against what an engine and a loader really hold."""

from __future__ import annotations

import functools

import pytest
import torch

from svfap_dist.config import Config, recipe
from svfap_dist.data.batch import BatchRing
from svfap_dist.data.clips import prefetch_bytes
from svfap_dist.plan.limits import rank_bytes_by_stage
from svfap_dist.profiling import memory
from svfap_dist.profiling.memory import ModelBytes
from svfap_dist.profiling.step import measure_steps, noise_batch
from svfap_dist.train.engine import StepContext, open_engine
from svfap_dist.train.objective import build_objective

_SMALL = (
    "model.size=nano",
    "model.patch_size=16",
    "data.num_frames=8",
    "data.frame_size=32",
    "mask.ratio=0.5",
    "train.threads_per_rank=1",
    "cluster.num_workers=1",
)


def _count(config: Config) -> ModelBytes:
    learned, context = build_objective(config), StepContext(torch.device("cpu"), 0)
    inputs = learned.inputs(noise_batch(config, 1), slice(0, 1), context)
    return memory.count_model(
        learned.build, lambda model: learned.loss(model, *inputs), config.train
    )


def _standing(ranks: int, *overrides: str) -> tuple[float, float]:
    """Bytes of a rank between two steps: predicted, measured."""
    config = recipe.load("tiny_cpu", [*_SMALL, *overrides])
    found = rank_bytes_by_stage(_count(config), ranks, clips=4, prefetch=0, on_gpu=False)
    rank = found[config.train.zero_stage]
    kept = rank.gradients if config.train.zero_stage == 3 and ranks > 1 else 0
    measured = measure_steps(
        config, ranks, ranks, functools.partial(open_engine, build_objective(config))
    ).standing_bytes
    return rank.weights + rank.optimizer + kept, measured


def test_weights_and_optimizer_are_those_of_the_engine() -> None:
    predicted, measured = _standing(1, "train.zero_stage=2")
    assert measured == pytest.approx(predicted, rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "dtype"),
    [
        (1, 0, "float32"),
        (2, 1, "float32"),
        (2, 2, "float32"),
        (2, 3, "float32"),
        (1, 1, "bfloat16"),
        (2, 2, "bfloat16"),
        (2, 3, "bfloat16"),
    ],
)
def test_weights_and_optimizer_at_every_stage(ranks: int, stage: int, dtype: str) -> None:
    predicted, measured = _standing(ranks, f"train.zero_stage={stage}", f"train.dtype={dtype}")
    assert measured == pytest.approx(predicted, rel=0.02)


def test_what_the_backward_pass_keeps() -> None:
    def kept(*overrides: str) -> int:
        return _count(recipe.load("tiny_cpu", [*_SMALL, *overrides])).kept_per_clip

    whole = kept()
    # Half the bytes in bf16, but for the loss, which is float32, and masks and indices.
    assert 0.45 * whole < kept("train.dtype=bfloat16") < 0.8 * whole
    assert kept("train.activation_checkpointing=true") < 0.8 * whole  # of few blocks
    assert kept("data.num_frames=16") > 1.9 * whole


@pytest.mark.parametrize("megabytes", [1, 3, 4096])
def test_prefetched_batches_are_the_ring(megabytes: int) -> None:
    config = recipe.load("tiny_cpu", [*_SMALL, f"data.prefetch_bytes={megabytes << 20}"])
    for ranks in (1, 2):
        with BatchRing(config, config.train.global_batch_size // ranks) as ring:
            clips = config.train.global_batch_size // ranks
            assert prefetch_bytes(config.data, clips) == ring.length * ring.frames(0).nbytes
