"""`svfap bench step`: a training step by the engine itself, on batches of YUV planes.

Two networks are measured, each in a new process. The host's share of a step comes from a network as
deep as `base` but only a few numbers wide, on small clips: computing takes little time there, so
that what remains is Python, PyTorch, DeepSpeed and, on a GPU, launches. Its operations and waits
are counted, too; both are the same for any width. The device's share comes from the size in
question, on a GPU or if a size is given. What the loader costs its rank, and the bytes on the way
from planes to patches, are measured, too.

Phases are timed one by one, repeating the same work, except for the backward pass, which is the
step less all other phases.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from svfap_dist.bench import clip_sets
from svfap_dist.bench.steps import bench_recipe, check_device
from svfap_dist.config import Config
from svfap_dist.data.batch import ClipBatch
from svfap_dist.distributed import World
from svfap_dist.model import flops
from svfap_dist.profiling.host import NARROW
from svfap_dist.profiling.loader import LoaderRun, measure_rank_cost
from svfap_dist.profiling.operations import counted
from svfap_dist.profiling.ranks import run_on_local_ranks
from svfap_dist.profiling.step import noise_batch
from svfap_dist.profiling.traffic import kernel_bytes
from svfap_dist.text_table import format_table
from svfap_dist.train.engine import Engine, StepContext, open_engine
from svfap_dist.train.health import Health, StepVote
from svfap_dist.train.objective import build_objective
from svfap_dist.video.frames import YuvClips

log = logging.getLogger(__name__)

_SMALL_CLIPS: dict[str, object] = {"frame_size": 64}
# Fewer pixels still, since a CPU computes them, and slowly in bfloat16: 16 patches of 4 x 4.
_TINY_CLIPS: dict[str, object] = {"frame_size": 16}
_TINY_PATCHES: dict[str, object] = {"patch_size": 4}
_LEARNING_RATE = 1e-6
_WARM_UP = 3
_PHASE_REPEATS = 5
_TRACED_STEPS = 3
# As on a machine with a GPU: CPU time is measured, so there may be more workers than cores.
_LOADER_CLIPS, _LOADER_BATCHES, _LOADER_WORKERS = 64, 40, 8
_COMPUTED = ("clips_per_second", "device_ms", "idle_share", "mfu", "launches", "peak_bytes")


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """A way to take steps."""

    size: str  # "": only the host's share
    micro_batch: int  # clips
    zero_stage: int
    compile: str  # "off" or a mode of torch.compile
    dtype: str
    device: str
    steps: int  # that are timed
    trace: str = ""  # file for a trace of the first row

    def config(self, **sections: dict[str, object]) -> Config:
        """Return the recipe of a single rank.

        Args:
            sections: replaced keys by section.
        """
        on_gpu = self.device == "cuda"
        train: dict[str, object] = {"zero_stage": self.zero_stage, "dtype": self.dtype}
        if self.compile != "off":
            train |= {"compile": True, "compile_mode": self.compile}
        return bench_recipe(
            self.size or "base",
            self.micro_batch,
            **{
                **sections,
                "train": train | sections.get("train", {}),
                "cluster": {"use_gpu": on_gpu, "num_workers": 1},
            },
        )


@dataclasses.dataclass(frozen=True)
class StepRow:
    """Figures of one way; milliseconds are medians of steps.

    Args:
        host_ms: CPU time of the threads that launch a step, in the narrow network.
        host_phases_ms: the same by phase.
        operations, update_operations: that would be kernels, of a whole step and of the update
            with the vote before it; not counted in compiled code.
        device_waits: times that the host waits for the device.
        step_ms: wall time, of `size`.
        device_ms: time in which the GPU is busy.
        phases_ms: by phase, on the device's clock.
        launches: kernels and copies of a step that the profiler saw.
    """

    micro_batch: int
    zero_stage: int
    compile: str
    host_ms: float
    host_phases_ms: dict[str, float]
    operations: int
    update_operations: int
    device_waits: int
    step_ms: float | None = None
    clips_per_second: float | None = None
    phases_ms: dict[str, float] | None = None
    device_ms: float | None = None
    idle_share: float | None = None
    mfu: float | None = None
    launches: int | None = None
    peak_bytes: int | None = None


class _Steps:
    """An engine with one batch of noise, which takes steps as `train.loop` does."""

    def __init__(self, config: Config, engine: Engine, planes: bool) -> None:
        self.engine, self.device = engine, engine.device
        self.batch = _pinned(noise_batch(config, config.train.global_batch_size, planes))
        self._health = Health(config.health, config.data.max_bad_fraction)
        self._done = 0

    def backward(self) -> None:
        self.loss = self.engine.backward(self.batch, self._done)

    def update(self) -> None:
        self._done += 1
        counts = StepVote().counts(len(self.batch.keys), 0)
        update = self.engine.update(_LEARNING_RATE, counts)
        self._health.add(self._done, lambda: self.batch.keys, update)
        self._health.decide(up_to_now=False)

    def step(self) -> None:
        self.backward()
        self.update()


def _pinned(batch: ClipBatch) -> ClipBatch:
    """Return the batch in pinned memory, where there is a GPU."""
    frames = batch.frames
    if isinstance(frames, Tensor) or not torch.cuda.is_available():
        return batch
    pinned = {name: tensor.pin_memory() for name, tensor in _planes(frames).items()}
    return dataclasses.replace(
        batch,
        frames=dataclasses.replace(frames, **pinned),
        visible=batch.visible.pin_memory(),
        masked=batch.masked.pin_memory(),
    )


def _planes(frames: YuvClips) -> dict[str, Tensor]:
    return {name: value for name, value in vars(frames).items() if isinstance(value, Tensor)}


def _measure_host(spec: StepSpec, world: World) -> dict[str, Any]:
    """Return the host's fields of `StepRow`."""
    model, clips = NARROW, _SMALL_CLIPS
    if spec.device == "cpu":
        torch.backends.mkldnn.enabled = False  # oneDNN prepares each small product at length
        model, clips = NARROW | _TINY_PATCHES, _TINY_CLIPS
    config = spec.config(model=model, data=clips, train={"threads_per_rank": 1})
    with open_engine(build_objective(config), config, world) as engine:
        # A CPU converts planes with NumPy, unlike a GPU: that would not be the host's share.
        steps = _Steps(config, engine, planes=engine.device.type == "cuda")
        for _ in range(_WARM_UP):
            steps.step()
        clock = _host_clock(steps.device)
        parts = [_host_parts(steps, clock) for _ in range(spec.steps)]
        backward, update = (statistics.median(column) * 1e3 for column in zip(*parts, strict=True))
        host_ms = statistics.median(map(sum, parts)) * 1e3
        with counted(steps.device) as all_:
            steps.backward()
            with counted(steps.device) as of_update:
                steps.update()
    return {
        "host_ms": host_ms,
        "host_phases_ms": {"backward": backward, "update": update},
        "operations": all_.launched.total(),
        "update_operations": of_update.launched.total(),
        "device_waits": all_.waits.total(),
    }


def _host_parts(steps: _Steps, clock: Callable[[], float]) -> tuple[float, float]:
    """Return CPU seconds of a step's forward and backward pass, and of its vote and update."""
    began = clock()
    steps.backward()
    between = clock()
    steps.update()
    return between - began, clock() - between


def _host_clock(device: torch.device) -> Callable[[], float]:
    """Return a clock of the threads that launch work: this one, and autograd's of a GPU."""
    threads = {threading.get_ident()}
    probe = torch.ones((), device=device, requires_grad=True) * 1
    probe.register_hook(lambda _: threads.add(threading.get_ident()))
    probe.backward()
    clocks = [time.pthread_getcpuclockid(thread) for thread in threads]
    return lambda: sum(map(time.clock_gettime, clocks))


def _measure_device(spec: StepSpec, world: World) -> dict[str, Any]:
    """Return the device's fields of `StepRow`."""
    config = spec.config()
    objective = build_objective(config)
    with open_engine(objective, config, world) as engine:
        steps = _Steps(config, engine, planes=True)
        for _ in range(_WARM_UP):
            steps.step()
        on_gpu = steps.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = _device_seconds(steps.step, spec.steps, steps.device)
        # Read before the phases are timed, which keeps more memory than a step.
        peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
        phases = _phase_seconds(steps, spec.compile != "off")
        row: dict[str, Any] = {
            "step_ms": seconds * 1e3,
            "clips_per_second": spec.micro_batch / seconds,
            "phases_ms": {name: s * 1e3 for name, s in phases.items()},
        }
        if on_gpu:
            row["peak_bytes"] = peak_bytes
            peak = flops.peak_rate(torch.cuda.get_device_name(), spec.dtype)
            work = objective.flops_per_clip * spec.micro_batch
            row["mfu"] = work / seconds / peak if peak else None
        return row | _profile(steps, spec.trace, seconds)


def _device_seconds(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median of seconds from one call to the next, on the device's clock."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(repeats):
            action()
            times.append(time.perf_counter())
        return statistics.median(after - before for before, after in itertools.pairwise(times))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(marks)
    return statistics.median(before.elapsed_time(after) for before, after in pairs) / 1e3


def _phase_seconds(steps: _Steps, is_compiled: bool) -> dict[str, float]:
    """Return seconds of each phase of a step; the sum is that of forward, backward and update."""
    engine, batch, device = steps.engine, steps.batch, steps.device
    objective, whole = engine.objective, slice(0, len(batch.frames))
    context = StepContext(device, 0, 0)
    measure = functools.partial(_device_seconds, repeats=_PHASE_REPEATS, device=device)
    assert isinstance(batch.frames, YuvClips)
    on_host = list(_planes(batch.frames).values())
    copy = measure(lambda: [t.to(device, non_blocking=True) for t in on_host])
    inputs = measure(lambda: objective.inputs(batch, whole, context))
    tensors = objective.inputs(batch, whole, context)
    kept: list[Tensor] = []

    def network(*arguments: Tensor) -> Tensor:
        if is_compiled:  # CUDA graphs are replayed if no pass before this one is pending
            torch.compiler.cudagraph_mark_step_begin()
        kept[:] = [engine.network(*arguments)]
        return kept[0]

    forward = measure(lambda: objective.loss(network, *tensors))
    output = kept[0].detach().requires_grad_()
    loss = measure(lambda: objective.loss(lambda *_: output, *tensors))
    update: list[float] = []
    for _ in range(_PHASE_REPEATS):
        steps.backward()
        update.append(_device_seconds(steps.update, 1, device))
    backward = measure(steps.step)  # all of it
    phases = {
        "h2d": copy,
        "conversion": max(inputs - copy, 0.0),
        "forward": max(forward - loss, 0.0),
        "loss": loss,
        "update": statistics.median(update),
    }
    return phases | {"backward": max(backward - sum(phases.values()), 0.0)}


def _profile(steps: _Steps, trace: str, seconds: float) -> dict[str, Any]:
    """Return what torch's profiler sees of the device, and write its trace."""
    on_gpu = steps.device.type == "cuda"
    if not on_gpu and not trace:
        return {}
    with torch.profiler.profile(acc_events=True) as profile:
        for _ in range(_TRACED_STEPS):
            steps.step()
        if on_gpu:
            torch.cuda.synchronize()
    if trace:
        profile.export_chrome_trace(trace)
        log.info("Trace of %d steps: %s", _TRACED_STEPS, trace)
    if not on_gpu:
        return {}
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type == DeviceType.CUDA
    )
    busy = _union(spans) / 1e6 / _TRACED_STEPS
    return {
        "device_ms": busy * 1e3,
        "idle_share": max(1 - busy / seconds, 0.0),
        "launches": round(len(spans) / _TRACED_STEPS),
    }


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length that sorted intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


def _describe(way: StepSpec | StepRow) -> str:
    return f"{way.micro_batch} clips, stage {way.zero_stage}, compile {way.compile}"


def _measure_row(spec: StepSpec) -> StepRow:
    log.info("Measuring %s ...", _describe(spec))
    # The narrow network's share does not depend on size, micro batch and trace.
    narrow = dataclasses.replace(spec, size="base", micro_batch=1, trace="")
    figures = dict(_host_figures(narrow))
    if spec.size:
        figures |= _in_new_process(_measure_device, spec)
    row = StepRow(spec.micro_batch, spec.zero_stage, spec.compile, **figures)
    log.info("%s", _figures(row))  # kept even if a later row fails
    return row


@functools.cache
def _host_figures(spec: StepSpec) -> dict[str, Any]:
    return _in_new_process(_measure_host, spec)


def _in_new_process(
    measure: Callable[[StepSpec, World], dict[str, Any]], spec: StepSpec
) -> dict[str, Any]:
    (figures,) = run_on_local_ranks(functools.partial(measure, spec), 1)
    return figures


def _loader_run(url: str) -> LoaderRun:
    """Return a measurement of the loader that feeds a GPU."""
    data = {
        "feeders": 1,
        "decode_workers": _LOADER_WORKERS,
        "decode_threads": 2 * _LOADER_WORKERS,
        "colors": "device",
    }
    cluster = {"use_gpu": False, "num_workers": 1}
    config = bench_recipe("base", _LOADER_CLIPS, data=data, cluster=cluster)
    return LoaderRun(config, url, _LOADER_BATCHES, warm_up=_LOADER_BATCHES // 4)


@dataclasses.dataclass(frozen=True)
class StepBench:
    """All rows; the host's fields are the first row's.

    Args:
        loader_us_per_clip: CPU time of the training thread to take the next batch.
        rank_cpu_us_per_clip: CPU time of the rank's process in the same time, all threads.
        bytes_per_clip: read and written from planes to visible patches and targets, by the kernel
            that a GPU runs.
    """

    device: str
    dtype: str
    size: str
    torch: str
    host_ms: float
    update_operations: int
    device_waits: int
    loader_us_per_clip: float
    rank_cpu_us_per_clip: float
    bytes_per_clip: float
    device_ms: float | None
    mfu: float | None
    idle_share: float | None
    rows: tuple[StepRow, ...]

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        header = ["clips", "stage", "compile", "host ms", "operations", "update", "waits"]
        figures = [
            name for name in _COMPUTED if any(getattr(r, name) is not None for r in self.rows)
        ]
        table = [
            (
                str(row.micro_batch),
                str(row.zero_stage),
                row.compile,
                f"{row.host_ms:.1f}",
                *(str(n) for n in (row.operations, row.update_operations, row.device_waits)),
                *(_text(name, getattr(row, name)) for name in figures),
            )
            for row in self.rows
        ]
        header += [name.replace("_", " ") for name in figures]
        lines = [
            f"Training steps on {self.device}, {self.dtype}, torch {self.torch}. Host time is that "
            "of a narrow network of base's depth.",
            *format_table(table, header, right=range(len(header))),
        ]
        for row in self.rows:
            phases = row.phases_ms or row.host_phases_ms
            which = "" if row.phases_ms else " of the host"
            named = "  ".join(f"{name} {ms:.2f}" for name, ms in phases.items())
            lines.append(f"{_describe(row)}: ms{which}: {named}")
        return [
            *lines,
            f"Loader: {self.loader_us_per_clip:.1f} us per clip of the training thread, "
            f"{self.rank_cpu_us_per_clip:.1f} us of the rank's process.",
            f"Planes to patches and targets: {self.bytes_per_clip / 1e6:.2f} MB per clip.",
        ]


def _kernel_bytes(config: Config) -> float:
    """Return bytes that the kernel reads and writes for a clip."""
    batch, dtype = noise_batch(config, 1, planes=True), getattr(torch, config.train.dtype)
    assert isinstance(batch.frames, YuvClips)
    return float(kernel_bytes(batch.frames, batch.visible, batch.masked, config.model.patch, dtype))


def _figures(row: StepRow) -> str:
    """Return the figures of a row in one line."""
    known = [
        f"{name.replace('_', ' ')} {_text(name, getattr(row, name))}"
        for name in ("host_ms", "device_waits", "step_ms", *_COMPUTED)
        if getattr(row, name) is not None
    ]
    phases = [f"{name} {ms:.2f} ms" for name, ms in (row.phases_ms or {}).items()]
    return f"{_describe(row)}: {', '.join([*known, *phases])}"


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in ("idle_share", "mfu"):
        return f"{value:.1%}"
    return f"{value / 2**30:.2f} GiB" if name == "peak_bytes" else f"{value:.1f}"


def run(
    size: str = "",
    micro_batches: Sequence[int] = (),
    stages: Sequence[int] = (2,),
    compile: Sequence[str] = ("off",),
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    steps: int = 10,
    trace: str = "",
) -> StepBench:
    """Measure every combination of micro batch, stage and compilation.

    Args:
        size: of the model; empty: base on a GPU, the host's share alone on a CPU.
        micro_batches: clips of a step; empty: 32, 128 and 256 on a GPU, else 1.
        stages: of ZeRO.
        compile: modes of torch.compile, "off" for none.
        dtype: "bfloat16" or "float32".
        device: "cpu", "cuda", or "auto": the GPU if there is one.
        steps: that are timed.
        trace: file for a Chrome trace of a few steps of the first row; empty: none.

    Raises:
        ConfigError: for an unknown size, type or stage, or a missing device.
        ClusterError: a step fails, for lack of memory, say.
    """
    device = check_device(device, dtype)
    on_gpu = device == "cuda"
    size = size or ("base" if on_gpu or trace else "")
    micro_batches = micro_batches or ((32, 128, 256) if on_gpu else (1,))
    specs = [
        StepSpec(size, *combination, dtype, device, steps)
        for combination in itertools.product(micro_batches, stages, compile)
    ]
    for spec in specs:
        spec.config()  # fails early
    specs[0] = dataclasses.replace(specs[0], trace=trace)
    rows = tuple(map(_measure_row, specs))
    log.info("Measuring the loader ...")
    with tempfile.TemporaryDirectory(prefix="svfap-bench-") as folder:
        rank = measure_rank_cost(_loader_run(clip_sets.render(folder).train))
    first = rows[0]
    return StepBench(
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        dtype=dtype,
        size=size,
        torch=torch.__version__,
        host_ms=first.host_ms,
        update_operations=first.update_operations,
        device_waits=first.device_waits,
        loader_us_per_clip=rank.thread_us,
        rank_cpu_us_per_clip=rank.process_us,
        bytes_per_clip=_kernel_bytes(specs[0].config()),
        device_ms=first.device_ms,
        mfu=first.mfu,
        idle_share=first.idle_share,
        rows=rows,
    )
