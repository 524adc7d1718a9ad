"""Recipes and loaders for the data plane's tests, and what they compare of batches."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from numbered_shards import FRAMES, SIDE, sample_and_frame

from svfap_dist.config import Config, DataConfig, MaskConfig, ModelConfig, RunConfig, TrainConfig
from svfap_dist.data.batch import ClipBatch
from svfap_dist.data.clips import Key, plan_clips, random_window_start
from svfap_dist.data.loader import ClipLoader
from svfap_dist.data.sample_order import EpochOrder, Slot
from svfap_dist.distributed import World
from svfap_dist.rng import Stream
from svfap_dist.video import backends
from svfap_dist.video.frames import to_rgb
from svfap_dist.video.info import VideoInfo

SIZES = [13, 20, 8, 10]  # 51 samples: 6 steps of 8 and a tail of 3
NO_VIDEO = (b"no video", VideoInfo(FRAMES, 25.0, SIDE, SIDE, "h264"))


def config_of(**data) -> Config:
    """Clips are whole frames, so that the numbers painted into them can be read."""
    fields = {
        "num_frames": 4,
        "sampling_rate": 2,
        "frame_size": 32,
        "region": "full",
        "crop_scales": (1.0,),
        "num_lanes": 4,
        "shuffle_block": 5,
        **data,
    }
    return Config(
        run=RunConfig(seed=3),
        data=DataConfig(**fields),
        mask=MaskConfig(ratio=0.5),
        model=ModelConfig(size="nano"),
        train=TrainConfig(global_batch_size=8, micro_batch_size=2),
    )


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank=rank, local_rank=rank, world_size=size, local_world_size=size)


def loader_of(data_set, config: Config | None = None, rank=0, size=1) -> ClipLoader:
    return ClipLoader(config or config_of(), data_set.url, data_set.manifest, world(rank, size))


def bits(batch: ClipBatch) -> list[tuple]:
    """All that training sees of a batch, row by row, in a form that can be compared."""
    tensors = zip(batch.frames, batch.visible, batch.masked, strict=True)
    return [
        (lane, position, sample, key, replaced, *(tensor.numpy().tobytes() for tensor in row))
        for lane, position, sample, key, replaced, row in zip(
            batch.slots.lanes,
            batch.slots.positions,
            batch.slots.samples,
            batch.slots.keys,
            batch.slots.substituted,
            tensors,
            strict=True,
        )
    ]


def shown(batch: ClipBatch) -> list[list[tuple[int, int]]]:
    """(sample, frame) of each frame of each clip, as painted."""
    return [[sample_and_frame(frame.numpy()) for frame in clip] for clip in batch.frames]


def kept(batches: Iterable[ClipBatch]) -> list[ClipBatch]:
    """All batches, with tensors of their own: the loader uses their memory again."""
    names = ("frames", "visible", "masked", "targets", "digests")
    found = []
    for batch in batches:
        tensors = {name: getattr(batch, name) for name in names}
        own = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        found.append(dataclasses.replace(batch, **own))
    return found


def started(script: Path) -> subprocess.Popen[bytes]:
    """A script that imports from the tests, with pipes to it."""
    tests = Path(__file__).parent
    paths = [str(tests), str(tests / "data"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, script], **pipes, env=environment)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    """Child processes of any process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(") ")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def threads() -> list[threading.Thread]:
    return [
        thread for thread in threading.enumerate() if thread.name.startswith(("clips", "reads"))
    ]


def order_of(config: Config, sizes: list[int], epoch: int) -> EpochOrder:
    return EpochOrder(
        sizes,
        seed=config.run.seed,
        epoch=epoch,
        global_batch_size=config.samples_per_step,
        num_lanes=config.data.num_lanes,
        shuffle_block=config.data.shuffle_block,
        version=config.data.order_version,
    )


def slots_of_epoch(
    order: EpochOrder, step_in_epoch: int, rank: int = 0, world_size: int = 1
) -> list[Slot]:
    """A rank's part of a step, by lane and position: the next few samples of each of its lanes."""
    count, first = order._num_lanes // world_size, step_in_epoch * order.per_lane
    return [
        Slot(lane, position, order.sample(lane, position), order._epoch)
        for lane in range(rank * count, (rank + 1) * count)
        for position in range(first, first + order.per_lane)
    ]


def window_start(config: Config, order: EpochOrder, epoch: int, slot: Slot) -> int:
    """Where the window of a slot starts, which of the numbered videos has `FRAMES` frames."""
    data = config.data
    phase = order.window_phase(slot.lane, slot.position, data.sampling_rate)
    stream = Stream(config.run.seed, "window", epoch, slot.sample)
    return random_window_start(stream, FRAMES, data.window, phase, data.sampling_rate)


def cut_clips(
    video: bytes,
    info: VideoInfo,
    data: DataConfig,
    window: Key,
    crops: Sequence[Key],
    phase: int | None = None,
) -> list[torch.Tensor]:
    """Clips of pre-training, cut one by one: uint8 [F, size, size, 3] each."""
    numbers, cuts = plan_clips(info, data, window, crops, phase=phase)
    frames = backends.decode(video, info, numbers)
    return [torch.from_numpy(to_rgb(frames, cut, data.frame_size)) for cut in cuts]
