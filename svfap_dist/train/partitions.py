"""Where DeepSpeed keeps master weights and optimizer state of a rank, at each ZeRO stage.

In: a DeepSpeed engine. Out: this rank's `Partition`s: flat tensors that the optimizer updates, and
which part of which parameter is where in them. `load_states` fills them from states by parameter
name, which any stage on any number of ranks may have saved. DeepSpeed's own loader of its universal
form is not used: it has none for stage 0, fails on a rank without any element of a group, and in
stage 3 mixes up the options of the groups.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from svfap_dist.checkpoint.parameter_states import AVERAGE, WEIGHT, ParameterState


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive elements of a parameter inside a flat partition."""

    name: str
    start_in_parameter: int
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class Partition:
    """A tensor of float32 master weights that the optimizer updates, and what is where in it."""

    weights: Tensor
    parts: list[Part]


def partitions(engine: Any, stage: int) -> list[Partition]:
    """Return this rank's partitions.

    Args:
        engine: DeepSpeed's engine.
        stage: Its ZeRO stage.
    """
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if stage == 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return [Partition(p, [Part(names[p], 0, 0, p.numel())]) for p in parameters]
    if stage == 3:
        flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
        parts_of = _parts_of_stage_3
    else:
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        parts_of = _parts_of_stage_1_or_2
    return [Partition(f, parts_of(g, names)) for f, g in zip(flats, groups, strict=True)]


def _parts_of_stage_1_or_2(group: list[Any], names: Mapping[Any, str]) -> list[Part]:
    parts = []
    for parameter in group:
        if (mapping := parameter._hp_mapping) is not None:
            inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            parts.append(Part(names[parameter], inside.start, flat.start, flat.numel))
    return parts


def _parts_of_stage_3(group: list[Any], names: Mapping[Any, str]) -> list[Part]:
    parts, at = [], 0
    for parameter in group:
        size = parameter.partition_numel()  # with padding at the parameter's end
        start = min(dist.get_rank() * size, parameter.ds_numel)
        count = min(size, parameter.ds_numel - start)
        parts.append(Part(names[parameter], start, at, count))
        at += size
    return parts


def update_average(engine: Any, stage: int, weight: Tensor) -> None:
    """Move the average of each master weight towards it; the first call starts the averages.

    They are a part of the optimizer's state, so DeepSpeed saves and loads them with the moments.

    Args:
        engine: DeepSpeed's engine.
        stage: Its ZeRO stage.
        weight: Share of the new weights, a float32 scalar on the device.
    """
    for master in _masters(engine, stage):
        state = engine.basic_optimizer.state[master]
        if AVERAGE in state:
            state[AVERAGE].lerp_(master.detach(), weight)
        else:
            state[AVERAGE] = master.detach().clone()


@contextlib.contextmanager
def averaged(engine: Any, stage: int) -> Iterator[None]:
    """Exchange weights and their averages inside; a collective. Without averages: do nothing.

    Args:
        engine: DeepSpeed's engine.
        stage: Its ZeRO stage.
    """
    _exchange(engine, stage)
    try:
        yield
    finally:
        _exchange(engine, stage)


def _exchange(engine: Any, stage: int) -> None:
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    for master in _masters(engine, stage):
        if (average := engine.basic_optimizer.state[master].get(AVERAGE)) is not None:
            before = master.data.clone()
            master.data.copy_(average)
            average.copy_(before)
    _publish(engine, stage)


def _masters(engine: Any, stage: int) -> list[Tensor]:
    optimizer = engine.optimizer
    if stage == 0:
        return [p for group in optimizer.param_groups for p in group["params"]]
    if stage == 3:
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def load_states(engine: Any, stage: int, states: Mapping[str, ParameterState]) -> None:
    """Replace master weights, weights and optimizer state; a collective.

    Args:
        engine: DeepSpeed's engine, which has not made a step yet.
        stage: Its ZeRO stage.
        states: Of all trained parameters, by name.
    """
    optimizer = engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # drops gathered weights
    kept = [key for key in next(iter(states.values())).pieces if key != WEIGHT]
    step = max(state.step for state in states.values())  # equal for all
    for partition in partitions(engine, stage):
        weights = partition.weights
        state = engine.basic_optimizer.state[weights]
        state.update({key: torch.zeros_like(weights.data) for key in kept})
        flats = {WEIGHT: weights.data, **{key: state[key] for key in kept}}
        for part in partition.parts:
            for key, flat in flats.items():
                target = flat.view(-1)[part.start : part.start + part.count]
                states[part.name].copy_part(key, part.start_in_parameter, target)
        # Fused AdamW expects a float32 counter per tensor, on the tensor's device.
        state["step"] = torch.tensor(step, dtype=torch.float32, device=weights.device)
    _publish(engine, stage)


def _publish(engine: Any, stage: int) -> None:
    """Copy the master weights to the weights of all ranks."""
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        for flat, group in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
        ):
            sizes = [parameter.partition_numel() for parameter in group]
            for parameter, part in zip(group, flat.data.split(sizes), strict=True):
                parameter.ds_tensor.data.copy_(part)
        optimizer.checkpoint_event_epilogue()  # gathers small weights again
