"""What each mode of fine-tuning costs: trained parameters, memory and time of a step.

In: a recipe with a [task]. Out: a row per mode. Every mode is measured in a process of its own,
with the engine that trains, on clips of noise: their content does not change the cost of a step,
and nothing has to be decoded. On a CPU, memory is the process's peak above what it held before the
engine was built; on a GPU it is the peak of torch's allocations.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import statistics
from pathlib import Path
from typing import cast

import torch
from torch import nn

from svfap_dist.config import Config, with_device
from svfap_dist.data.batch import ClipBatch
from svfap_dist.distributed import World, has_gpu_per_rank
from svfap_dist.evaluate.protocol import require_task
from svfap_dist.evaluate.task_of_data import complete_config
from svfap_dist.profiling.ranks import run_on_local_ranks
from svfap_dist.profiling.step import noise_batch
from svfap_dist.profiling.timing import seconds_of
from svfap_dist.text_table import format_table
from svfap_dist.train.engine import Engine, process_group
from svfap_dist.train.objective import build_objective

MODES = ("full", "linear", "attentive", "lora")
_WARM_UP = 2
_SECONDS = 600.0  # limit of a mode
_RATE = 1e-6
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class ModeCost:
    """Cost of a step in a mode.

    Attributes:
        mode: finetune.mode.
        trained: parameters that are trained.
        parameters: all of them.
        peak_bytes: memory of the process or GPU at the peak of a step, as the module says.
        seconds: of a step, median.
    """

    mode: str
    trained: int
    parameters: int
    peak_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class FinetuneCosts:
    """Costs of all modes. clips: of a step. device: where they were measured."""

    clips: int
    device: str
    modes: list[ModeCost]

    def lines(self) -> list[str]:
        """Return a table to print."""
        rows = [
            [
                cost.mode,
                f"{cost.trained:,}",
                f"{cost.trained / cost.parameters:.2%}",
                f"{cost.peak_bytes / _MIB:,.0f}",
                f"{cost.seconds:.3f}",
            ]
            for cost in self.modes
        ]
        head = ["mode", "trained parameters", "of all", "memory of a step, MiB", "seconds"]
        title = f"Steps of {self.clips} clips on {self.device}:"
        return [title, *format_table(rows, head, range(1, len(head)))]


def run(config: Config, steps: int) -> FinetuneCosts:
    """Measure training steps of every mode.

    Args:
        config: a recipe with a [task]; its other keys apply to all modes.
        steps: timed ones per mode.

    Raises:
        ConfigError: There is no task, a mode does not fit the recipe, or a task of kind auto has no
            data.url.
        ShardError, StorageError: The data set that decides a task of kind auto cannot be read.
        ClusterError: A mode's process died or took too long.
    """
    require_task(config)
    config = complete_config(with_device(config, has_gpu_per_rank))
    costs = []
    for mode in MODES:
        pool = "mean" if mode == "attentive" else config.finetune.pool
        finetune = config.finetune.model_copy(update={"mode": mode, "pool": pool})
        one = config.model_copy(update={"finetune": finetune})
        costs += run_on_local_ranks(functools.partial(_measure, one, steps), 1, _SECONDS)
    device = "the GPU" if config.cluster.on_gpu else "this machine's CPUs"
    return FinetuneCosts(config.train.global_batch_size, device, costs)


def _measure(config: Config, steps: int, world: World) -> ModeCost:
    objective, batch = build_objective(config), _labeled_noise(config)
    with process_group(config, world) as device:  # DeepSpeed is imported now
        before = _resident_bytes()
        engine = Engine(config, objective, world, device)

        def step() -> None:
            engine.backward(batch, step=0)
            engine.update(_RATE)

        for _ in range(_WARM_UP):
            step()
        seconds = statistics.median(seconds_of(step) for _ in range(steps))
        parameters = list(cast(nn.Module, engine.network).parameters())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if engine.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(engine.device)
        engine.close()
        return ModeCost(
            mode=config.finetune.mode,
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            parameters=sum(p.numel() for p in parameters),
            peak_bytes=peak,
            seconds=seconds,
        )


def _labeled_noise(config: Config) -> ClipBatch:
    task, clips = require_task(config), config.train.global_batch_size
    targets = torch.randint(0, len(task.names), (clips,))
    if task.kind == "regression":
        targets = torch.rand(clips, len(task.names))
    return dataclasses.replace(noise_batch(config, clips), targets=targets)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
