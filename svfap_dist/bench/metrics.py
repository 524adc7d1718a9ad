"""`svfap bench metrics`: what recording a run costs a step.

The recorder of a run (meter, journal, numbers at /metrics, goodput) is given the steps of a log
period, then a real training step of the same batch is taken, and Prometheus' scrape is asked for;
so in turns, in one process and on one thread, by CPU time, medians counting. The share is what a
step costs more than one of which nothing is recorded, scrapes included. A GPU's step is shorter
than a CPU's: `recorder_seconds` is what its host spends on each, to be held against it.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable

import torch

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.bench.steps import Spec, TrainingStep, token_splits
from svfap_dist.config import Config, recipe
from svfap_dist.data.clips import ClipBatch
from svfap_dist.distributed import World
from svfap_dist.model.sizes import resolve
from svfap_dist.progress import Progress
from svfap_dist.telemetry.phases import Phases
from svfap_dist.telemetry.recorder import Recorder

_SCRAPE_EVERY = 5.0  # seconds, as in monitoring/prometheus/prometheus.yml
_PHASES = ("forward", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class Cost:
    """For one size; CPU seconds of a step, of what is recorded of it, and of one scrape."""

    size: str
    batch_size: int
    log_every: int
    step_seconds: float
    recorder_seconds: float
    scrape_seconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class MetricsBench:
    """What came out, by size."""

    costs: tuple[Cost, ...]

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{cost.size:6} batch {cost.batch_size}: a step takes {cost.step_seconds:.3f} CPU "
            f"seconds, recording it {cost.recorder_seconds * 1e6:.0f} us, a scrape every "
            f"{_SCRAPE_EVERY:g} s {cost.scrape_seconds * 1e3:.1f} ms: {cost.share:.3%}"
            for cost in self.costs
        ]


def run(sizes: tuple[str, ...], batch_size: int = 8, rounds: int = 7) -> MetricsBench:
    """Measure each of the model's sizes in turn.

    Raises: ConfigError for a size that there is not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that CPU time is what the step waits for
    keep_freed_memory()
    try:
        return MetricsBench(tuple(_cost(size, batch_size, rounds) for size in sizes))
    finally:
        torch.set_num_threads(threads)


def _cost(size: str, batch_size: int, rounds: int) -> Cost:
    training = TrainingStep(Spec(size, "tpsbt", batch_size, "float32", "cpu"))
    training.run()
    with tempfile.TemporaryDirectory(prefix="svfap-bench-") as folder:
        config = _recipe(size, batch_size, folder)
        recording = _Recording(config, size)
        with recording.recorder, Progress(f"Rounds, {size}", rounds) as progress:
            recording.period()
            steps, periods, scrapes = [], [], []
            for number in range(1, rounds + 1):
                periods.append(_cpu_seconds(recording.period))
                steps.append(_cpu_seconds(training.run))
                scrapes.append(_cpu_seconds(recording.scrape))
                progress.update(number)
    step, scrape = statistics.median(steps), statistics.median(scrapes)
    log_every = config.train.log_every
    recorder = statistics.median(periods) / log_every
    share = recorder / step + scrape / _SCRAPE_EVERY
    return Cost(size, batch_size, log_every, step, recorder, scrape, share)


def _recipe(size: str, batch_size: int, folder: str) -> Config:
    tables = {
        "run": {"url": folder},
        "data": {"num_lanes": 1},
        "model": {"size": size},
        "train": {"global_batch_size": batch_size, "micro_batch_size": batch_size},
    }
    return recipe.from_tables(tables, where="bench metrics")


class _Recording:
    """A run of which only the recording is real."""

    def __init__(self, config: Config, size: str) -> None:
        self._config, self._step = config, 0
        self._addresses: list[str] = []
        self._batch = _batch(config.train.global_batch_size, size)
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
        self.recorder.begin(0, 10**9, "bench", versions={})
        self.recorder.ready()
        self._batches = self.recorder.meter.waiting(itertools.repeat(self._batch))

    def period(self) -> None:
        """All that is recorded of the steps from one log step to the next."""
        for _ in range(self._config.train.log_every):
            batch = next(self._batches)
            for phase in _PHASES:
                with self._phases.measured(phase):
                    pass
            self._step += 1
            self.recorder.count(self._step, 0, batch)
        numbers = {"step": self._step, "total_steps": 10**9, "epoch": 0}
        losses = {"loss": 0.5, "lr": 1e-3, "grad_norm": 1.0}
        self.recorder.log({**numbers, **losses}, self._phases.taken())

    def scrape(self) -> None:
        """What Prometheus asks for; the asking is counted, too."""
        with urllib.request.urlopen(f"http://{self._addresses[0]}/metrics") as answer:
            answer.read()


def _batch(clips: int, size: str) -> ClipBatch:
    """A batch whose frames nobody looks at."""
    visible, masked = token_splits(resolve(size, {}), clips)
    return ClipBatch(
        frames=torch.empty(clips, 0),
        visible=visible,
        masked=masked,
        keys=[f"id{number:05d}/clip{number:05d}" for number in range(clips)],
        samples=list(range(clips)),
        lanes=[0] * clips,
        positions=list(range(clips)),
        substituted=[False] * clips,
        bad=[],
        fetch_seconds=0.1,
        decode_seconds=0.1,
        bytes_fetched=10**6,
        batches_ready=2,
    )


def _cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began
