"""Updates at all stages against plain torch, on one rank and two; skipped ones; buckets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_ranks import random_batch, recipe_tables, start

from svfap_dist.config import recipe
from svfap_dist.train import gradients, optim
from svfap_dist.train.engine import StepContext
from svfap_dist.train.gradients import FlatGroup, GradientReducer
from svfap_dist.train.objective import build_objective

RATES = [0.01, 0.02, 0.05, 0.03]
CPU = torch.device("cpu")
BAD_STEP = 2


def tables(device: str = "cpu", **train: Any) -> dict[str, Any]:
    optimizer = {"lr": 0.2, "weight_decay": 0.5, "clip_grad_norm": 0.02}
    cluster = {"use_gpu": device == "cuda"}
    return recipe_tables("-", "-", optim=optimizer, train=train) | {"cluster": cluster}


def plain_torch() -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms before clipping, and weights of AdamW without any engine."""
    config = recipe.from_tables(tables(), where="test")
    objective = build_objective(config)
    torch.manual_seed(config.run.seed)
    model = objective.build()
    optimizer = optim.adamw(model, config.optim)
    losses, norms = [], []
    for step, rate in enumerate(RATES):
        batch = random_batch(config, step)
        value = objective.loss(
            model, *objective.inputs(batch, slice(None), StepContext(CPU, 0, step))
        )
        value.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, norms, model.state_dict()


def all_updates(ranks: int, device: str, folder: Path) -> dict[tuple[int, int], list[Any]]:
    """What each rank saw, by stage and micro batches of a step."""
    cases = [(stage, accumulation) for stage in (0, 1, 2) for accumulation in (1, 2)]
    cases += [(3, 4 // ranks)]
    tasks = [
        (
            "updates",
            {
                "tables": tables(
                    device, zero_stage=stage, micro_batch_size=4 // ranks // accumulation
                ),
                "rates": RATES,
                "weights": str(folder / f"{stage}-{accumulation}.pt"),
            },
        )
        for stage, accumulation in cases
    ]
    return dict(zip(cases, start(ranks, tasks, folder), strict=True))


ON_A_GPU = pytest.param(1, "cuda", marks=pytest.mark.gpu)
# Of losses, of gradient norms, of weights in the mean: a GPU adds in another order.
TOLERANCES = {"cpu": (1e-5, 1e-4, 1e-5), "cuda": (1e-4, 1e-3, 1e-4)}


@pytest.mark.parametrize(
    ("ranks", "device"),
    [(1, "cpu"), pytest.param(2, "cpu", marks=pytest.mark.slow), ON_A_GPU],
)
def test_every_stage_is_plain_adamw_without_a_wait(ranks: int, device: str, tmp_path: Path) -> None:
    of_loss, of_norm, of_weights = TOLERANCES[device]
    losses, norms, expected = plain_torch()
    for case, of_ranks in all_updates(ranks, device, tmp_path).items():
        results = of_ranks[0]["results"]
        assert [r["loss"] for r in results] == pytest.approx(losses, abs=of_loss), case
        assert [r["grad_norm"] for r in results] == pytest.approx(norms, rel=of_norm), case
        assert all(r["applied"] and r["losses_are_finite"] for r in results), case
        assert {tuple(r["counts"]) for r in results} == {(ranks, sum(range(ranks)))}, case
        found = torch.load(tmp_path / f"{case[0]}-{case[1]}.pt", map_location=CPU)
        for name, value in expected.items():
            # The mean: of a gradient near 0, such as that of a key's weight, AdamW keeps the sign.
            assert (found[name] - value).abs().mean() < of_weights, (case, name)
        if case[0] < 3:
            assert of_ranks[0]["waits"] == [0] * len(RATES), case


@pytest.mark.parametrize(
    ("ranks", "device"),
    [*(pytest.param(ranks, "cpu", marks=pytest.mark.slow) for ranks in (1, 2)), ON_A_GPU],
)
def test_a_gradient_that_is_not_finite_changes_nothing_in_its_step(
    ranks: int, device: str, tmp_path: Path
) -> None:
    stages = (0, 1, 2, 3)
    tasks = [
        (
            "updates",
            {
                "tables": tables(device, zero_stage=stage, micro_batch_size=4 // ranks),
                "rates": RATES,
                "weights": str(tmp_path / f"{stage}.pt"),
                "bad_step": BAD_STEP,
            },
        )
        for stage in stages
    ]
    for stage, of_ranks in zip(stages, start(ranks, tasks, tmp_path), strict=True):
        for seen in of_ranks:
            applied = [result["applied"] for result in seen["results"]]
            assert applied == [True, True, False, True], stage
            assert all(result["losses_are_finite"] for result in seen["results"])
            states = seen["optimizer"]
            assert states[0] != states[1]
            assert states[1] == states[2] != states[3], stage
            assert all(math.isfinite(number) for number in states[3]), stage


@pytest.mark.parametrize(("order", "during"), [((0, 1, 2), [0, 1]), ((2, 1, 0), []), ((0, 1), [0])])
def test_buckets_start_in_one_order_as_soon_as_they_are_complete(
    monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], during: list[int]
) -> None:
    monkeypatch.setattr(gradients, "REDUCE_BUCKET", 4)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    reducer = GradientReducer([FlatGroup(parameters, 1, 6)], every_micro_batch=True)

    def backward(order: tuple[int, ...]) -> None:
        for index in order:
            ((index + 1) * parameters[index].sum()).backward()

    reducer.begin(is_first=True, is_last=True)
    backward((0, 1, 2))  # the order to expect: two buckets, of the first two and of the third
    reducer.finish()
    assert reducer.take()[0][0].tolist() == [1, 2, 2, 3, 3]
    started: list[int] = []
    start_one = reducer._start

    def noted(number: int) -> None:
        started.append(number)
        start_one(number)

    monkeypatch.setattr(reducer, "_start", noted)
    reducer.begin(is_first=True, is_last=True)
    backward(order)
    assert started == during
    reducer.finish()
    assert started == [0, 1]
    (kept,), squares = reducer.take()
    assert kept.tolist() == [i + 1 if i in order else 0 for i in (0, 1, 1, 2, 2)]
    assert squares.item() == pytest.approx(kept.square().sum().item())
    assert all(parameter.grad is None for parameter in parameters)


def test_a_sum_of_micro_batches_does_not_share_memory_with_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With CUDA graphs, the next micro batch's gradients are written to the same memory."""
    monkeypatch.setattr(gradients, "REDUCE_BUCKET", 4)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    reducer = GradientReducer([FlatGroup(parameters, 0, 6)], every_micro_batch=False)
    memory = [torch.empty(2) for _ in parameters]
    for micro_batch in range(3):
        reducer.begin(is_first=micro_batch == 0, is_last=micro_batch == 2)
        for number, (parameter, gradient) in enumerate(zip(parameters, memory, strict=True)):
            parameter.grad = gradient.fill_(10**micro_batch + number)
        reducer.finish()
    assert reducer.take()[0][0].tolist() == [111, 111, 114, 114, 117, 117]
