from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from svfap_dist.errors import HealthError
from svfap_dist.train.health import Health, StepVote

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_verdict_is_what_was_brought() -> None:
    votes = Health(CPU, max_bad_fraction=0.0)
    verdict = votes.agree(1, ["a"], 0, torch.tensor(1.5), StepVote(stop=True, check_nodes=True))
    assert (verdict.loss, verdict.stop, verdict.finish_upload, verdict.check_nodes) == (
        1.5,
        True,
        False,
        True,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_its_step_and_clips(bad: float) -> None:
    votes = Health(CPU, max_bad_fraction=1.0)
    votes.agree(7, ["good"], 0, torch.tensor(1.0), StepVote())
    keys = [f"clip{i}" for i in range(10)]
    with pytest.raises(HealthError, match=r"step 8.*clip0.*clip7 and 2 more") as caught:
        votes.agree(8, keys, 0, torch.tensor(bad), StepVote())
    assert "good" not in caught.value.found


def count_until_error(fraction: float, bad_of_100: int) -> int:
    """Samples seen, a hundred at a time, until the run is ended; 0 if it is not."""
    votes = Health(CPU, fraction)
    for step in range(1, 31):
        loss = torch.tensor(1.0)
        try:
            votes.agree(step, ["k"] * 100, bad_of_100, loss, StepVote())
        except HealthError:
            return step * 100
    return 0


def test_the_share_of_bad_samples_is_over_at_least_a_thousand() -> None:
    assert count_until_error(0.02, bad_of_100=2) == 0  # at the limit, not over it
    assert count_until_error(0.02, bad_of_100=3) == 700  # 21 bad: more than 2 % of a thousand
    assert count_until_error(0.02, bad_of_100=100) == 100
    assert count_until_error(0.0, bad_of_100=1) == 100
