"""The objective of fine-tuning, with networks whose outputs the tests choose."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from train_ranks import random_batch, recipe_tables

from svfap_dist.config import AugmentConfig, Config, recipe
from svfap_dist.data.device_augment import augment_batch
from svfap_dist.errors import ConfigError
from svfap_dist.model import flops
from svfap_dist.model.patches import normalize
from svfap_dist.rng import Stream, digest
from svfap_dist.train import mixing
from svfap_dist.train.engine import StepContext
from svfap_dist.train.labeled import Labeled, balanced_weights
from svfap_dist.train.objective import build_objective

TASK = {"set": "toy", "folds": 2, "names": ["a", "b", "c"]}
CLASSES = {**TASK, "kind": "classification", "label": "class", "metrics": ["uar"]}
VALUES = {**TASK, "kind": "regression", "label": "values", "metrics": ["ccc"]}
CALM = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
CPU = torch.device("cpu")
ALL = slice(None)
OUTPUTS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [1.0, 3.0, 0.0], [0.0, 0.0, 4.0]])


def a_recipe(task: dict[str, Any], **finetune: Any) -> Config:
    tables = recipe_tables("unused", "unused") | {"task": task, "finetune": finetune}
    return recipe.from_tables(tables, where="test")


def says(outputs: torch.Tensor, heard: list[torch.Tensor] | None = None) -> Any:
    """A network with these outputs; what it is shown goes to `heard`."""

    def network(clips: torch.Tensor) -> torch.Tensor:
        if heard is not None:
            heard.append(clips)
        return outputs

    return network


def loss_of(
    learned: Any, network: Any, batch: Any, *, rank: int = 0, step: int | None, part: slice = ALL
) -> torch.Tensor:
    return learned.loss(network, *learned.inputs(batch, part, StepContext(CPU, rank, step)))


def test_classes_are_told_by_the_cross_entropy_with_their_own_clips() -> None:
    config = a_recipe(CLASSES, **CALM)
    batch = random_batch(config, 0)
    found = loss_of(Labeled(config), says(OUTPUTS), batch, step=3)
    assert batch.targets is not None
    expected = -OUTPUTS.log_softmax(1)[range(4), batch.targets].mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("task", [CLASSES, VALUES])
@pytest.mark.parametrize("step", [3, None])
def test_the_loss_of_each_clip_is_that_of_the_clip_alone(task: Any, step: int | None) -> None:
    learned = Labeled(a_recipe(task))
    inputs = learned.inputs(random_batch(a_recipe(task), 0), ALL, StepContext(CPU, 0, step))
    loss, of_clips = learned.losses(says(OUTPUTS), *inputs)
    assert torch.equal(loss, learned.loss(says(OUTPUTS), *inputs))
    alone = [
        learned.loss(says(OUTPUTS[n : n + 1]), *(tensor[n : n + 1] for tensor in inputs))
        for n in range(4)
    ]
    torch.testing.assert_close(of_clips, torch.stack(alone))


def test_smoothing_and_mixing_are_for_training_and_drawn_by_step_rank_and_part() -> None:
    config = a_recipe(CLASSES, label_smoothing=0.3)
    batch, learned = random_batch(config, 0), Labeled(config)
    assert batch.targets is not None
    plain = torch.nn.functional.cross_entropy(OUTPUTS, batch.targets)
    torch.testing.assert_close(loss_of(learned, says(OUTPUTS), batch, step=None), plain)
    heard: list[torch.Tensor] = []
    loss = loss_of(learned, says(OUTPUTS, heard), batch, rank=1, step=5)
    chance = Stream(config.run.seed, "fine-tuning", 5, 1, None)
    chance.integer(1 << 62)
    towards = mixing.soft_targets(batch.targets, 3, 0.3)
    clips, towards = mixing.mix(batch.frames, towards, chance, config.finetune)
    assert heard[0].shape == (4, 3, 8, 32, 32)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(OUTPUTS, towards))
    assert not torch.equal(clips, batch.frames)

    def value(rank: int, step: int, part: slice) -> float:
        network = says(OUTPUTS[part])
        return loss_of(learned, network, batch, rank=rank, step=step, part=part).item()

    first, second = slice(0, 2), slice(2, 4)
    assert value(1, 5, first) == value(1, 5, first)
    draws = {value(rank, step, first) for rank in (0, 1) for step in (5, 6)}
    assert len(draws) == 4
    batch.targets[2:] = batch.targets[:2]
    batch.frames[2:] = batch.frames[:2]
    same = says(OUTPUTS[first])
    of_parts = [loss_of(learned, same, batch, step=5, part=p).item() for p in (first, second)]
    assert of_parts[0] != of_parts[1]


def on_device(task: dict[str, Any], **finetune: Any) -> tuple[Config, Any]:
    """A recipe whose device augments, and a batch of it."""
    config = a_recipe(task, **finetune)
    config = config.model_copy(update={"augment": AugmentConfig(run_on="device")})
    batch = random_batch(config, 0)
    words = np.stack([digest("clip", row) for row in range(4)]).view(np.int64)
    return config, dataclasses.replace(batch, digests=torch.from_numpy(words))


@pytest.mark.parametrize("task", [CLASSES, VALUES])
def test_the_device_augments_clips_by_their_own_streams(task: dict[str, Any]) -> None:
    """In training only; neither step, rank nor the rest of the batch matter."""
    config, batch = on_device(task, **CALM)
    learned = Labeled(config)
    streams = [Stream("clip", row) for row in range(4)]
    expected = augment_batch(batch.frames, streams, config.augment)
    heard: list[torch.Tensor] = []
    loss_of(learned, says(OUTPUTS[:, :3], heard), batch, step=5)
    torch.testing.assert_close(heard.pop(), normalized(task, expected), rtol=0, atol=0)
    assert (expected != batch.frames).flatten(1).any(1).all()
    for row in range(4):
        part = slice(row, row + 1)
        loss_of(learned, says(OUTPUTS[part]), batch, rank=1, step=7, part=part)
        loss_of(learned, says(OUTPUTS[part], heard), batch, rank=1, step=7, part=part)
        assert torch.equal(heard.pop(), normalized(task, expected[part]))
    loss_of(learned, says(OUTPUTS, heard), batch, step=None)
    assert torch.equal(heard.pop(), batch.frames)


def normalized(task: dict[str, Any], frames: torch.Tensor) -> torch.Tensor:
    """What a network is shown of frames while it trains."""
    return normalize(frames) if task is CLASSES else frames


def test_clips_that_the_device_augments_are_mixed_by_their_own_streams_too() -> None:
    config, batch = on_device(CLASSES, label_smoothing=0.3)
    assert batch.targets is not None
    heard: list[torch.Tensor] = []
    loss = loss_of(Labeled(config), says(OUTPUTS, heard), batch, step=5)
    streams = [Stream("clip", row) for row in range(4)]
    frames = augment_batch(batch.frames, streams, config.augment)
    towards = mixing.soft_targets(batch.targets, 3, 0.3)
    clips, towards = mixing.mix_each(normalize(frames), towards, streams, config.finetune)
    assert torch.equal(heard[0], clips)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(OUTPUTS, towards))


def test_drop_path_falls_the_same_again_in_the_same_step() -> None:
    learned = Labeled(a_recipe(CLASSES, **CALM, drop_path=0.5, head_init_scale=1.0))
    torch.manual_seed(0)
    model = learned.build()
    batch = random_batch(a_recipe(CLASSES), 0)

    def value(step: int | None, rank: int = 0) -> float:
        return loss_of(learned, model, batch, rank=rank, step=step).item()

    learned.train_mode(model)
    assert value(1) == value(1)
    assert len({value(1), value(2), value(1, rank=1)}) == 3
    model.eval()
    assert value(1) == value(2) == pytest.approx(value(None), abs=1e-5)


def test_a_linear_probe_trains_its_head_before_a_still_encoder() -> None:
    config = a_recipe(CLASSES, mode="linear", drop_path=0.5, layer_decay=0.5)
    learned = Labeled(config)
    model = learned.build()
    learned.train_mode(model)
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head", "fc_norm"}
    assert not any(part.training for part in model.get_submodule("encoder").modules())
    assert model.training
    assert learned.layer_decay == 1
    whole = Labeled(a_recipe(CLASSES, layer_decay=0.5))
    assert whole.layer_decay == 0.5
    forward = flops.classifier(whole._size, 3)
    assert learned.flops_per_clip == sum(forward.values())
    assert whole.flops_per_clip == flops.training_step(forward) > 2.5 * learned.flops_per_clip


def test_rare_classes_count_more_in_the_loss() -> None:
    config = a_recipe(CLASSES, **CALM, class_weights="balanced")
    classes = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2])
    batch = random_batch(config, 0)
    assert batch.targets is not None
    found = loss_of(Labeled(config, classes), says(OUTPUTS), batch, step=3)
    share = torch.tensor([9 / (3 * 6), 9 / (3 * 2), 9 / (3 * 1)])
    each = -OUTPUTS.log_softmax(1)[range(4), batch.targets]
    torch.testing.assert_close(found, (share[batch.targets] * each).mean())
    weights = balanced_weights(np.array([0, 0, 2]), 4)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.0, 1.5, 0.0]))
    plain = loss_of(Labeled(config), says(OUTPUTS), batch, step=3)
    torch.testing.assert_close(plain, each.mean())


@pytest.mark.parametrize("key", ["class_weights", "sampling"])
def test_a_regression_has_no_classes_to_balance(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"finetune.{key}.*a regression has no classes"):
        a_recipe(VALUES, **{key: "balanced"})


def test_classes_are_not_balanced_twice() -> None:
    with pytest.raises(ConfigError, match=r"finetune.sampling.*a second time"):
        a_recipe(CLASSES, class_weights="balanced", sampling="balanced")


@pytest.mark.parametrize(
    ("output", "squash"), [("none", lambda x: x), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh)]
)
def test_values_are_squashed_alike_in_the_loss_and_in_the_scores(output: str, squash: Any) -> None:
    config = a_recipe(VALUES, output=output)
    learned, batch = build_objective(config), random_batch(config, 0)
    assert isinstance(learned, Labeled)
    assert batch.targets is not None
    expected = (squash(OUTPUTS) - batch.targets).square().mean()
    for step in (None, 2):
        found = loss_of(learned, says(OUTPUTS), batch, step=step)
        torch.testing.assert_close(found, expected)
