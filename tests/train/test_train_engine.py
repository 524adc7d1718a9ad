"""The engine against ten lines of plain torch, and against itself resumed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from train_ranks import random_batch, recipe_tables, start

from svfap_dist.config import Config, recipe
from svfap_dist.model import autoencoder, patches
from svfap_dist.train import optim
from svfap_dist.train.engine import StepContext
from svfap_dist.train.learning_rate import learning_rate_at
from svfap_dist.train.objective import build_arguments, build_objective

STEPS, CLIP = 8, 0.02
# Accumulation 2; a decay and a clipping that would be missed; a warm-up of two steps.
CHANGES = {
    "optim": {
        "lr": 0.2,
        "warmup_lr": 0.05,
        "warmup_fraction": 0.25,
        "weight_decay": 0.5,
        "clip_grad_norm": CLIP,
    },
    "train": {"micro_batch_size": 2, "zero_stage": 2},
}
TABLES = recipe_tables("unused", "unused", **CHANGES)
BF16 = recipe_tables("unused", "unused", train={**CHANGES["train"], "dtype": "bfloat16"})
TASK = {"kind": "classification", "set": "toy", "label": "class", "names": ["a", "b", "c"]}
TASK |= {"folds": 2, "metrics": ["uar"]}
TUNING = {"layer_decay": 0.6, "drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0}
LAYERS = TABLES | {"task": TASK, "finetune": TUNING | {"head_init_scale": 1.0}}
LAYERS_3 = LAYERS | {"train": TABLES["train"] | {"zero_stage": 3}}
CONFIG = recipe.from_tables(TABLES, where="test")
RATES = [
    learning_rate_at(CONFIG.optim, CONFIG.train.global_batch_size, STEPS, step)
    for step in range(STEPS)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """What the engine saw and its weights at the end, by run."""
    folder = tmp_path_factory.mktemp("engine")
    orders = {
        "float32": {"tables": TABLES},
        "bf16": {"tables": BF16},
        "bf16 cut": {"tables": BF16, "cut_at": 3},
        "layers cut": {"tables": LAYERS, "cut_at": 3},
        "layers 3 cut": {"tables": LAYERS_3, "cut_at": 3},
    }
    tasks = [
        ("engine_steps", {**order, "rates": RATES, "weights": str(folder / f"{name}.pt")})
        for name, order in orders.items()
    ]
    results = start(1, tasks, folder)
    return {
        name: (result[0], torch.load(folder / f"{name}.pt"))
        for name, result in zip(orders, results, strict=True)
    }


def plain_torch(config: Config) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms before clipping, and weights of AdamW without any engine."""
    torch.manual_seed(config.run.seed)
    model = autoencoder.build(**build_arguments(config))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses, norms = [], []
    for step, rate in enumerate(RATES):
        batch = random_batch(config, step)
        halves = []
        for part in (slice(0, 2), slice(2, 4)):
            frames, masked = batch.frames[part], batch.masked[part]
            prediction = model(frames, batch.visible[part], masked)
            value = patches.masked_patch_loss(prediction, patches.targets(frames, masked)) / 2
            value.backward()
            halves.append(value.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(halves))
    return losses, norms, model.state_dict()


def plain_layers(config: Config) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of a fine-tuning without any engine, a rate to each layer."""
    learned = build_objective(config)
    torch.manual_seed(config.run.seed)
    model = learned.build()
    optimizer = optim.adamw(model, config.optim, learned.layer_decay)
    losses = []
    for step, rate in enumerate(RATES):
        batch, context = random_batch(config, step), StepContext(torch.device("cpu"), 0, step)
        value = learned.loss(model, *learned.inputs(batch, slice(None), context))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, model.state_dict()


@pytest.mark.slow
def test_each_layer_learns_at_its_own_rate_in_stages_2_and_3_and_after_a_resume(
    runs: dict[str, Any],
) -> None:
    losses, expected = plain_layers(recipe.from_tables(LAYERS, where="test"))
    for name in ("layers cut", "layers 3 cut"):
        seen, weights = runs[name]
        assert seen["loss"] == pytest.approx(losses, abs=1e-4), name
        for key, value in expected.items():
            assert torch.allclose(weights[key], value, atol=2e-5, rtol=0), (name, key)


def test_the_engine_is_plain_adamw(runs: dict[str, Any]) -> None:
    seen, weights = runs["float32"]
    losses, norms, expected = plain_torch(CONFIG)
    assert seen["loss"] == pytest.approx(losses, abs=1e-5)
    assert seen["grad_norm"] == pytest.approx(norms, abs=1e-5)
    # Clipping bites, and by another factor each time: one factor for all would be lost on Adam.
    assert max(norms) > 1.3 * min(norms) > 2.6 * CLIP
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, atol=1e-5, rtol=0), name


def test_resuming_in_bf16_changes_no_bit(runs: dict[str, Any]) -> None:
    (straight, weights), (cut, weights_cut) = runs["bf16"], runs["bf16 cut"]
    assert cut == straight
    assert weights_cut.keys() == weights.keys()
    assert all(torch.equal(weights_cut[name], weights[name]) for name in weights)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    # And it is a run of the same recipe, as near as bf16 can be.
    assert straight["loss"] == pytest.approx(runs["float32"][0]["loss"], rel=0.02)
    assert all(map(math.isfinite, straight["grad_norm"]))
