"""Still images from the command line: pre-training on them, and fine-tuning with videos."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clips import make_video
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


@pytest.mark.slow
def test_images_and_videos_are_fine_tuned_together_and_only_videos_are_tested(
    tmp_path: Path,
) -> None:
    names = ["anger", "disgust", "fear", "happy", "neutral", "sad"]
    for number, actor in enumerate((1001, 1019, 1037, 1055, 1073)):  # one of each of five folds
        for emotion in ("ANG", "HAP", "SAD"):
            path = tmp_path / f"set/VideoFlash/{actor}_DFA_{emotion}_XX.flv"
            make_video(path, 9, size=(40, 40), seed=number, codec="flv1", container="flv")
    write_images(tmp_path / "stills", ["happy", "sad"], 12)
    for source, place in (("cremad", "set"), ("images", "stills")):
        where = str(tmp_path / place), str(tmp_path / source)
        svfap("shard", source, *where, "--workers", "0", "--min-frames", "1")
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(
        f"""
        extends = "finetune_synthetic"
        [data]
        sources = [
            {{ url = "{tmp_path}/cremad" }},
            {{ url = "{tmp_path}/images", weight = 3 }},
        ]
        [task]
        set = "cremad"
        extra_sets = ["images"]
        names = {json.dumps(names)}
        fold = 2
        [finetune]
        pool = "mean"  # the recipe's grid is finer than these patches
        """
    )
    svfap("finetune", str(recipe), f"run.url={run}", "run.ledger=true", *TINY)
    svfap("audit", str(run / "fold-2"))
    lines = [
        line
        for file in run.glob("fold-2/ledger/**/*.jsonl")
        for line in file.read_text().splitlines()
    ]
    sources = [json.loads(line)["source"] for line in lines]
    assert sorted(set(sources)) == [0, 1]
    assert sources.count(1) == 3 * sources.count(0) == 12
    results = json.loads((run / "results.json").read_text())
    assert sum(map(sum, results["confusion"])) == 3, "the videos of the fold, and no image"
