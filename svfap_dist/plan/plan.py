"""`svfap plan`: what a recipe will do on some machines, before they are rented.

In: a recipe, how many nodes with how many devices, and what the planner knows better. Out: `Plan`:
clips per second and what bounds them, hours, bytes per rank, and every number that this was made
from, with where it comes from. Ranks on CPUs are like this machine, and measured here: steps by the
engine, decoding by the loader. GPUs are planned by what data sheets say, and a share of it (MFU)
that is assumed unless given.
"""

from __future__ import annotations

import dataclasses
import os

from svfap_dist.config import Config, check_world_size
from svfap_dist.errors import ConfigError
from svfap_dist.model import flops
from svfap_dist.plan import data, devices, limits
from svfap_dist.plan.data import DataCost
from svfap_dist.plan.limits import Costs
from svfap_dist.plan.plan_report import Input, Plan
from svfap_dist.profiling import memory
from svfap_dist.profiling import step as steps
from svfap_dist.profiling.memory import ModelBytes, RankBytes
from svfap_dist.profiling.step import StepCost
from svfap_dist.progress import say
from svfap_dist.train import schedule
from svfap_dist.train.objective import build_objective

_HERE = "measured on this machine"
_GIVEN = "given"
_RECOMPUTED = 4 / 3  # work of a step whose forward pass is done twice, to that of one


@dataclasses.dataclass(frozen=True)
class Known:
    """What the planner knows better than sheets and measurements; None: nothing.

    mfu: share of a GPU's peak rate. decode_rate: clips per CPU-second. network_gbps: of a node, in
    Gbit/s. storage_rate: of a node, in MB/s. cores: of a node. samples: of the data set.
    """

    mfu: float | None = None
    decode_rate: float | None = None
    network_gbps: float | None = None
    storage_rate: float | None = None
    cores: int | None = None
    samples: int | None = None


def make(config: Config, nodes: int, gpus_per_node: int, gpu: str, known: Known) -> Plan:
    """Plan a run of a recipe.

    Raises: ConfigError for what cannot be planned; ShardError, StorageError from data.url;
    ClusterError if steps cannot be measured.
    """
    if config.task is not None:
        raise ConfigError(
            "Only pre-training can be planned",
            where="the recipe",
            found="it has a section [task]",
            do="give a recipe of pre-training",
        )
    world_size = nodes * gpus_per_node
    check_world_size(config, world_size, key="--nodes x --gpus-per-node")
    on_gpu = gpu != devices.CPU
    cluster = config.cluster.model_copy(update={"use_gpu": on_gpu, "num_workers": world_size})
    config = config.model_copy(update={"cluster": cluster})
    draft = _Draft(config, nodes, gpus_per_node, gpu, known)
    return draft.plan()


class _Draft:
    """A plan in the making: numbers are asked for one after the other, and listed."""

    def __init__(
        self, config: Config, nodes: int, gpus_per_node: int, gpu: str, known: Known
    ) -> None:
        self._config, self._known, self._gpu = config, known, gpu
        self._nodes, self._ranks, self._world_size = nodes, gpus_per_node, nodes * gpus_per_node
        self._on_gpu = gpu != devices.CPU
        self._device = devices.device(gpu) if self._on_gpu else None
        self._accumulation = check_world_size(config, self._world_size)
        self._inputs: list[Input] = []
        self._notes: list[str] = []

    def _note(self, name: str, value: float | None, unit: str, source: str) -> None:
        self._inputs.append(Input(name, value, unit, source))

    def plan(self) -> Plan:
        config = self._config
        batch = config.train.global_batch_size
        self._note("global batch", batch, "clips", "recipe: train.global_batch_size")
        found = self._data()
        model = memory.count(config)
        step = None if self._on_gpu else self._steps()
        costs = self._costs(model, step, found)
        verdict = limits.verdict(costs)
        total = self._total_steps(found)
        micro = batch // self._world_size // self._accumulation
        ring = memory.prefetch_bytes(config, self._world_size)
        by_stage = memory.by_stage(model, config, self._world_size, micro, ring)
        return Plan(
            gpu=self._gpu,
            nodes=self._nodes,
            gpus_per_node=self._ranks,
            world_size=self._world_size,
            clips_per_second=verdict.clips_per_second,
            bound_by=verdict.bound_by,
            step_seconds=batch / verdict.clips_per_second,
            total_steps=total,
            hours=None if total is None else total * batch / verdict.clips_per_second / 3600,
            alone=verdict.alone,
            zero_stage=config.train.zero_stage,
            bytes_per_rank=by_stage,
            standing_bytes=step.standing_bytes if step else None,
            device_bytes=self._fits(by_stage[config.train.zero_stage]),
            inputs=self._inputs,
            notes=self._notes,
        )

    # ---- data ----

    def _data(self) -> DataCost | None:
        """What was measured on the recipe's shards, if it names any."""
        if not self._config.data.url:
            return None
        say(f"Measuring how fast {self._config.data.url} is read and decoded ...")
        return data.measure(self._config, self._on_gpu)

    def _total_steps(self, found: DataCost | None) -> int | None:
        samples, source = self._known.samples, _GIVEN
        if samples is None and found:
            samples, source = found.samples, "manifest of data.url"
        self._note("samples", samples, "", source if samples else "neither data.url nor --samples")
        train = self._config.train
        if samples is None:
            return train.max_steps or None
        self._note("epochs", train.epochs, "", "recipe: train.epochs")
        if train.max_steps:
            self._note("most steps", train.max_steps, "", "recipe: train.max_steps")
        return schedule.total_steps(train, samples // self._config.samples_per_step)

    def _decode_cpu_seconds(self, found: DataCost | None) -> float | None:
        """Of a clip; None if it is decoded on the GPU, or nobody knows."""
        name, unit = "clips decoded", "per CPU-second"
        if self._known.decode_rate is not None:
            self._note(name, self._known.decode_rate, unit, _GIVEN)
            return 1 / self._known.decode_rate
        if self._config.decode.backend == "dali" and self._on_gpu:
            self._note(name, None, unit, "decode.backend = dali: the GPU's decoding units")
            self._notes.append("What the GPU's decoding units can do was not measured: no bound.")
            return None
        if found is not None:
            source = f"{_HERE}, from data.url (profile {found.profile}) to ready batches"
            self._note(name, 1 / found.cpu_seconds, unit, source)
            return found.cpu_seconds
        if not self._on_gpu:
            self._note(name, None, unit, "data.url is not given")
            self._notes.append("Without data.url nothing is decoded here: the rate is too high.")
            return None
        source = "docs/benchmarks.md, one CPU; taken that shards have the profile train"
        self._note(name, devices.MEASURED_DECODE_RATE, unit, source)
        return 1 / devices.MEASURED_DECODE_RATE

    def _storage(self, found: DataCost | None) -> tuple[float | None, float | None]:
        """Bytes of a clip; bytes per second that a node reads."""
        clip = found.clip_bytes if found else None
        rate, source = self._known.storage_rate, _GIVEN
        if rate is None and found is not None:
            rate, source = found.storage_rate / 1e6, f"{_HERE}; taken for every node"
        self._note("bytes of a clip", clip, "", "manifest" if found else "data.url is not given")
        self._note("storage, of a node", rate, "MB/s", source if rate else "unknown: no bound")
        return clip, rate * 1e6 if rate else None

    # ---- computing ----

    @property
    def _as_here(self) -> bool:
        """Whether nothing is said that makes decoding other than what was measured."""
        return self._known.decode_rate is None and self._known.cores is None

    def _steps(self) -> StepCost:
        say(f"Measuring training steps on {self._ranks} ranks of this machine ...")
        cost = steps.measure(self._config, self._ranks, self._world_size)
        source = f"{_HERE}, {self._ranks} ranks at once, {cost.threads} threads each"
        micro = f"micro batch of {cost.clips}, forward and back"
        self._note(micro, cost.micro_seconds, "s", source)
        self._note("micro batches of a step", self._accumulation, "", "recipe and ranks")
        self._note("update of the weights", cost.update_seconds, "s", source)
        self._note("cores busy, of a rank", cost.cpu_seconds, "", source)
        if cost.slowdown is not None:
            self._note("a step beside the loader", cost.slowdown, "times as long", source)
        return cost

    def _costs(self, model: ModelBytes, step: StepCost | None, found: DataCost | None) -> Costs:
        batch, config = self._config.train.global_batch_size, self._config
        per_rank = batch // self._world_size
        if step is not None:
            step_seconds = step.step_seconds(self._accumulation)
            cpu_seconds = step_seconds * step.cpu_seconds / per_rank
        else:
            step_seconds, cpu_seconds = self._gpu_step(per_rank), 0.0
        cores = self._cores()
        decoders = config.data.decode_workers or config.data.decode_threads
        where = "data.decode_workers" if config.data.decode_workers else "data.decode_threads"
        self._note("decoding at a time, of a rank", decoders, "", f"recipe: {where}")
        clip_bytes, storage_rate = self._storage(found)
        return Costs(
            nodes=self._nodes,
            clips=batch,
            step_seconds=step_seconds,
            network_seconds=self._network_seconds(model),
            compute_cpu_seconds=cpu_seconds,
            decode_cpu_seconds=self._decode_cpu_seconds(found),
            decoders=decoders * self._ranks,
            # A GPU's rank keeps a core busy with telling it what to do.
            cores=max(1, cores - self._ranks) if self._on_gpu else cores,
            slowdown=step.slowdown if step and self._as_here else None,
            clip_bytes=clip_bytes,
            storage_rate=storage_rate,
        )

    def _gpu_step(self, clips: int) -> float:
        """Seconds of a step of so many clips on a rank."""
        assert self._device is not None
        dtype = self._config.train.dtype
        peak = flops.peak_rate(self._device.cuda_name, dtype)
        if peak is None:
            raise ConfigError(
                "Peak rate is not known",
                where="--gpu",
                found=f"{self._gpu} in train.dtype = {dtype}",
                do="plan another device or type",
            )
        work = float(build_objective(self._config).flops_per_clip)
        if self._config.train.activation_checkpointing:
            work *= _RECOMPUTED
        mfu = devices.ASSUMED_MFU if self._known.mfu is None else self._known.mfu
        source = "assumed, measured nowhere: give --mfu" if self._known.mfu is None else _GIVEN
        self._note("work of a clip", work / 1e9, "GFLOP", "counted from the recipe's model")
        self._note(f"peak rate in {dtype}", peak / 1e12, "TFLOP/s", "NVIDIA's data sheet")
        self._note("share of it that is reached (MFU)", mfu, "", source)
        return clips * work / (mfu * peak)

    def _cores(self) -> int:
        """Of a node."""
        cores, source = self._known.cores, _GIVEN
        if cores is None and self._on_gpu:
            cores = self._config.cluster.cpus_per_worker * self._ranks
            source = "recipe: cluster.cpus_per_worker x --gpus-per-node"
        elif cores is None:
            cores, source = len(os.sched_getaffinity(0)), "this machine"
        self._note("cores, of a node", cores, "", source)
        return cores

    # ---- network and memory ----

    def _network_seconds(self, model: ModelBytes) -> float:
        """Of a step, for what is sent over the slowest link; 0 where it is in what was measured."""
        sent = limits.bytes_sent(
            model.parameters,
            model.number_bytes,
            self._world_size,
            self._config.train.zero_stage,
            self._accumulation,
        )
        if self._world_size == 1 or (self._nodes == 1 and not self._on_gpu):
            return 0.0
        self._note("sent by a rank in a step", sent / 1e6, "MB", "counted; a ring of all ranks")
        seconds = 0.0
        if self._device and self._ranks > 1:
            link = self._device.link_rate
            self._note("link between GPUs of a node", link / 1e9, "GB/s", self._device.source)
            seconds = sent / link
        if self._nodes > 1:
            # A ring enters and leaves each node once; several rings use all its network cards.
            seconds = max(seconds, sent / self._node_network())
        return seconds

    def _node_network(self) -> float:
        """Bytes per second out of a node."""
        if self._known.network_gbps is not None:
            rate, source = self._known.network_gbps * 1e9 / 8, _GIVEN
        elif self._device:
            rate, source = self._device.network_rate * self._ranks, self._device.source
        else:
            rate, source = devices.CPU_NETWORK_RATE, "assumed: 10 Gbit/s"
        self._note("network, of a node", rate / 1e9, "GB/s", source)
        return rate

    def _fits(self, needed: RankBytes) -> float | None:
        """Bytes of the device that a rank has."""
        if self._device is None:
            return None
        room = self._device.memory_bytes
        self._note("memory of the device", room / 2**30, "GiB", self._device.source)
        if needed.total > room:
            self._notes.append(
                "This does not fit into the device: lower train.micro_batch_size, or set "
                "train.activation_checkpointing=true."
            )
        return room
