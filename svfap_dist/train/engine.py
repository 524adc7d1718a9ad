"""One rank's share of an optimizer step, by DeepSpeed, and what an objective must provide for it.

In: an `Objective`, this rank's `ClipBatch` and a learning rate. Out: the loss, a device tensor that
the host does not wait for, and the `Update`. The step is in two halves, `backward` and `update`,
because all ranks agree between them whether the weights may be changed.

DeepSpeed's requirements stay in this file: it is imported late, on CPU without any compiled kernel
(no compiler is needed at run time), its process group is created here unless Ray Train has created
one, and its log output is reduced. `partitions` knows where it keeps optimizer state, and
`checkpoint.reshard` uses its converter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svfap_dist import distributed
from svfap_dist.allocator import keep_freed_memory
from svfap_dist.checkpoint.parameter_states import AVERAGE, ParameterState
from svfap_dist.checkpoint.untrusted import pickle_by_value
from svfap_dist.config import Config, check_world_size
from svfap_dist.data.batch import ClipBatch
from svfap_dist.distributed import World, all_gather_object, barrier
from svfap_dist.errors import CheckpointError, ClusterError
from svfap_dist.model import layers
from svfap_dist.parallel.affinity import bind_to_gpu
from svfap_dist.parallel.cpus import cpu_quota, is_machine_busy, load_average, machine_cpus
from svfap_dist.telemetry.meter import Phases
from svfap_dist.train import optim, partitions, regions
from svfap_dist.train.copy_stream import CopyStream
from svfap_dist.train.gradients import REDUCE_BUCKET
from svfap_dist.train.update import (
    Backend,
    Gathered,
    Partitioned,
    Replicated,
    Update,
    Updater,
    sums_by_source,
)

log = logging.getLogger(__name__)

_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


@dataclasses.dataclass(frozen=True)
class StepContext:
    """Device, rank and step of a loss: all that its random choices may depend on.

    step: completed optimizer steps; None: an evaluation, without random choices.
    """

    device: torch.device
    rank: int
    step: int | None = None


class Objective(Protocol):
    """The network to train, its loss on a batch, and their costs.

    Pre-training (`objective`) and fine-tuning (`labeled`) differ only behind this protocol.
    """

    @property
    def build_arguments(self) -> Mapping[str, Any]:
        """Return the arguments of the network's `build`, which are stored beside its weights."""
        ...

    @property
    def layer_decay(self) -> float:
        """Return the decay of the learning rate from layer to layer; see `optim`."""
        ...

    @property
    def flops_per_clip(self) -> int:
        """Return the floating-point operations of a training step for one clip."""
        ...

    @property
    def tokens_per_clip(self) -> int:
        """Return the number of tokens that the network encodes or predicts for one clip."""
        ...

    def check_initial_weights(self) -> None:
        """Check the weights that a new run would start from, before any rank is started.

        Raises:
            ConfigError: If they do not fit the recipe's network.
            CheckpointError: If there are none.
        """
        ...

    def build(self) -> nn.Module:
        """Return the network of a new run, initialized from torch's global generator."""
        ...

    def train_mode(self, model: nn.Module) -> None:
        """Put the trained part of the network into training mode.

        Args:
            model: Network from `build`.
        """
        ...

    def inputs(self, batch: ClipBatch, part: slice, context: StepContext) -> tuple[Tensor, ...]:
        """Return what `loss` needs of some clips, as tensors on the device that need no gradient.

        All random choices of a step are made here, those of the network by seeding torch.

        Args:
            batch: This rank's clips.
            part: Which of them.
            context: Device, rank and step.
        """
        ...

    def loss(self, network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return the mean loss, a scalar on the device; a function of tensors, to be compiled.

        Args:
            network: Network from `build`, perhaps wrapped.
            *inputs: From `inputs`.
        """
        ...

    def losses(self, network: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss, as `loss` does, and that of each clip, [B], without gradient.

        Args:
            network: As for `loss`.
            *inputs: As for `loss`.
        """
        ...


@contextlib.contextmanager
def process_group(config: Config, world: World) -> Iterator[torch.device]:
    """Connect all ranks and yield this rank's device; an existing group (Ray Train's) is kept.

    Args:
        config: The run's recipe.
        world: This rank's place among all ranks.

    Raises:
        ClusterError: If the recipe wants a GPU and there is none, or the rendezvous fails.
    """
    device = _device(config, world)
    if device.type == "cpu":
        keep_freed_memory()
    elif config.cluster.bind_cpus:  # before anything else is started
        bind_to_gpu(device.index, config.cluster.cpus_per_worker)
    with contextlib.ExitStack() as stack:
        if not dist.is_initialized():
            stack.enter_context(distributed.gloo_on_loopback())
            _connect(config, world, device)
            stack.callback(_deepspeed(device).comm.destroy_process_group)
        _deepspeed(device).init_distributed(auto_mpi_discovery=False)
        torch.set_num_threads(config.train.threads_per_rank or _fair_threads())
        if device.type == "cpu" and world.is_main:
            _warn_if_busy(torch.get_num_threads())
        yield device
        barrier()  # destroying the group early would fail peers' pending collectives


def _device(config: Config, world: World) -> torch.device:
    if not config.cluster.on_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        found = "cluster.use_gpu = true, but torch sees no CUDA device"
        advice = "run where there is one, or set cluster.use_gpu=false"
        raise ClusterError("No GPU", f"rank {world.rank}", found, advice)
    count, ranks = torch.cuda.device_count(), world.local_world_size
    if 1 < count < ranks:
        found = f"{ranks} ranks on a machine where torch sees {count} CUDA devices"
        advice = "start one rank per GPU (cluster.num_workers), or set CUDA_VISIBLE_DEVICES to all"
        raise ClusterError("Fewer GPUs than ranks", f"rank {world.rank}", found, advice)
    # Ray may expose only its own GPU to each rank, which is then number 0 for any local rank.
    device = torch.device("cuda", world.local_rank % count)
    torch.cuda.set_device(device)
    return device


def _fair_threads() -> int:
    """Return this rank's share of the cores it may use; a collective.

    Under torchrun or Ray all ranks of a machine have the same cores; srun may have given each rank
    cores of its own, which nothing else shares. All ranks of a container share its quota.
    """
    cores = os.sched_getaffinity(0)
    placed = all_gather_object((socket.gethostname(), cores))
    here = [c for host, c in placed if host == socket.gethostname()]
    threads = len(cores) // sum(not cores.isdisjoint(c) for c in here)
    if (quota := cpu_quota()) is not None:
        threads = min(threads, int(quota / len(here)))
    return max(1, threads)


@functools.cache
def _warn_if_busy(threads: int) -> None:
    """Warn if other processes take cores from torch's threads, which wait for each other.

    Once in a process: later the load is its own, such as that of the fold before.
    """
    if threads > 1 and is_machine_busy():
        log.warning(
            "The load average is %.1f on %d CPUs, and torch's %d threads synchronize after each "
            "operation. If steps are slow, set train.threads_per_rank=1 and start more ranks "
            "(torchrun, or --on ray).",
            *(load_average(), machine_cpus(), threads),
        )


def _connect(config: Config, world: World, device: torch.device) -> None:
    timeout = datetime.timedelta(seconds=config.train.collective_timeout_seconds)
    if device.type == "cuda":
        os.environ |= distributed.flight_recorder_variables()
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            store=distributed.loopback_store(world, timeout),
            rank=world.rank,
            world_size=world.world_size,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        title = "Group initialization failed (rendezvous)"
        where = f"rank {world.rank} of {world.world_size} at {address}"
        do = "check that all ranks were started and that MASTER_ADDR and MASTER_PORT name rank 0"
        raise ClusterError(title, where, str(error), do) from error


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, quiet and without compiled kernels."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # torch 2.13 warns about names that DeepSpeed still uses, on every run.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*_tensor.*")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.zero.config import ZeroStageEnum

    pickle_by_value(ZeroStageEnum)
    ops: Any = deepspeed.ops
    if device.type == "cpu":
        # Its shared-memory all-reduce for CPUs is compiled with g++ at first use; gloo needs none.
        # The table is replaced, not read: reading it compiles test programs for all its kernels
        # and prints on standard output what fails.
        ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # An optimizer that is not used here, tried for at each start. Importing it imports torch's
    # compiler: half of the time of building an engine. DeepSpeed does without where it is missing.
    sys.modules.setdefault(_MUON, cast(Any, None))
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:  # DeepSpeed's own; pytest adds others
            # Standard output belongs to results. `setStream` flushes a stream that may be closed.
            handler.stream = sys.stderr
    return deepspeed


class Engine:
    """Model, optimizer and their ZeRO partitions on one rank.

    Args:
        config: The run's recipe.
        objective: What to train, built for `config`.
        world: This rank's place among all ranks.
        device: From `process_group`.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        world: World,
        device: torch.device,
    ) -> None:
        self.device, self.phases, self.objective = device, Phases(device), objective
        self._config, self._rank = config, world.rank
        self._copies = CopyStream(device)
        self._stage = config.train.zero_stage
        self._accumulation = check_world_size(config, world.world_size)
        self._decay = config.finetune.ema if config.task is not None else 0.0
        self._completed = 0  # steps before this one
        # The same weights on every rank; torch's global generator is restored afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            model = self.objective.build()
        model = model.to(device)
        if config.train.activation_checkpointing:
            layers.enable_activation_checkpointing(model)
        optimizer = optim.adamw(model, config.optim, self.objective.layer_decay)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.parameter_names = [names[p] for g in optimizer.param_groups for p in g["params"]]
        if world.is_main:
            trained = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
            total = sum(parameter.numel() for parameter in model.parameters())
            counts = f"{trained:,}", f"{total:,}"
            log.info("%s of %s parameters are trained.", *counts, extra={"once": True})
        self._rate_scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        # Of this recipe: a checkpoint restores those that it was saved with.
        self._group_options = [
            {name: group[name] for name in ("betas", "weight_decay")}
            for group in optimizer.param_groups
        ]
        deepspeed = _deepspeed(device)
        if config.train.zero_stage == 3 and sys.modules[_MUON] is None:
            del sys.modules[_MUON]  # stage 3 does not do without
        if config.train.zero_stage == 3 and config.train.compile:
            # Gather weights per block, not per layer: hooks inside a block would split its program.
            deepspeed.utils.set_z3_leaf_modules(model, [layers.CheckpointedBlock], False)
            regions.require_gradients(model)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=self._settings(model, world),
            dist_init_required=False,
        )
        self._backend = self._choose_backend()
        self._updater = Updater(
            self._backend, self._engine.basic_optimizer, config.optim.clip_grad_norm
        )
        self._step_loss = torch.zeros((), device=device)  # of the gradient
        self._num_sources = len(config.data.sources)
        loss: Callable[..., Any] = objective.losses if self._num_sources else objective.loss
        self.network: Callable[..., Any] = self._backend.network
        self._loss: Callable[..., Any] = functools.partial(loss, self.network)
        self._source_sums: Tensor | None = None  # of the step
        if config.train.compile:
            regions.compile_blocks(self._engine.module, config.train.compile_mode)
            self._loss = regions.compiled_loss(loss, self.network)
        self._train_mode()

    def _choose_backend(self) -> Backend:
        if self._stage == 0:
            return Replicated(self._engine, self._accumulation, self.phases)
        if self._stage == 3:
            return Gathered(self._engine)
        return Partitioned(self._engine, self._accumulation, self._stage, self.phases)

    def _train_mode(self) -> None:
        self._engine.train()
        self.objective.train_mode(self._engine.module)

    def _settings(self, model: torch.nn.Module, world: World) -> dict[str, Any]:
        per_rank = self._config.train.global_batch_size // world.world_size
        is_bf16 = self._config.train.dtype == "bfloat16"
        size = sum(parameter.numel() for parameter in model.parameters())
        return {
            "train_micro_batch_size_per_gpu": per_rank // self._accumulation,
            "gradient_accumulation_steps": self._accumulation,
            "gradient_clipping": self._config.optim.clip_grad_norm,
            "bf16": {"enabled": is_bf16},
            # Position tables in float32 would promote the bf16 tokens they are added to.
            "data_types": {"buffer_dtype": "bf16"} if is_bf16 else {},
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": min(size, REDUCE_BUCKET),
                # Stage 3 would replace torch's `linear`, for the whole process, by a function whose
                # gradients torch 2.11 loses when it compiles: the run would learn nothing.
                "memory_efficient_linear": False,
            },
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # they wait for the device
        }

    def forward(self, batch: ClipBatch, part: slice, step: int | None = None) -> Tensor:
        """Return the mean loss, a scalar on the device, over some clips of a batch.

        Args:
            batch: This rank's clips.
            part: Which of them.
            step: Completed optimizer steps, for random choices; None: none, for evaluation.
        """
        return self._forward(batch, part, step)[0]

    def _forward(
        self, batch: ClipBatch, part: slice, step: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss, and for a batch of a mixture `sums_by_source`."""
        context = StepContext(self.device, self._rank, step)
        sources = batch.sources if self._num_sources else None  # noise has none

        def make_inputs() -> tuple[Tensor, ...]:
            made = self.objective.inputs(batch, part, context)
            if sources is None:
                return made
            return (*made, sources[part].to(self.device, non_blocking=True))

        with self.phases.range("data"):
            inputs = self._copies.inputs(batch, part, make_inputs)
        if self._config.train.compile:  # it imports the compiler: seconds, and 200 MiB
            torch.compiler.cudagraph_mark_step_begin()
        if not self._num_sources:
            return self._loss(*inputs), None
        if sources is None:
            return self._loss(*inputs)[0], None
        *inputs, numbers = inputs
        loss, of_clips = self._loss(*inputs)
        return loss, sums_by_source(of_clips, numbers, self._num_sources)

    def backward(self, batch: ClipBatch, step: int) -> Tensor:
        """Return the mean loss over this rank's batch, with its gradient ready for `update`.

        Args:
            batch: This rank's clips, all micro batches of the step.
            step: Completed optimizer steps.
        """
        self._completed = step
        count = len(batch.frames)
        micro = count // self._accumulation
        losses, sums = [], []
        for begin in range(0, count, micro):
            with self.phases.measured("forward"):
                loss, by_source = self._forward(batch, slice(begin, begin + micro), step)
            sums += [] if by_source is None else [by_source]
            with self.phases.measured("backward"):
                self._backend.backward(loss, begin == 0, begin + micro == count)
            losses.append(loss.detach())
        self._step_loss = torch.stack(losses).mean()
        if sums:
            self._source_sums = torch.stack(sums).sum(dim=0)
        return self._step_loss

    def update(self, learning_rate: float, counts: Sequence[float] = ()) -> Update:
        """Clip the gradient and take one optimizer step, unless something is not finite.

        Args:
            learning_rate: Rate of this step, before each group's layer decay.
            counts: Numbers that are added over all ranks on the way.
        """
        groups = self._engine.optimizer.param_groups
        of_groups = zip(groups, self._rate_scales, self._group_options, strict=True)
        for group, scale, options in of_groups:
            group.update(options, lr=learning_rate * scale)
        with self.phases.measured("optimizer"):
            update = self._updater.update(self._step_loss, counts, self._source_sums)
            if self._decay:
                self._update_average()
        self._engine.global_steps += 1  # in its checkpoints
        self._engine.global_samples += self._engine.train_batch_size()
        return update

    def _update_average(self) -> None:
        """Add the new weights to their average, unless this step left them as they were."""
        n = self._completed
        share = 1 - min(self._decay, (1 + n) / (10 + n))
        applied = 1 - self._engine.basic_optimizer.found_inf
        partitions.update_average(self._engine, self._stage, share * applied)

    def _averaged(self) -> AbstractContextManager[None]:
        """Exchange the weights and their average inside, if finetune.ema is set."""
        if not self._decay:
            return contextlib.nullcontext()
        return partitions.averaged(self._engine, self._stage)

    @property
    def eager_network(self) -> Callable[..., Any]:
        """Return the network without compilation, for calls of other shapes than training's."""
        return regions.eager(self.network) if self._config.train.compile else self.network

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run forward passes inside in eval mode, without gradients, of averaged weights if any."""
        self._engine.eval()
        try:
            with self._averaged(), torch.no_grad():
                yield
        finally:
            self._train_mode()

    def save(self, folder: str, tag: str) -> None:
        """Write this rank's shards; a collective.

        Args:
            folder: Local folder.
            tag: Name of the checkpoint's folder in it.
        """
        self._engine.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, folder: str, tag: str) -> None:
        """Read the shards that as many ranks wrote by `save` in this stage; a collective.

        Args:
            folder: Local folder.
            tag: Name of the checkpoint's folder in it.
        """
        found, _ = self._engine.load_checkpoint(folder, tag=tag)
        assert found, f"DeepSpeed found nothing in {folder}/{tag}"
        for state in self._engine.basic_optimizer.state.values():
            state["step"] = state["step"].to(self.device, torch.float32)

    def load_states(self, states: Mapping[str, ParameterState]) -> None:
        """Continue from states that any stage on any number of ranks saved; a collective.

        Args:
            states: Of all trained parameters, by name.

        Raises:
            CheckpointError: If the recipe averages weights and the states have no average.
        """
        if self._decay and not all(AVERAGE in state.pieces for state in states.values()):
            title = "Checkpoint has no average of the weights"
            found = "DeepSpeed's universal form, which holds none, where finetune.ema is above 0"
            advice = "resume from a checkpoint that was not reshaped: none needs to be, to change "
            advice += "the number of ranks or the ZeRO stage"
            raise CheckpointError(title, "finetune.ema", found, advice)
        partitions.load_states(self._engine, self._stage, states)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights on rank 0 (others may get an empty dictionary); a collective.

        With finetune.ema they are the averaged ones, copied to the host.
        """
        if not self._decay:
            return self._weights()
        with self._averaged():
            return {
                name: weight.detach().to("cpu", copy=True)
                for name, weight in self._weights().items()
            }

    def _weights(self) -> dict[str, Tensor]:
        if self._stage == 3:
            return self._engine._zero3_consolidated_16bit_state_dict() or {}
        return self._engine.module.state_dict()

    def close(self) -> None:
        """Remove hooks and DeepSpeed's buffers."""
        self._backend.close()
        self._engine.destroy()


@contextlib.contextmanager
def open_engine(objective: Objective, config: Config, world: World) -> Iterator[Engine]:
    """Open the engine of a rank together with its process group, for measurements.

    Args:
        objective: Network and loss.
        config: The recipe.
        world: This rank's place among all ranks.
    """
    with process_group(config, world) as device:
        engine = Engine(config, objective, world, device)
        yield engine
        engine.close()
