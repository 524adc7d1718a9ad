from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from svfap_dist.config import HealthConfig, recipe
from svfap_dist.errors import ClusterError, HealthError
from svfap_dist.train import health as health_module
from svfap_dist.train.health import Health, NotFiniteError, RollbackError, StepDecision, StepVote
from svfap_dist.train.spikes import Spike, SpikeDetector, robust_zscore
from svfap_dist.train.update import Update

NAN = float("nan")
SILENT = StepVote()
STRICT = HealthConfig(max_skipped=0, max_rollbacks=0)


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
    health = Health(STRICT, max_bad_fraction=0.0)
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
    health = Health(STRICT, max_bad_fraction=1.0, completed=6)
    health.add(7, lambda: ["good"], an_update())
    health.add(8, lambda: [f"clip{i}" for i in range(10)], an_update(loss=bad))
    health.add(9, lambda: ["later"], an_update(norm=NAN))
    with pytest.raises(HealthError, match=r"step 8.*clip0.*clip7 and 2 more") as caught:
        health.decide(up_to_now=False)
    assert "good" not in caught.value.found
    assert "later" not in caught.value.found
    assert health.completed == 7


def test_a_gradient_that_is_not_finite_names_its_step() -> None:
    health = Health(STRICT, max_bad_fraction=1.0)
    health.add(4, lambda: ["clip"], an_update(norm=NAN))
    with pytest.raises(HealthError, match=r"Gradient is not finite.*step 4"):
        health.decide(up_to_now=True)


def count_until_error(fraction: float, bad_of_100: int) -> int:
    """Samples seen, a hundred at a time, until the run is ended; 0 if it is not."""
    health = Health(STRICT, fraction)
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


def decide(health: Health, *updates: Update) -> None:
    for step, update in enumerate(updates, start=1):
        health.add(step, lambda step=step: [f"clip{step}"], update)
        health.decide(up_to_now=True)


def test_skipped_updates_are_counted_in_a_row() -> None:
    health = Health(HealthConfig(max_skipped=2), max_bad_fraction=1.0)
    bad, good = an_update(loss=NAN), an_update()
    decide(health, bad, bad, good, bad, bad, good)
    assert health.completed == 6
    assert [event.step for event in health.take_events()] == [1, 2, 4, 5]
    assert health.take_events() == []
    with pytest.raises(RollbackError) as caught:
        decide(health, good, bad, bad, an_update(norm=NAN))
    assert (caught.value.step, caught.value.passed_over) == (4, (2, 3, 4))
    assert health.completed == 3
    found = caught.value.cause.found
    assert [f"step {step}: " in found for step in (1, 2, 3, 4)] == [False, True, True, True]
    assert "step 4: the gradient, with finite losses, among the clips clip4" in found


def test_an_update_left_out_shows_until_one_is_taken() -> None:
    health = Health(HealthConfig(), max_bad_fraction=1.0)
    decide(health, an_update(loss=NAN))
    assert [skip.keys for skip in health.skipped] == [("clip1",)]
    decide(health, an_update())
    assert not health.skipped


def test_rollbacks_without_progress_end_the_run() -> None:
    config = HealthConfig(max_skipped=0, max_rollbacks=2)
    with pytest.raises(RollbackError):
        decide(Health(config, 1.0, rollbacks=1), an_update(loss=NAN))
    with pytest.raises(NotFiniteError, match="clip1"):
        decide(Health(config, 1.0, rollbacks=2), an_update(loss=NAN))


def test_the_zscore_is_robust() -> None:
    assert robust_zscore(3.0, [1.0, 1.0, 1.0]) == pytest.approx(2000)  # at least 0.1 % of it
    before = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 50.0]
    assert robust_zscore(1.0, before) == 0
    assert robust_zscore(2.0, before) == pytest.approx(1 / (1.4826 * 0.05), rel=1e-6)
    assert robust_zscore(0.5, before) < 0
    assert robust_zscore(1.0, [0.0, 0.0]) == 0


def test_a_spike_is_reported_when_it_begins() -> None:
    losses = [1.0, 1.2, 0.8, 1.1, 0.9, 9.0, 9.0, 1.0, 9.0]
    detector = SpikeDetector(10.0, 8)
    found = [detector.add(step, loss) for step, loss in enumerate(losses)]
    assert [spike.step for spike in found if spike] == [5, 8]
    # The first four of a window of eight are not judged, and a limit of 0 judges none.
    early = SpikeDetector(10.0, 8)
    assert [early.add(step, loss) for step, loss in enumerate([1.0, 1.0, 1.0, 9.0])] == [None] * 4
    off = SpikeDetector(0.0, 8)
    assert not any(off.add(step, loss) for step, loss in enumerate(losses))


def test_a_spike_rolls_back_if_the_recipe_says_so() -> None:
    updates = [an_update(loss=loss) for loss in (1.0, 1.2, 0.8, 1.1, 0.9, 9.0)]
    warned = Health(HealthConfig(spike_zscore=10.0, spike_window=8), 1.0)
    decide(warned, *updates)
    (spike,) = warned.take_events()
    assert isinstance(spike, Spike)
    config = HealthConfig(spike_zscore=10.0, spike_window=8, spike_action="roll back")
    with pytest.raises(RollbackError, match="Loss spikes at step 6") as caught:
        decide(Health(config, 1.0), *updates)
    assert caught.value.passed_over == (6,)
    with pytest.raises(HealthError, match="Loss spikes"):
        decide(Health(config, 1.0, rollbacks=2), *updates)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors ..."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert health_module.is_out_of_memory(error) is expected


def test_the_advice_for_memory_is_of_the_place_that_has_none() -> None:
    train = recipe.load("tiny_cpu").train
    device = health_module.out_of_memory(train, 0, 1, torch.OutOfMemoryError("CUDA out"))
    host = health_module.out_of_memory(train, 0, 1, MemoryError())
    assert device.what == "Device is out of memory"
    assert host.what == "Host is out of memory"
    assert host.found == "MemoryError"
    assert "decode_workers" in host.do
    assert "decode_workers" not in device.do


def test_failures_that_may_come_again_are_not_recognized() -> None:
    assert health_module.failure_of(ValueError("planted\nmore")) == "ValueError: planted"
    for error in (
        dist.DistBackendError("NCCL error: remote process exited"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        ClusterError("Group initialization failed (rendezvous)"),
    ):
        assert health_module.failure_of(error) == ""


def test_losses_by_source_are_summed_over_the_steps_that_were_applied() -> None:
    health = Health(HealthConfig(), max_bad_fraction=0.0)
    votes = [*SILENT.counts(4, 0)]
    sums = [[6.0, 3.0, 2.0, 1.0], [4.0, 4.0, 0.0, 0.0], [NAN, 3.0, NAN, 1.0]]
    for step, of_step in enumerate(sums, start=1):
        broken = step == 3
        numbers = [*votes, *of_step, broken, 1.0, 2.0, broken, broken]
        update = Update(torch.tensor(numbers, dtype=torch.float64), num_sources=2)
        health.add(step, lambda: ["a"], update)
    health.decide(up_to_now=True)
    assert health.take_by_source() == [(10.0, 7.0), (2.0, 1.0)]
    assert health.take_by_source() == []
