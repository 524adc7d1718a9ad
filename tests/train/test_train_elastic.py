"""Any ZeRO stage on any number of ranks resumes what any other saved.

After a load, every master weight and moment must be equal to what DeepSpeed's own functions read
from the engine that saved, every tensor of the optimizer be float32 on the device, and the next
three losses be those of the engine that was not interrupted. `-s` prints the table.
"""

from __future__ import annotations

from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from train_ranks import Task, recipe_tables, start

from svfap_dist.checkpoint import parameter_states, reshard

FLOAT32, BFLOAT16 = "float32", "bfloat16"
RANKS = (1, 2, 4)
SECONDS = 1800


class Place(NamedTuple):
    """A ZeRO stage on a number of ranks."""

    stage: int
    ranks: int
    dtype: str = FLOAT32
    device: str = "cpu"

    def task(self, name: str, source: Place, folder: Path) -> Task:
        """What this place does with the source's checkpoint."""
        micro = min(2, 4 // self.ranks)
        train = {"zero_stage": self.stage, "dtype": self.dtype, "micro_batch_size": micro}
        cluster = {"use_gpu": self.device == "cuda"}
        tables = recipe_tables("unused", "unused", train=train) | {"cluster": cluster}
        return name, {"tables": tables, "folder": str(folder), "tag": str(source)}

    def __str__(self) -> str:
        return f"{self.dtype}-stage-{self.stage}-on-{self.ranks}-{self.device}"


def tolerance(source: Place, target: Place) -> float:
    """In bfloat16, stages and numbers of ranks round gradients at other places, and stage 3 has a
    linear layer of its own, so that runs without any checkpoint differ, too. A GPU may add in
    another order each time."""
    if target.device == "cuda":
        return 1e-4 if target.dtype == FLOAT32 else 2e-3
    return 1e-5 if target.dtype == FLOAT32 or source == target else 2e-3


def exchange(pairs: list[tuple[Place, Place]], folder: Path) -> dict[Any, Any]:
    """What each source's task returned, and each pair's (source, target); a launch for each run of
    equal numbers of ranks, for stage 3 numbers modules and wants the same numbers on all ranks."""
    sources = list(dict.fromkeys(source for source, _ in pairs))
    orders = [(s.ranks, s, s.task("steps_around_save", s, folder)) for s in sources]
    orders.sort(key=lambda order: -order[0])
    loads = [(t.ranks, (s, t), t.task("steps_after_load", s, folder)) for s, t in pairs]
    orders += sorted(loads, key=lambda order: order[0])
    found: dict[Any, Any] = {}
    for ranks, group in groupby(orders, key=lambda order: order[0]):
        keys, tasks = zip(*((key, task) for _, key, task in group), strict=True)
        results = start(ranks, list(tasks), folder, seconds=SECONDS)
        found |= {key: of_ranks[0] for key, of_ranks in zip(keys, results, strict=True)}
    return found


def check(pairs: list[tuple[Place, Place]], folder: Path) -> None:
    found, worst = exchange(pairs, folder), {}
    print("\nlargest difference of the next three losses, number of wrong tensors")
    for pair in pairs:
        losses = zip(found[pair[0]], found[pair]["losses"], strict=True)
        worst[pair] = max(abs(straight - resumed) for straight, resumed in losses)
        print(f"{pair[0]} -> {pair[1]}: {worst[pair]:.1e}, {len(found[pair]['wrong'])}")
    for pair in pairs:
        assert found[pair]["wrong"] == [], pair
        assert worst[pair] < tolerance(*pair), pair


def check_universal_form(shards: Path) -> None:
    """What DeepSpeed's converter makes of the shards of all ranks is what we read from them."""
    names = list(torch.load(f"{shards}.expected.pt"))
    ours = parameter_states.read_shards(str(shards), names)
    theirs = parameter_states.read_universal(reshard._convert_to_universal(str(shards)), names)
    for name in names:
        assert ours[name].step == theirs[name].step == 3
        for key in parameter_states.KEYS:
            (whole,) = theirs[name].pieces[key]
            assert torch.equal(torch.cat(ours[name].pieces[key]), whole), (name, key)


def test_stages_and_ranks_resume_each_other(tmp_path: Path) -> None:
    """From one rank to two: test_train_runs.py."""
    one, two = ([Place(stage, ranks) for stage in range(4)] for ranks in (1, 2))
    pairs = [(a, b) for a, b in product(one, one) if (a.stage - b.stage) % 2]
    pairs += [(two[stage], one[(stage + 2) % 4]) for stage in range(4)]
    pairs += [(Place(2, 2, BFLOAT16), Place(1, 1, BFLOAT16))]
    pairs += [(Place(3, 1, BFLOAT16), Place(3, 1, BFLOAT16))]
    check(pairs, tmp_path)
    for place in two[1:]:
        check_universal_form(tmp_path / str(place))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_every_stage_resumes_every_other_on_a_gpu(dtype: str, tmp_path: Path) -> None:
    stages = range(4) if dtype == FLOAT32 else range(1, 4)
    places = [Place(stage, 1, dtype, "cuda") for stage in stages]
    check(list(product(places, places)), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_every_stage_on_1_2_and_4_ranks_resumes_every_other(tmp_path: Path) -> None:
    places = [Place(stage, ranks) for stage, ranks in product(range(4), RANKS)]
    check(list(product(places, places)), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_bfloat16_on_1_2_and_4_ranks_resumes_every_other_stage(tmp_path: Path) -> None:
    """A third of all pairs: whichever place is taken as source or target, it meets every stage and
    every number of ranks on the other side, and every two stages meet."""
    places = [Place(stage, ranks, BFLOAT16) for stage, ranks in product(range(1, 4), RANKS)]

    def number(place: Place) -> int:
        return place.stage + RANKS.index(place.ranks)

    pairs = [(a, b) for a, b in product(places, places) if (number(a) + number(b)) % 3 == 0]
    for side in (0, 1):
        for place in places:
            others = [pair[1 - side] for pair in pairs if pair[side] == place]
            assert {other.stage for other in others} == {1, 2, 3}
            assert {other.ranks for other in others} == set(RANKS)
    assert {(a.stage, b.stage) for a, b in pairs} == set(product(range(1, 4), range(1, 4)))
    check(pairs, tmp_path)
