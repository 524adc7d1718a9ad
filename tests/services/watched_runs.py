"""Runs for the tests of what watches them: shards, and `svfap pretrain` that lists its ranks."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from svfap_dist.distributed import free_port


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
    """Overwrite the first video of the first shard, as a bad disk would: its place stays."""
    shard = min(Path(shards).glob("*.tar"))
    with tarfile.open(shard) as archive:
        video = next(member for member in archive if member.name.endswith(".mp4"))
    with open(shard, "r+b") as file:
        file.seek(video.offset_data)
        file.write(b"\0" * video.size)
