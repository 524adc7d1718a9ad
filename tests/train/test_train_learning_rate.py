"""The length of a run and the learning rate of its steps, against the released code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svfap_dist.config import OptimConfig, TrainConfig, recipe
from svfap_dist.train.learning_rate import learning_rate_at


def oracle(optim: OptimConfig, batch: int, total: int) -> np.ndarray:
    """The released code's `cosine_scheduler`, by steps instead of epochs."""
    scale = batch / 256
    warmup = round(total * optim.warmup_fraction)
    rise = np.linspace(optim.warmup_lr * scale, optim.lr * scale, warmup)
    steps = np.arange(total - warmup)
    low, high = optim.min_lr * scale, optim.lr * scale
    fall = low + 0.5 * (high - low) * (1 + np.cos(np.pi * steps / max(1, len(steps))))
    return np.concatenate([rise, fall])


@given(
    total=st.integers(1, 400),
    batch=st.sampled_from([4, 256, 1024]),
    fraction=st.floats(0, 1),
)
def test_rates_are_those_of_the_released_code(total: int, batch: int, fraction: float) -> None:
    optim = OptimConfig(warmup_fraction=fraction)
    rates = [learning_rate_at(optim, batch, total, step) for step in range(total)]
    assert rates == pytest.approx(oracle(optim, batch, total))


def test_paper_recipe() -> None:
    config = recipe.load("svfap_base_voxceleb2")
    steps_per_epoch = 1_091_726 // 256
    total = config.train.total_steps(steps_per_epoch)
    assert total == 100 * steps_per_epoch

    def rate(step: int) -> float:
        return learning_rate_at(config.optim, 256, total, step)

    assert rate(0) == pytest.approx(1e-6)
    assert rate(5 * steps_per_epoch - 2) < rate(5 * steps_per_epoch - 1) == pytest.approx(3e-4)
    assert rate(5 * steps_per_epoch) == pytest.approx(3e-4)
    halfway = 5 * steps_per_epoch + (total - 5 * steps_per_epoch) // 2
    assert rate(halfway) == pytest.approx((3e-4 + 1e-5) / 2, rel=1e-4)
    assert rate(total - 1) == pytest.approx(1e-5, rel=1e-6)


def test_a_run_is_as_long_as_max_steps_or_its_epochs() -> None:
    assert TrainConfig(epochs=3).total_steps(7) == 21
    assert TrainConfig(epochs=3, max_steps=5).total_steps(7) == 5
    assert TrainConfig(epochs=3, max_steps=50).total_steps(7) == 21
