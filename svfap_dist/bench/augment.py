"""`svfap bench augment`: fine-tuning's clips per second, augmented by workers and by the device.

Both get the same draws (`data.augment`). Alone, each augments the same clips again and again: a
decode worker's Pillow on one thread, and torch on the device, on a CPU on one thread, too. In the
loader, each makes batches from shards as fine-tuning does, in a process of its own, as far as
frames that are ready for the network; with a GPU, clips come as planes where the device augments,
if the shards have them. All take turns for several rounds. Where a CPU is measured, compare rates
per CPU-second: they hold on a shared machine, and count all processes.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.bench import clip_sets
from svfap_dist.bench.steps import check_device
from svfap_dist.config import Config, recipe
from svfap_dist.data.augment import augment
from svfap_dist.data.device_augment import augment_batch
from svfap_dist.data.loader import ClipLoader
from svfap_dist.distributed import World
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.profiling.loader import LoaderRun
from svfap_dist.profiling.timing import (
    Rate,
    call_in_new_process,
    repeat,
    take_turns,
    time_batches,
)
from svfap_dist.rng import Stream
from svfap_dist.shards import format as shard_format
from svfap_dist.text_table import format_table

_RECIPE = "finetune_dfew"
_REGION = "data.region=voxceleb2"  # as `bench data` has it
_HERE = ("cluster.num_workers=1", "data.num_lanes=8", "train.global_batch_size=16", _REGION)
_WARM_UP = 4  # batches
_SECONDS = 1.0  # for which augmentation alone is repeated in a round, at least


@dataclasses.dataclass(frozen=True)
class AugmentBench:
    """Clips per second of wall time, or of CPU time (`*_per_cpu_second`)."""

    url: str
    device: str  # that augments: "cpu" or a GPU's name
    workers: int  # processes that decode
    batch_size: int
    batches: int
    rounds: int
    alone_workers: float  # one thread of a decode worker
    alone_workers_per_cpu_second: float
    alone_device: float
    alone_device_per_cpu_second: float
    loader_workers: float  # from shards to augmented batches
    loader_workers_per_cpu_second: float
    loader_device: float
    loader_device_per_cpu_second: float

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        rows = [("", "run_on = workers", "run_on = device", "ratio")]
        for title, name in (("Augmentation alone", "alone"), ("Loader", "loader")):
            for unit, end in (("clips/s", ""), ("per CPU-second", "_per_cpu_second")):
                before, after = (
                    getattr(self, f"{name}_{place}{end}") for place in ("workers", "device")
                )
                ratio = f"{after / before:.2f}"
                rows.append((f"{title}, {unit}", f"{before:.1f}", f"{after:.1f}", ratio))
        return [
            f"{self.url}; device: {self.device}",
            f"{self.workers} decoding processes; {self.batches} batches of {self.batch_size} clips "
            f"in {self.rounds} rounds",
            *format_table(rows, right=(1, 2, 3)),
        ]


@dataclasses.dataclass(frozen=True)
class _TuningRun(LoaderRun):
    """A measurement of the loader and the augmentation of its batches."""

    device: str = "cpu"


def run(
    url: str = "",
    overrides: Sequence[str] = (),
    device: str = "auto",
    batches: int = 30,
    rounds: int = 3,
) -> AugmentBench:
    """Measure augmentation in both places.

    Args:
        url: Shards; empty: rendered ones, made for this.
        overrides: `key=value` of the recipe, finetune_dfew.
        device: auto, cpu or cuda.
        batches: Of each way, in all rounds together.
        rounds: In which they take turns.

    Raises:
        ConfigError, ShardError, StorageError: From recipe, device and shards.
    """
    device, cores = check_device(device, "float32"), usable_cpus()
    here = [
        f"data.decode_workers={cores}",
        f"data.decode_threads={2 * cores}",
        f"cluster.use_gpu={'true' if device == 'cuda' else 'false'}",
    ]
    config = recipe.load(_RECIPE, [*_HERE, *here, *overrides])
    per_round = -(-batches // rounds)
    with tempfile.TemporaryDirectory(prefix="svfap-bench-") as folder:
        if not url:
            clips = config.samples_per_step * (per_round + _WARM_UP)
            url = clip_sets.render(folder, clips).train
        return _measure(config, url, device, per_round, rounds)


def _measure(config: Config, url: str, device: str, batches: int, rounds: int) -> AugmentBench:
    """Measure that many batches in each round."""
    configs = {
        place: config.model_copy(
            update={"augment": config.augment.model_copy(update={"run_on": place})}
        )
        for place in ("workers", "device")
    }
    runs = {
        place: _TuningRun(one, url, batches, _WARM_UP, device) for place, one in configs.items()
    }
    results = take_turns(
        {
            "alone_workers": lambda _: call_in_new_process(_time_workers, config),
            "alone_device": lambda _: call_in_new_process(_time_device, runs["device"]),
            "loader_workers": lambda _: call_in_new_process(_time_loader, runs["workers"]),
            "loader_device": lambda _: call_in_new_process(_time_loader, runs["device"]),
        },
        rounds,
        title="Measuring",
    )
    rates = {name: Rate.combine(of_rounds) for name, of_rounds in results.items()}
    return AugmentBench(
        url=url,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        workers=config.data.decode_workers,
        batch_size=config.train.global_batch_size,
        batches=batches * rounds,
        rounds=rounds,
        **{name: rate.per_second for name, rate in rates.items()},
        **{f"{name}_per_cpu_second": rate.per_cpu_second for name, rate in rates.items()},
    )


def _clips(config: Config) -> np.ndarray:
    """Return a batch of noise, whose content does not matter."""
    data, size = config.data, config.data.frame_size
    shape = config.train.global_batch_size, data.num_frames, size, size, 3
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _streams(batch: int, clips: int) -> list[Stream]:
    return [Stream("bench", batch, clip) for clip in range(clips)]


def _time_workers(config: Config) -> Rate:
    clips, batch = _clips(config), 0

    def work() -> int:
        nonlocal batch
        for clip, stream in zip(clips, _streams(batch, len(clips)), strict=True):
            augment(clip, stream, config.augment)
        batch += 1
        return len(clips)

    keep_freed_memory()  # as decode workers do
    work()
    return repeat(work, _SECONDS, time.process_time)


def _time_device(run: _TuningRun) -> Rate:
    device, batch = torch.device(run.device), 0
    clips = torch.from_numpy(_clips(run.config)).to(device)

    def work() -> int:
        nonlocal batch
        augment_batch(clips, _streams(batch, len(clips)), run.config.augment)
        batch += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        return len(clips)

    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(1)
    work()
    return repeat(work, _SECONDS, time.process_time if device.type == "cpu" else time.perf_counter)


def _time_loader(run: _TuningRun) -> Rate:
    device, config = torch.device(run.device), run.config
    if device.type == "cpu":
        keep_freed_memory()
    loader = ClipLoader(config, run.url, shard_format.load_manifest(run.url), World(0, 0, 1, 1))

    def batches() -> Iterator[torch.Tensor]:
        for batch in loader.batches(0, run.warm_up + run.batches):
            frames = batch.frames_on(device, slice(None))
            if streams := batch.streams(slice(None)):
                frames = augment_batch(frames, streams, config.augment)
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield frames

    return time_batches(batches(), run.batches, config.train.global_batch_size, run.warm_up)
