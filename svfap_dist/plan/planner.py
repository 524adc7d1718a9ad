"""Predict what a recipe will do on some machines.

In: a recipe, a number of nodes and devices, and rates that the user knows. Out: `Plan`: clips per
second and what bounds them, hours, bytes per rank, and every number behind them with its source.
CPU ranks are assumed to be like this machine and are measured here: steps by the engine, decoding
by the loader. GPUs are planned from data sheets and the share of the peak rate (MFU) that an H200
reached (an assumed one with train.compile); what their host does to launch a step is measured here,
on a network as deep but narrow. Each input says whether it was measured, counted, given or assumed,
and the plan sums that up.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math

import torch

from svfap_dist.config import Config, check_world_size
from svfap_dist.data.clips import prefetch_bytes
from svfap_dist.data.read_ahead import plan_reads
from svfap_dist.data.run_order import RunOrder
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError
from svfap_dist.model import flops
from svfap_dist.model.layers import CheckpointedBlock
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.plan import devices, limits
from svfap_dist.plan.limits import Costs, RankBytes, rank_bytes_by_stage
from svfap_dist.profiling import memory
from svfap_dist.profiling.host import measure_host, narrow_recipe
from svfap_dist.profiling.loader import DataCost, measure_data
from svfap_dist.profiling.memory import ModelBytes
from svfap_dist.profiling.step import StepCost, measure_steps, noise_batch
from svfap_dist.text_table import format_table
from svfap_dist.train.engine import StepContext, open_engine
from svfap_dist.train.objective import build_objective
from svfap_dist.video.backends import capabilities

log = logging.getLogger(__name__)

_HERE = "measured on this machine"
_GIVEN, _ASSUMED = "given", "assumed"
_RECOMPUTED = 4 / 3  # work of a step with two forward passes, relative to one


@dataclasses.dataclass(frozen=True)
class KnownRates:
    """Rates that the user gives instead of data sheets and measurements; None: not given."""

    mfu: float | None = None  # share of a GPU's peak rate
    decode_rate: float | None = None  # clips per CPU-second
    network_gbps: float | None = None  # of a node, in Gbit/s
    storage_rate: float | None = None  # of a node, in MB/s
    cores: int | None = None  # of a node
    samples: int | None = None  # of the data set
    host_ms: float | None = None  # in which a GPU's host launches a step


@dataclasses.dataclass(frozen=True)
class Input:
    """A number that the plan is computed from, in `unit`s, and its source; None: unknown."""

    name: str
    value: float | None
    unit: str
    source: str

    @property
    def text(self) -> str:
        """The value with its unit."""
        return "unknown" if self.value is None else f"{self.value:.6g} {self.unit}".strip()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predictions for a run."""

    gpu: str
    nodes: int
    gpus_per_node: int
    world_size: int
    clips_per_second: float
    bound_by: str
    step_seconds: float
    total_steps: int | None
    hours: float | None  # for the recipe's epochs or max_steps; None: number of samples unknown
    alone: dict[str, float]  # clips per second of each part if nothing else bounded the run
    zero_stage: int
    bytes_per_rank: dict[int, RankBytes]  # by ZeRO stage
    standing_bytes: int | None  # measured: weights and optimizer at the recipe's stage
    device_bytes: float | None  # memory of a rank's GPU
    inputs: list[Input]
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        machines = f"{self.nodes} x {self.gpus_per_node} ranks on {self.gpu}"
        alone = ", ".join(f"{name} {rate:.1f}" for name, rate in self.alone.items())
        hours = "Hours: unknown without the number of samples: give data.url or --samples."
        if self.hours is not None:
            hours = f"{self.hours:.2f} hours for {self.total_steps} steps, without start-up, "
            hours += "evaluations and checkpoints."
        names = [field.name for field in dataclasses.fields(RankBytes)]
        memory = [
            ["*" if stage == self.zero_stage else "", str(stage)]
            + [f"{getattr(found, name) / 2**30:.3f}" for name in names]
            for stage, found in self.bytes_per_rank.items()
        ]
        inputs = [("", given.name, given.text, given.source) for given in self.inputs]
        return [
            f"{self.clips_per_second:.1f} clips/s on {machines}, bound by {self.bound_by}; a step "
            f"takes {self.step_seconds:.3g} s.",
            f"Each part alone, in clips/s: {alone}.",
            hours,
            "",
            "Memory per rank in GiB, by ZeRO stage (* the recipe's):",
            *format_table(memory, ("", "", *names), right=range(2, len(names) + 2)),
            "",
            "Computed from:",
            *format_table(inputs, right=(2,)),
            "",
            *self._provenance(),
            *self.notes,
        ]

    def _provenance(self) -> list[str]:
        """Return what this plan rests on, in words."""
        measured = [given.name for given in self.inputs if given.source.startswith(_HERE)]
        assumed = [given.name for given in self.inputs if given.source.startswith(_ASSUMED)]
        nothing = "No GPU of this machine was measured." if self.device_bytes is not None else ""
        return [
            f"{_HERE.capitalize()}: {', '.join(measured) or 'nothing'}. {nothing}".rstrip(),
            f"{_ASSUMED.capitalize()}: {', '.join(assumed) or 'nothing'}.",
        ]


def plan_run(config: Config, nodes: int, gpus_per_node: int, gpu: str, known: KnownRates) -> Plan:
    """Plan a pre-training.

    Args:
        config: its recipe.
        nodes: number of machines.
        gpus_per_node: ranks on each of them.
        gpu: a name of `devices.NAMES`.
        known: replaces assumptions and measurements.

    Raises:
        ConfigError: if the recipe cannot be planned.
        ShardError, StorageError: from reading data.url.
        ClusterError: if steps cannot be measured.
    """
    if config.task is not None:
        what, found = "Only pre-training can be planned", "it has a section [task]"
        raise ConfigError(what, "the recipe", found, "give a recipe of pre-training")
    world_size = nodes * gpus_per_node
    check_world_size(config, world_size, key="--nodes x --gpus-per-node")
    least = min(config.cluster.min_workers, world_size)
    ranks = {"use_gpu": gpu != devices.CPU, "num_workers": world_size, "min_workers": least}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=ranks)})
    return _Planner(config, nodes, gpus_per_node, gpu, known).plan()


class _Planner:
    """Collects the numbers of a plan one by one, and lists them."""

    def __init__(
        self, config: Config, nodes: int, gpus_per_node: int, gpu: str, known: KnownRates
    ) -> None:
        self._config, self._known, self._gpu = config, known, gpu
        self._nodes, self._ranks, self._world_size = nodes, gpus_per_node, nodes * gpus_per_node
        self._on_gpu = gpu != devices.CPU
        self._device = devices.find_device(gpu) if self._on_gpu else None
        self._accumulation = check_world_size(config, self._world_size)
        self._objective = build_objective(config)
        self._inputs: list[Input] = []
        self._notes: list[str] = []

    def _add(self, name: str, value: float | None, unit: str, source: str) -> None:
        self._inputs.append(Input(name, value, unit, source))

    def plan(self) -> Plan:
        """Return the plan."""
        config, batch = self._config, self._config.train.global_batch_size
        self._add("global batch", batch, "clips", "recipe: train.global_batch_size")
        found = None
        if any(config.data.urls):
            log.info("Measuring how fast %s is read and decoded ...", ", ".join(config.data.urls))
            found = measure_data(config, self._on_gpu)
        learned, context = self._objective, StepContext(torch.device("cpu"), 0)
        inputs = learned.inputs(noise_batch(config, 1), slice(0, 1), context)
        model = memory.count_model(
            learned.build, lambda network: learned.loss(network, *inputs), config.train
        )
        step = None if self._on_gpu else self._measure_steps()
        throughput = limits.throughput(self._costs(model, step, found))
        total = self._total_steps(found)
        self._add_sources(found, total)
        micro = batch // self._world_size // self._accumulation
        ring = prefetch_bytes(config.data, batch // self._world_size)
        by_stage = rank_bytes_by_stage(model, self._world_size, micro, ring, self._on_gpu)
        rate = throughput.clips_per_second
        return Plan(
            gpu=self._gpu,
            nodes=self._nodes,
            gpus_per_node=self._ranks,
            world_size=self._world_size,
            clips_per_second=rate,
            bound_by=throughput.bound_by,
            step_seconds=batch / rate,
            total_steps=total,
            hours=None if total is None else total * batch / rate / 3600,
            alone=throughput.alone,
            zero_stage=config.train.zero_stage,
            bytes_per_rank=by_stage,
            standing_bytes=step.standing_bytes if step else None,
            device_bytes=self._device_bytes(by_stage[config.train.zero_stage]),
            inputs=self._inputs,
            notes=self._notes,
        )

    # ---- data ----

    def _total_steps(self, found: DataCost | None) -> int | None:
        samples, source = self._known.samples, _GIVEN
        if samples is None and found:
            samples, source = (
                found.manifest.num_samples,
                f"manifest of {'all data.sources' if self._config.data.sources else 'data.url'}",
            )
        source = source if samples else "neither data.url nor --samples"
        self._add("samples", samples, "", source)
        train = self._config.train
        if samples is None:
            return train.max_steps or None
        self._add("epochs", train.epochs, "", "recipe: train.epochs")
        if train.max_steps:
            self._add("most steps", train.max_steps, "", "recipe: train.max_steps")
        return train.total_steps(samples // self._config.samples_per_step)

    def _add_sources(self, found: DataCost | None, total_steps: int | None) -> None:
        """List how often the run shows the samples of each source of a mixture."""
        if found is None or total_steps is None or not self._config.data.is_mixture:
            return
        order = RunOrder(self._config, found.manifest)
        used = total_steps * self._config.samples_per_step
        for source, share, count in zip(
            self._config.data.sources, order.shares.shares, order.samples_of_groups, strict=True
        ):
            text = f"{100 * share:.4g} % of all samples, by its weight; it has {count}"
            self._add(f"epochs of {source.label}", used * share / count, "", text)

    def _decode_cpu_seconds(self, found: DataCost | None) -> float | None:
        """Return the CPU seconds of a clip; None if it is decoded on the GPU, or unknown."""
        rate, backend = None, self._config.decode.backend
        if self._known.decode_rate is not None:
            rate, source = self._known.decode_rate, _GIVEN
        elif capabilities(backend).decodes_on == "device" and self._on_gpu:
            source = f"decode.backend = {backend}: the GPU's decoding units"
            self._notes.append("The rate of the GPU's decoding units was not measured: no bound.")
        elif found is not None:
            source = f"{_HERE}, from data.url (profile {found.manifest.profile}) to ready batches"
            rate = 1 / found.cpu_seconds
        elif not self._on_gpu:
            source = "no data.url"
            self._notes.append("No data.url: decode cost unknown, the rate is an upper bound.")
        else:
            rate = devices.MEASURED_DECODE_RATE
            source = f"{_ASSUMED}: docs/benchmarks.md, another machine's CPU, profile train"
        self._add("clips decoded", rate, "per CPU-second", source)
        return None if rate is None else 1 / rate

    def _storage(self, found: DataCost | None) -> tuple[float | None, float | None]:
        """Return the bytes read for a clip, and bytes per second that a node reads."""
        clip = found.clip_bytes * self._read_ahead(found) if found else None
        rate, source = self._known.storage_rate, _GIVEN
        if rate is None and found is not None:
            rate, source = found.storage_rate / 1e6, f"{_HERE}; assumed for every node"
        self._add("read for a clip", clip, "bytes", "manifest" if found else "no data.url")
        source = source if rate else "unknown: no bound"
        self._add("storage, of a node", rate, "MB/s", source)
        return clip, rate * 1e6 if rate else None

    def _read_ahead(self, found: DataCost) -> int:
        """Return how often each byte is read, which depends on the memory of a node."""
        world = World(0, 0, self._world_size, self._ranks)
        reads = plan_reads(self._config, found.manifest, world)
        self._add("read ahead, of a rank", reads.needed / 2**20, "MiB", "data.shuffle_block, lanes")
        if self._on_gpu and not self._config.data.read_ahead_bytes:
            return 1  # a quarter of a node's memory, which is not known here
        if reads.passes > 1:
            room = reads.limit >> 20
            self._notes.append(
                f"Each byte is read {reads.passes} times: a rank may keep {room} MiB of samples. "
                "Give it more memory (data.read_ahead_bytes), or set a smaller data.shuffle_block."
            )
        return reads.passes

    # ---- computation ----

    def _measure_steps(self) -> StepCost:
        log.info("Measuring training steps on %d ranks of this machine ...", self._ranks)
        engine = functools.partial(open_engine, self._objective)
        cost = measure_steps(self._config, self._ranks, self._world_size, engine)
        source = f"{_HERE}, {self._ranks} ranks at once, {cost.threads} threads each"
        micro = f"micro batch of {cost.clips}, forward and back"
        self._add(micro, cost.micro_seconds, "s", source)
        self._add("micro batches of a step", self._accumulation, "", "recipe and ranks")
        self._add("update of the weights", cost.update_seconds, "s", source)
        self._add("cores busy, of a rank", cost.cpu_seconds, "", source)
        if cost.slowdown is not None:
            self._add("a step beside the loader", cost.slowdown, "times as long", source)
        return cost

    def _costs(self, model: ModelBytes, step: StepCost | None, found: DataCost | None) -> Costs:
        config, batch = self._config, self._config.train.global_batch_size
        per_rank = batch // self._world_size
        slowdown: float | None = None
        if step is not None:
            step_seconds = step.step_seconds(self._accumulation)
            cpu_seconds = step_seconds * step.cpu_seconds / per_rank
            if self._known.decode_rate is None and self._known.cores is None:  # as measured
                slowdown = step.slowdown
            host_seconds = 0.0
        else:
            step_seconds, cpu_seconds = self._gpu_step_seconds(per_rank), 0.0
            host_seconds = self._host_seconds(per_rank)
        cores = self._cores()
        decoders = config.data.decode_workers or config.data.decode_threads
        key = "data.decode_workers" if config.data.decode_workers else "data.decode_threads"
        self._add("decoding at a time, of a rank", decoders, "", f"recipe: {key}")
        clip_bytes, storage_rate = self._storage(found)
        return Costs(
            nodes=self._nodes,
            clips=batch,
            step_seconds=step_seconds,
            network_seconds=self._network_seconds(model, max(step_seconds, host_seconds)),
            compute_cpu_seconds=cpu_seconds,
            decode_cpu_seconds=self._decode_cpu_seconds(found),
            decoders=decoders * self._ranks,
            # A GPU's rank keeps a core busy with launching kernels.
            cores=max(1, cores - self._ranks) if self._on_gpu else cores,
            host_seconds=host_seconds,
            slowdown=slowdown,
            clip_bytes=clip_bytes,
            storage_rate=storage_rate,
        )

    def _gpu_step_seconds(self, clips: int) -> float:
        """Return the seconds of a step of that many clips on a rank."""
        assert self._device is not None
        dtype = self._config.train.dtype
        peak = flops.peak_rate(self._device.cuda_name, dtype)
        if peak is None:
            found = f"{self._gpu} in train.dtype = {dtype}"
            do = "give another --gpu, or another train.dtype"
            raise ConfigError("Unknown peak rate", "--gpu", found, do)
        work = float(self._objective.flops_per_clip)
        if self._config.train.activation_checkpointing:
            work *= _RECOMPUTED
        mfu, source = self._known.mfu, _GIVEN
        if mfu is None:
            mfu, source = self._usual_mfu()
        self._add("work of a clip", work / 1e9, "GFLOP", "counted from the recipe's model")
        self._add(f"peak rate in {dtype}", peak / 1e12, "TFLOP/s", "NVIDIA's data sheet")
        self._add("share of it that is reached (MFU)", mfu, "", source)
        return clips * work / (mfu * peak)

    def _usual_mfu(self) -> tuple[float, str]:
        """Return a GPU's share of its peak rate where none is given, and its source."""
        if self._config.train.compile:
            return devices.ASSUMED_COMPILED_MFU, f"{_ASSUMED}, measured nowhere: give --mfu"
        return devices.MEASURED_MFU, f"{_ASSUMED}; measured with {devices.MEASURED_WITH}"

    def _host_seconds(self, clips: int) -> float:
        """Return the seconds in which a GPU's host launches a step of that many clips."""
        if self._known.host_ms is not None:
            self._add("host, of a step", self._known.host_ms, "ms", _GIVEN)
            return self._known.host_ms / 1e3
        log.info("Measuring the host's share of a step on this machine ...")
        narrow = narrow_recipe(self._config)
        learned, context = build_objective(narrow), StepContext(torch.device("cpu"), 0)
        inputs = learned.inputs(noise_batch(narrow, 1), slice(0, 1), context)
        with torch.random.fork_rng(devices=[]):
            model = learned.build()
        cost = measure_host(model, lambda network: learned.loss(network, *inputs))
        launch, launches = devices.LAUNCH_SECONDS, float(cost.operations)
        self._add("operations of a micro batch", launches, "", "counted, forward and backward pass")
        micro = cost.seconds
        self._add("host, of a micro batch", micro * 1e3, "ms", f"{_HERE}, without launches")
        if self._config.train.compile:
            blocks = sum(isinstance(part, CheckpointedBlock) for part in model.modules())
            launches /= devices.OPERATIONS_PER_COMPILED_KERNEL
            source = f"{_ASSUMED}: torch.compile fuses operations"
            if self._config.train.compile_mode == "reduce-overhead":
                launches, source = devices.GRAPHS_OF_A_BLOCK * blocks, f"{_ASSUMED}: CUDA graphs"
            self._add("launches of a micro batch", launches, "", source)
            micro = blocks * devices.COMPILED_BLOCK_SECONDS
            source = "Python around compiled blocks, `svfap bench step` on a CPU"
            self._add("host, of a compiled micro batch", micro * 1e3, "ms", source)
        source = f"{_ASSUMED}; measured on an H200's host, including torch's profiler"
        self._add("launch of a kernel", launch * 1e6, "microseconds", source)
        bench = "`svfap bench step` on a CPU"
        self._add("operations of an update", devices.UPDATE_OPERATIONS, "", f"counted by {bench}")
        update = devices.UPDATE_OPERATIONS * (cost.seconds / cost.operations + launch)
        loader = devices.LOADER_SECONDS
        self._add("loader, of the training thread, per clip", loader * 1e6, "microseconds", bench)
        source = "the engine reads results one step late, while the GPU has work"
        self._add("waits for the GPU, of a step", 0, "", source)
        return self._accumulation * (micro + launches * launch) + update + clips * loader

    def _cores(self) -> int:
        """Return the cores of a node."""
        cores, source = self._known.cores, _GIVEN
        if cores is None and self._on_gpu:
            cores = self._config.cluster.cpus_per_worker * self._ranks
            source = "recipe: cluster.cpus_per_worker x --gpus-per-node"
        elif cores is None:
            cores, source = usable_cpus(), "this machine"
        self._add("cores, of a node", cores, "", source)
        return cores

    # ---- network and memory ----

    def _network_seconds(self, model: ModelBytes, step_seconds: float) -> float:
        """Return a step's seconds on the slowest link; 0 where the measured step includes them."""
        if self._world_size == 1 or (self._nodes == 1 and not self._on_gpu):
            return 0.0
        stage, accumulation = self._config.train.zero_stage, self._accumulation
        sent = limits.bytes_sent(model, self._world_size, stage, accumulation)
        source = "counted; a ring of all ranks"
        self._add("gradients sent by a rank in a step", sent.reduced / 1e6, "MB", source)
        self._add("weights sent by a rank in a step", sent.gathered / 1e6, "MB", source)
        rate = math.inf
        if self._device and self._ranks > 1:
            rate = self._device.link_rate
            self._add("link between GPUs of a node", rate / 1e9, "GB/s", self._device.source)
        if self._nodes > 1:
            # A ring enters and leaves each node once; several rings use all its network cards.
            rate = min(rate, self._node_network())
        if not self._on_gpu:  # the measured step has hidden what it can
            return (sent.reduced + sent.gathered) / rate
        exposed = limits.exposed_seconds(sent, rate, step_seconds, stage, accumulation)
        source = "computed: the backward pass hides the rest, if NCCL leaves it the GPU"
        self._add("waiting for the network, of a step", exposed * 1e3, "ms", source)
        return exposed

    def _node_network(self) -> float:
        """Return the bytes per second out of a node."""
        if self._known.network_gbps is not None:
            rate, source = self._known.network_gbps * 1e9 / 8, _GIVEN
        elif self._device:
            rate, source = self._device.network_rate * self._ranks, self._device.source
        else:
            rate, source = devices.CPU_NETWORK_RATE, f"{_ASSUMED}: 10 Gbit/s"
        self._add("network, of a node", rate / 1e9, "GB/s", source)
        return rate

    def _device_bytes(self, needed: RankBytes) -> float | None:
        """Return the memory of a rank's GPU; add a note if the run does not fit."""
        if self._device is None:
            return None
        room = self._device.memory_bytes
        self._add("memory of the device", room / 2**30, "GiB", self._device.source)
        if needed.total > room:
            self._notes.append(
                "This does not fit into the device: lower train.micro_batch_size, or set "
                "train.activation_checkpointing=true."
            )
        return room
