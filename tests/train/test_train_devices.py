"""Types of weights, options and resuming on each kind of device, against plain torch on a CPU.

Stages in float32 are in test_train_update.py, changes of stage in test_train_elastic.py.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from test_train_update import RATES, plain_torch, tables
from train_ranks import start

BF16 = {"dtype": "bfloat16"}
CASES: dict[str, dict[str, Any]] = {
    **{f"stage {stage} in bfloat16": {"zero_stage": stage} | BF16 for stage in (1, 2, 3)},
    "activation checkpointing": {"activation_checkpointing": True},
    "resumed": {"zero_stage": 1},
    "resumed at stage 3": {"zero_stage": 3},
    "compiled": {"compile": True},
    "compiled in bfloat16": {"compile": True} | BF16,
    "compiled at stage 3": {"compile": True, "zero_stage": 3},
}
# A CPU compiles for a minute: test_train_regions.py compiles without generating code.
ON_CPU = [name for name in CASES if "compiled" not in name]
# Of losses, absolute, and of gradient norms before clipping, relative. A GPU adds in another order.
TOLERANCES = {"cpu": (1e-5, 1e-4), "cuda": (1e-4, 1e-3), "bfloat16": (0.02, 0.05)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


@functools.cache
def seen_on(device: str, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Losses and gradient norms by case; one process runs all, since its start takes longest."""
    names = ON_CPU if device == "cpu" else list(CASES)
    tasks = [
        (
            "engine_steps",
            {
                "tables": tables(device, micro_batch_size=2, **CASES[name]),
                "rates": RATES,
                "weights": str(folder / "weights.pt"),
                "cut_at": 1 if "resumed" in name else 0,
            },
        )
        for name in names
    ]
    return dict(zip(names, (of_ranks[0] for of_ranks in start(1, tasks, folder)), strict=True))


@functools.cache
def expected() -> tuple[list[float], list[float]]:
    losses, norms, _ = plain_torch()
    return losses, norms


@pytest.mark.parametrize(
    ("device", "name"),
    [
        *(("cpu", name) for name in ON_CPU),
        *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in CASES),
    ],
)
def test_steps_are_those_of_plain_torch(device: str, name: str, folder: Path) -> None:
    seen, (losses, norms) = seen_on(device, folder)[name], expected()
    of_loss, of_norm = TOLERANCES[CASES[name].get("dtype", device)]
    assert seen["loss"] == pytest.approx(losses, abs=of_loss)
    assert seen["grad_norm"] == pytest.approx(norms, rel=of_norm)
