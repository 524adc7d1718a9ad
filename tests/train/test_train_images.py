"""Still images from the command line: pre-training on a folder of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = [
    *("data.num_frames=8", "data.frame_size=32", "data.region=full", "data.num_lanes=4"),
    *("data.shuffle_block=4", "model.size=nano", "train.max_steps=4", "train.log_every=1"),
    *("train.global_batch_size=4", "train.micro_batch_size=2", "cluster.num_workers=1"),
]


def svfap(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "svfap_dist", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_images(folder: Path, classes: list[str], count: int) -> None:
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 255, (6, 6, 3)).astype(np.uint8)
        path = folder / classes[number % len(classes)] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).resize((40, 40), Image.Resampling.BICUBIC).save(path)


@pytest.mark.slow
def test_a_folder_of_images_is_pre_trained_on(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["one", "other"], 12)
    shards, run = str(tmp_path / "shards"), str(tmp_path / "run")
    svfap("shard", "images", str(tmp_path / "in"), shards, "--workers", "0")
    motion = [
        "mask.ratio=0.5",
        "data.still_motion=0.1",
        "run.ledger=true",
        f"data.eval_url={shards}",
    ]
    svfap("pretrain", "tiny_cpu", f"data.url={shards}", f"run.url={run}", *TINY, *motion)
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    svfap("audit", run)
