"""Ranks of a measurement are connected, and fail together."""

from __future__ import annotations

import functools
import os

import pytest

from svfap_dist import distributed
from svfap_dist.config import recipe
from svfap_dist.distributed import World
from svfap_dist.errors import ClusterError, ConfigError
from svfap_dist.profiling.ranks import run_on_local_ranks
from svfap_dist.train.engine import process_group


def _meet(world: World) -> tuple[World, list[int]]:
    config = recipe.load("tiny_cpu", [])
    with process_group(config, world):
        return distributed.world_from_environment(), distributed.all_gather_object(world.rank)


def test_ranks_are_connected() -> None:
    found = run_on_local_ranks(_meet, 2, seconds=120)
    assert found == [(World(rank, rank, 2, 2), [0, 1]) for rank in range(2)]


def _fail(how: str, world: World) -> None:
    if world.rank == 1:
        if how == "raise":
            raise ConfigError("No such thing")
        os._exit(3)
    _meet(world)  # would wait for the other one


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [("raise", ConfigError, "No such thing"), ("exit", ClusterError, "code 3")],
)
def test_one_failure_ends_all(how: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_on_local_ranks(functools.partial(_fail, how), 2, seconds=120)
