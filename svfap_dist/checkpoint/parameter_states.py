"""Master weights and optimizer state by parameter name, read from what any ZeRO stage saved.

In: a folder with DeepSpeed's files of all ranks (stage 0 to 3), or with its universal form. Out: a
`ParameterState` for each trained parameter, so that any stage on any number of ranks can take its
own part. Nothing is converted or copied: files are mapped into memory, and a rank that needs a part
of a parameter reads only that part.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
KEYS = (WEIGHT, *MOMENTS)
AVERAGE = "average"  # of the weights (finetune.ema), where there is one


@dataclasses.dataclass(frozen=True)
class ParameterState:
    """One parameter's master weight and Adam moments. step: its number of updates.

    pieces: for each of `KEYS`, and for `AVERAGE` where there is one, flat float32 tensors that make
        up the parameter in this order.
    """

    pieces: Mapping[str, list[Tensor]]
    step: float

    def copy_part(self, key: str, start: int, target: Tensor) -> None:
        """Copy consecutive elements of the flat parameter.

        Args:
            key: One of `KEYS`, or `AVERAGE`.
            start: Index of the first element.
            target: Flat tensor of the wanted length, on any device.
        """
        done, at = 0, 0  # elements copied; index in the parameter where the piece begins
        for piece in self.pieces[key]:
            begin = start + done - at
            if done < len(target) and begin < len(piece):
                count = min(len(piece) - begin, len(target) - done)
                target[done : done + count].copy_(piece[begin : begin + count])
                done += count
            at += len(piece)
        assert done == len(target), f"{at} elements of {key}, {start + len(target)} wanted"


def read_shards(folder: str, names: Sequence[str]) -> dict[str, ParameterState]:
    """Return the states that all ranks of a run saved, by parameter name.

    Args:
        folder: DeepSpeed's files of all ranks.
        names: Names of the trained parameters in the order of the optimizer's groups, by which
            files of stage 0 number them.
    """
    paths = glob.glob(os.path.join(glob.escape(folder), "*zero_pp_rank_*_optim_states.pt"))
    if not paths:
        return _read_whole(_load(os.path.join(folder, "mp_rank_00_model_states.pt")), names)
    paths.sort(key=lambda path: int(re.findall(r"zero_pp_rank_(\d+)_", path)[-1]))
    ranks = [_load(path)["optimizer_state_dict"] for path in paths]
    if "fp32_flat_groups" in ranks[0]:
        model = _load(os.path.join(folder, "zero_pp_rank_0_mp_rank_00_model_states.pt"))
        parts = [_parts_of_stage_3(model["param_shapes"], r, len(ranks)) for r in range(len(ranks))]
        groups = [_flat_groups(r["optimizer_state_dict"], r["fp32_flat_groups"]) for r in ranks]
    else:
        parts = [_parts_of_stage_1_or_2(rank["param_slice_mappings"]) for rank in ranks]
        groups = [
            _flat_groups(rank["base_optimizer_state"], rank["single_partition_of_fp32_groups"])
            for rank in ranks
        ]
    states: dict[str, ParameterState] = {}
    for parts_of_rank, groups_of_rank in zip(parts, groups, strict=True):
        for name, group, start, count in parts_of_rank:
            flat = groups_of_rank[group]
            step = float(flat["step"])
            keys = _keys_of(flat)
            state = states.setdefault(name, ParameterState({key: [] for key in keys}, step))
            for key in keys:
                state.pieces[key].append(flat[key][start : start + count])
    return states


def _keys_of(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of the tensors that a parameter's state has."""
    return (*KEYS, AVERAGE) if AVERAGE in state else KEYS


def _load(path: str) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _flat_groups(optimizer: Any, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return one rank's flat partitions: for each group its weights, moments and step."""
    return [{**optimizer["state"][g], WEIGHT: flat} for g, flat in enumerate(weights)]


# Where the parameters are in a rank's partitions: name, group, first element, number of elements.


def _parts_of_stage_1_or_2(mappings: Any) -> Iterator[tuple[str, int, int, int]]:
    for group, mapping in enumerate(mappings):
        for name, part in mapping.items():
            yield name, group, part.start, part.numel


def _parts_of_stage_3(
    shapes: Any, rank: int, world_size: int
) -> Iterator[tuple[str, int, int, int]]:
    """Every parameter is cut into equal parts, the last ones of which may be short or empty."""
    for group, shapes_by_name in enumerate(shapes):
        start = 0
        for name, shape in shapes_by_name.items():
            part = math.ceil(math.prod(shape) / world_size)
            yield name, group, start, max(0, min(part, math.prod(shape) - rank * part))
            start += part


def _read_whole(saved: Any, names: Sequence[str]) -> dict[str, ParameterState]:
    """Return the states of stage 0, which one file holds undivided."""
    states = {}
    for index, name in enumerate(names):
        state = saved["optimizer"]["state"][index]
        tensors = {WEIGHT: saved["module"][name], **state}
        tensors = {key: tensors[key] for key in _keys_of(state)}
        pieces = {key: [tensor.flatten()] for key, tensor in tensors.items()}
        states[name] = ParameterState(pieces, float(state["step"]))
    return states


def read_universal(folder: str, names: Sequence[str]) -> dict[str, ParameterState]:
    """Return the states in DeepSpeed's universal form, by parameter name.

    Args:
        folder: What `ds_to_universal` wrote.
        names: Names of the trained parameters.
    """
    zero = os.path.join(folder, "zero")
    states = {}
    for name in names:
        files = os.path.join(zero, name)
        tensors = {key: _load(f"{files}/{key}.pt") for key in KEYS}
        if isinstance(tensors[WEIGHT], dict):  # from stage 1 or 2
            tensors = {key: saved["param"] for key, saved in tensors.items()}
        pieces = {key: [tensor.flatten()] for key, tensor in tensors.items()}
        if os.path.exists(f"{files}/step.pt"):
            step = _load(f"{files}/step.pt")
        else:  # from stage 3
            optimizer = _load(os.path.join(zero, "optimizer_state.pt"))
            step = optimizer["optimizer_state_dict"]["state"][0]["step"]
        states[name] = ParameterState(pieces, float(step))
    return states
