from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from svfap_dist.errors import HealthError
from svfap_dist.train.health import Health, StepDecision, StepVote
from svfap_dist.train.update import Update

NAN = float("nan")
SILENT = StepVote()


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def an_update(
    vote: StepVote = SILENT,
    samples: int = 1,
    bad: int = 0,
    loss: float = 1.0,
    norm: float = 2.0,
) -> Update:
    """An update of one rank whose device has taken the step."""
    broken = not abs(loss) < float("inf")
    skipped = broken or not norm < float("inf")
    numbers = [*vote.counts(samples, bad), broken, loss, norm, skipped, broken]
    return Update(torch.tensor(numbers, dtype=torch.float64))


def test_the_decision_is_what_any_step_voted_for_one_step_late() -> None:
    health = Health(max_bad_fraction=0.0)
    health.add(1, lambda: ["a"], an_update(StepVote(stop=True), loss=1.5, norm=0.5))
    assert health.decide(up_to_now=False) == StepDecision()
    assert health.completed == 0
    health.add(2, lambda: ["a"], an_update(StepVote(save=True), loss=2.5, norm=3.0))
    first = health.decide(up_to_now=False)
    assert first == StepDecision(stop=True, loss=1.5, grad_norm=0.5)
    assert health.completed == 1
    both = health.decide(up_to_now=True, before=first)
    assert both == StepDecision(stop=True, save=True, loss=2.5, grad_norm=3.0)
    assert health.decide(up_to_now=True, before=both) == both
    assert health.completed == 2


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_its_step_and_clips(bad: float) -> None:
    health = Health(max_bad_fraction=1.0, completed=6)
    health.add(7, lambda: ["good"], an_update())
    health.add(8, lambda: [f"clip{i}" for i in range(10)], an_update(loss=bad))
    health.add(9, lambda: ["later"], an_update(norm=NAN))
    with pytest.raises(HealthError, match=r"step 8.*clip0.*clip7 and 2 more") as caught:
        health.decide(up_to_now=False)
    assert "good" not in caught.value.found
    assert "later" not in caught.value.found
    assert health.completed == 7


def test_a_gradient_that_is_not_finite_names_its_step() -> None:
    health = Health(max_bad_fraction=1.0)
    health.add(4, lambda: ["clip"], an_update(norm=NAN))
    with pytest.raises(HealthError, match=r"Gradient is not finite.*step 4"):
        health.decide(up_to_now=True)


def count_until_error(fraction: float, bad_of_100: int) -> int:
    """Samples seen, a hundred at a time, until the run is ended; 0 if it is not."""
    health = Health(fraction)
    for step in range(1, 31):
        health.add(step, lambda: ["k"] * 100, an_update(samples=100, bad=bad_of_100))
        try:
            health.decide(up_to_now=True)
        except HealthError:
            return step * 100
    return 0


def test_the_share_of_bad_samples_is_over_at_least_a_thousand() -> None:
    assert count_until_error(0.02, bad_of_100=2) == 0  # at the limit, not over it
    assert count_until_error(0.02, bad_of_100=3) == 700  # 21 bad: more than 2 % of a thousand
    assert count_until_error(0.02, bad_of_100=100) == 100
    assert count_until_error(0.0, bad_of_100=1) == 100
