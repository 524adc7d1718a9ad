"""`svfap bench metrics`: what recording a run costs a step.

The recorder of a run (meter, journal, /metrics, goodput) gets the steps of a log period, then a
real training step of the same batch runs, and then /metrics is scraped; so in turns, in one process
and on one thread, by CPU time, and medians count. The share is the additional cost of a step,
scrapes included. A GPU's step is shorter than a CPU's: compare it with `recorder_seconds`, the CPU
time of the host per step.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
import urllib.request

import torch

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.bench.steps import StepSpec, TrainingStep, bench_recipe
from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.profiling.step import noise_batch
from svfap_dist.profiling.timing import seconds_of, take_turns
from svfap_dist.telemetry.meter import Phases
from svfap_dist.telemetry.recorder import Recorder

_SCRAPE_INTERVAL = 5.0  # seconds, as in monitoring/prometheus/prometheus.yml
_PHASES = ("forward", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class RecordingCost:
    """Costs for one model size: CPU seconds of a step, of recording it, and of one scrape."""

    size: str
    batch_size: int
    log_every: int
    step_seconds: float
    recorder_seconds: float
    scrape_seconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class MetricsBench:
    """Costs of all sizes."""

    costs: tuple[RecordingCost, ...]

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        return [
            f"{cost.size:6} batch {cost.batch_size}: a step takes {cost.step_seconds:.3f} CPU "
            f"seconds, recording it {cost.recorder_seconds * 1e6:.0f} us, a scrape every "
            f"{_SCRAPE_INTERVAL:g} s {cost.scrape_seconds * 1e3:.1f} ms: {cost.share:.3%}"
            for cost in self.costs
        ]


def run(sizes: tuple[str, ...], batch_size: int = 8, rounds: int = 7) -> MetricsBench:
    """Measure each of the model's sizes in turn.

    Args:
        sizes: of the model.
        batch_size: clips of a step.
        rounds: that are timed.

    Raises:
        ConfigError: for an unknown size.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that CPU time is what the step waits for
    keep_freed_memory()
    try:
        return MetricsBench(tuple(_measure(size, batch_size, rounds) for size in sizes))
    finally:
        torch.set_num_threads(threads)


def _measure(size: str, batch_size: int, rounds: int) -> RecordingCost:
    training = TrainingStep(StepSpec(size, batch_size, "float32", "cpu"))
    with tempfile.TemporaryDirectory(prefix="svfap-bench-") as folder:
        config = bench_recipe(size, batch_size, run={"url": folder})
        recording = _Recording(config)
        actions = {"period": recording.period, "step": training.run, "scrape": recording.scrape}
        turns = {
            name: lambda _, action=action: seconds_of(action, time.process_time)
            for name, action in actions.items()
        }
        with recording.recorder:
            found = take_turns(turns, rounds, warm_up=1, title=f"Rounds, {size}")
    seconds = {name: statistics.median(values) for name, values in found.items()}
    log_every = config.train.log_every
    recorder = seconds["period"] / log_every
    share = recorder / seconds["step"] + seconds["scrape"] / _SCRAPE_INTERVAL
    return RecordingCost(
        size, batch_size, log_every, seconds["step"], recorder, seconds["scrape"], share
    )


class _Recording:
    """A run of which only the recording is real."""

    def __init__(self, config: Config) -> None:
        self._config, self._step = config, 0
        self._addresses: list[str] = []
        self._phases = Phases(torch.device("cpu"))
        self.recorder = Recorder(
            config,
            World(0, 0, 1, 1),
            1,
            0,
            lambda row: None,
            self._addresses.extend,
            (10**9, 10**3),
            1e12,
        )
        self.recorder.record_start(0, 10**9, "bench", versions={})
        self.recorder.record_ready()
        batch = noise_batch(config, config.train.global_batch_size)
        batch = dataclasses.replace(batch, fetch_seconds=0.1, decode_seconds=0.1, batches_ready=2)
        self._batches = self.recorder.meter.waiting(itertools.repeat(batch))

    def period(self) -> None:
        """Record the steps from one log step to the next."""
        for _ in range(self._config.train.log_every):
            batch = next(self._batches)
            for phase in _PHASES:
                with self._phases.measured(phase):
                    pass
            self._step += 1
            self.recorder.count_step(self._step, batch)
        numbers = {"step": self._step, "total_steps": 10**9, "epoch": 0}
        losses = {"loss": 0.5, "lr": 1e-3, "grad_norm": 1.0}
        self.recorder.log_step({**numbers, **losses}, self._phases.take_seconds())

    def scrape(self) -> None:
        """Request /metrics as Prometheus does; the request itself counts, too."""
        with urllib.request.urlopen(f"http://{self._addresses[0]}/metrics") as answer:
            answer.read()
