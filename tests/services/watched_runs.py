"""Runs for the tests of what watches them: `svfap pretrain` that lists its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
from prometheus import Prometheus

from data_sharding.pipeline import shard
from svfap_dist.distributed import free_port


class WatchedRun:
    """A run of two ranks that continues until `stop`, and the Prometheus that watches it.

    One of its samples is spoilt, so that there is a failure to show.
    """

    def __init__(self, folder: Path, clips: int = 16) -> None:
        self._train, self._held_out = str(folder / "train"), str(folder / "held-out")
        shard("synthetic", f"clips={clips}", self._train)
        shard("synthetic", "clips=8", self._held_out)
        spoil(self._train)
        self.url = folder / "run"
        self.began = time.time()
        self._port = free_port()
        self.prometheus = Prometheus(folder, self._port)
        self._process: Any = None
        self.start()

    def start(self) -> None:
        """Start or resume it."""
        held_out = f"data.eval_url={self._held_out}"
        probe = (f"probe.url={self._train}", "probe.every=100000")  # before the first step only
        endless = ("train.epochs=1000000", "train.max_steps=1000000")
        overrides = (held_out, *probe, *endless, "data.max_bad_fraction=1")
        self._process = start(self._train, self.url, self._port, 2, *overrides)

    def kill_a_rank(self) -> None:
        """As a node's power cut would; the run ends."""
        ranks = psutil.Process(self._process.pid).children()
        os.kill(max(rank.pid for rank in ranks), signal.SIGKILL)
        self._process.wait(timeout=120)

    def stop(self) -> None:
        stop(self._process)
        self.prometheus.stop()


def start(shards: str, run: Path, port: int, ranks: int, *overrides: str) -> Any:
    """A run in processes of its own: `svfap pretrain` under torchrun."""
    launcher: list[str] = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        launcher += [f"--master-port={free_port()}"]
    command = [sys.executable, *launcher, "-m", "svfap_dist", "pretrain"]
    settings = {
        "data.url": shards,
        "data.eval_url": shards,
        "run.url": str(run),
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.log_every": 2,
        "train.eval_every": 10,
        "train.checkpoint_every": 10,
        "metrics.discovery_port": port,
    }
    pairs = [f"{key}={value}" for key, value in settings.items()]
    with open(run.with_suffix(".log"), "w") as log:
        return subprocess.Popen([*command, "tiny_cpu", *pairs, *overrides], stdout=log, stderr=log)


def stop(process: Any) -> None:
    process.terminate()
    process.wait(timeout=120)


def spoil(shards: str) -> None:
    """Spoil the first video of the first shard."""
    spoil_shard(min(Path(shards).glob("*.tar")))


def spoil_shard(shard: Path) -> None:
    """Overwrite the first video of a shard, as a bad disk would: its place stays."""
    with tarfile.open(shard) as archive:
        video = next(member for member in archive if member.name.endswith(".mp4"))
    with open(shard, "r+b") as file:
        file.seek(video.offset_data)
        file.write(b"\0" * video.size)
