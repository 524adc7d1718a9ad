"""One rank's share of an optimizer step, by DeepSpeed.

In: this rank's `ClipBatch` and a learning rate. Out: the loss, a device tensor that nobody waits
for, and the `Update`. What is computed of a batch is the objective's affair. The step is in two
halves, `backward` and `update`, because all ranks agree between them whether the weights may be
touched.

This file hides what DeepSpeed wants: it is imported late and on CPU without any compiled kernel (no
compiler is needed at run time), its process group is made or taken over here, and its chatter is
turned down. `checkpoint` is the only other file that knows DeepSpeed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.config import Config, check_world_size
from svfap_dist.distributed import World, barrier
from svfap_dist.errors import ClusterError
from svfap_dist.model import layers
from svfap_dist.telemetry.phases import Phases
from svfap_dist.train import objective, optim
from svfap_dist.train.objective import Moment

if TYPE_CHECKING:
    from svfap_dist.data.loader import ClipBatch

REDUCE_BUCKET = 50_000_000  # numbers that ZeRO sends at a time; its own default wants 2 GB for them


@dataclasses.dataclass(frozen=True)
class Update:
    """What came of one optimizer step.

    grad_norm: global norm before clipping; a device tensor where DeepSpeed leaves it there.
    applied: False if the gradient was not finite, and the weights were left as they were.
    """

    grad_norm: Tensor | float
    applied: bool


@contextlib.contextmanager
def process_group(config: Config, world: World) -> Iterator[torch.device]:
    """This rank's device, with all ranks connected; an existing group (Ray Train's) is used as is.

    Raises: ClusterError if a GPU is asked for and there is none, or the ranks do not find together.
    """
    device = _device(config, world)
    torch.set_num_threads(config.train.threads_per_rank or _fair_threads(world))
    if device.type == "cpu":
        keep_freed_memory()
    is_ours = not dist.is_initialized()
    if is_ours:
        _connect(config, world, device)
    try:
        _deepspeed(device).init_distributed(auto_mpi_discovery=False)
        yield device
        barrier()  # nobody hangs up while another still talks
    finally:
        if is_ours:
            _deepspeed(device).comm.destroy_process_group()


def _device(config: Config, world: World) -> torch.device:
    if not config.cluster.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            "No GPU",
            where=f"rank {world.rank}",
            found="cluster.use_gpu = true, but torch sees no CUDA device",
            do="run where there is one, or set cluster.use_gpu=false",
        )
    # Ray may show each rank its own GPU only, which is then number 0 whatever the local rank.
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _fair_threads(world: World) -> int:
    return max(1, len(os.sched_getaffinity(0)) // world.local_world_size)


def _connect(config: Config, world: World, device: torch.device) -> None:
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=config.train.collective_timeout_seconds),
            rank=world.rank,
            world_size=world.world_size,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ClusterError(
            "Ranks cannot find together",
            where=f"rank {world.rank} of {world.world_size} at {address}",
            found=str(error),
            do="check that all ranks were started and that MASTER_ADDR and MASTER_PORT name rank 0",
        ) from error


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet and without compiled kernels."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # torch 2.13 warns of names that DeepSpeed still uses, on every run.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*_tensor.*")
    import deepspeed
    import deepspeed.ops

    # Its shared-memory all-reduce for CPUs is compiled with g++ at first use; gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # standard output belongs to results
    return deepspeed


class Engine:
    """Model, optimizer and their ZeRO partitions on one rank.

    Args:
        universal: whether `load` will be given a checkpoint in DeepSpeed's universal format.
    """

    def __init__(
        self, config: Config, world: World, device: torch.device, universal: bool = False
    ) -> None:
        self.device, self.phases = device, Phases(device)
        self.objective = objective.of(config)
        self._config, self._rank = config, world.rank
        self._stage = config.train.zero_stage
        self._accumulation = check_world_size(config, world.world_size)
        # The same weights on every rank; torch's global generator is put back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            model = self.objective.build()
        model = model.to(device)
        if config.train.activation_checkpointing:
            layers.enable_activation_checkpointing(model)
        optimizer = optim.adamw(model, config.optim, self.objective.layer_decay)
        self._rate_scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self._engine, *_ = _deepspeed(device).initialize(
            model=model,
            optimizer=optimizer,
            config=self._settings(model, world, universal),
            dist_init_required=False,
        )
        if config.train.compile:
            # In place, so that weights keep their names. The few shapes there are (a held-out batch
            # may be smaller) are worth a program each.
            self._engine.module.compile(dynamic=False)
        self._train_mode()

    def _train_mode(self) -> None:
        self._engine.train()
        self.objective.train_mode(self._engine.module)

    def _settings(self, model: torch.nn.Module, world: World, universal: bool) -> dict[str, Any]:
        per_rank = self._config.train.global_batch_size // world.world_size
        is_bf16 = self._config.train.dtype == "bfloat16"
        size = sum(parameter.numel() for parameter in model.parameters())
        return {
            "train_micro_batch_size_per_gpu": per_rank // self._accumulation,
            "gradient_accumulation_steps": self._accumulation,
            "gradient_clipping": self._config.optim.clip_grad_norm,
            "bf16": {"enabled": is_bf16},
            # The position tables too: added to bf16 tokens in float32 they would turn them float32.
            "data_types": {"buffer_dtype": "bf16"} if is_bf16 else {},
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": min(size, REDUCE_BUCKET),
            },
            "checkpoint": {"load_universal": universal},
            "steps_per_print": None,
        }

    def forward(self, batch: ClipBatch, part: slice, step: int | None = None) -> Tensor:
        """Mean loss, a scalar on the device, over the clips `part` of a batch.

        step: completed optimizer steps, for random choices; None: without any, for evaluation.
        """
        moment = Moment(self.device, self._rank, step)
        return self.objective.loss(self._engine, batch, part, moment)

    def network(self, *inputs: Tensor) -> Tensor:
        """What the network gives; under ZeRO-3 all ranks call it together."""
        return self._engine(*inputs)

    def backward(self, batch: ClipBatch, step: int) -> Tensor:
        """Mean loss over this rank's batch, its gradient ready for `update`.

        step: completed optimizer steps.
        """
        count = len(batch.frames)
        micro = count // self._accumulation
        total = torch.zeros((), device=self.device)
        for begin in range(0, count, micro):
            if begin:
                self._engine.step()  # closes the micro batch before; touches no weight
            with self.phases.measured("forward"):
                value = self.forward(batch, slice(begin, begin + micro), step)
            with self.phases.measured("backward"):
                self._engine.backward(value)
            total += value.detach() / self._accumulation
        return total

    def update(self, learning_rate: float) -> Update:
        """Clip, and take one optimizer step; a gradient that is not finite is left out."""
        groups = self._engine.optimizer.param_groups
        for group, scale in zip(groups, self._rate_scales, strict=True):
            group["lr"] = learning_rate * scale
        with self.phases.measured("optimizer"):
            if self._stage == 0:
                return self._update_without_zero()
            self._engine.step()
        return Update(self._engine.get_global_grad_norm(), self._engine.was_step_applied())

    def _update_without_zero(self) -> Update:
        # Without ZeRO, DeepSpeed neither tells the norm nor skips a bad gradient. The gradients
        # are summed over the ranks already, so all ranks see the same. Asking whether the norm is
        # finite makes the host wait for the device, once in a step; stages 1 to 3 ask so too.
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = bool(torch.isfinite(norm))
        if not applied:
            for gradient in gradients:
                gradient.zero_()
            for group in self._engine.optimizer.param_groups:
                group["lr"] = 0.0
        self._engine.step()
        return Update(norm, applied)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside are in eval mode and keep no gradient."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._train_mode()

    def save(self, folder: str, tag: str) -> None:
        """Write this rank's shards to the local folder/tag; all ranks call it together."""
        self._engine.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, folder: str, tag: str) -> None:
        """Read what `save` of all ranks wrote to folder/tag; all ranks call it together."""
        groups = self._engine.optimizer.param_groups
        decays = [group["weight_decay"] for group in groups]
        found, _ = self._engine.load_checkpoint(folder, tag=tag)
        assert found, f"DeepSpeed found nothing in {folder}/{tag}"
        # Loading the universal format into stage 3, DeepSpeed 0.19 gives every group the options
        # of the first, and all parameters one and the same step counter.
        for group, decay in zip(self._engine.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in self._engine.basic_optimizer.state.values():
            state["step"] = state["step"].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, on rank 0 (others may get an empty one); all ranks call it together."""
        if self._stage == 3:
            return self._engine._zero3_consolidated_16bit_state_dict() or {}
        return self._engine.module.state_dict()

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers."""
        self._engine.destroy()
