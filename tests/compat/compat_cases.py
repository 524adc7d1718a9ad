"""The commands that are run on files of an old version, and which results are compared.

`observe` runs COMMANDS on a copy of the files and returns their results as JSON values. It uses
only the public surface of svfap_dist (the command line, `load` and `extract`), so the same code
recorded the old version's results (expected.json) and collects the current version's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import svfap_commands

SHARD_VIDEOS = ["shard", "folder", "videos", "shards/videos", "--min-frames", "8"]
SHARD_VIDEOS += ["--samples-per-shard", "5", "--workers", "0"]
SHARD_TRAIN = ["shard", "folder", "videos", "shards/train", "--min-frames", "8", "--workers", "0"]
SHARD_TRAIN += ["--profile", "train", "--region", "centre", "--size", "32"]
_SYNTHETIC = "identities=2,frames=10,size=64"
_LABELLED = ["shards/labelled", "--min-frames", "1", "--samples-per-shard", "5", "--workers", "0"]
SHARD_LABELLED = ["shard", "synthetic", f"clips=8,{_SYNTHETIC}", *_LABELLED]
MORE_LABELLED = ["shard", "synthetic", f"clips=10,{_SYNTHETIC}", *_LABELLED]

TWO_RANKS = ["run.url=runs/two-ranks", "data.url=shards/train"]
TWO_RANKS += ["data.eval_url=", "train.zero_stage=2", "train.keep_last=1"]
ON_ONE = ["run.url=runs/two-ranks-on-one", *TWO_RANKS[1:]]
ON_TWO = ["run.url=runs/two-ranks-on-two", *TWO_RANKS[1:]]
RESHAPED = ["run.url=runs/reshaped", *TWO_RANKS[1:]]
STOPPED = ["run.url=runs/finetune-stopped"]
IMPORT = ["--num-heads", "2", "--stage-depths", "1,2", "--frame-size", "32", "--num-frames", "4"]
OLD_KEYS = ["run.url=runs/old-keys", "data.region=centre", "data.colours=device"]

PRETRAIN, FINETUNE = "recipes/pretrain.toml", "recipes/finetune.toml"
COPIES = ("runs/two-ranks-on-one", "runs/two-ranks-on-two")  # of runs/two-ranks

COMMANDS: dict[str, list[str]] = {
    # Shards
    "verify videos": ["shards", "verify", "shards/videos", "--json"],
    "verify train": ["shards", "verify", "shards/train", "--json"],
    "verify labelled": ["shards", "verify", "shards/labelled", "--json"],
    "show videos": ["shards", "show", "shards/videos", "--json"],
    "show train": ["shards", "show", "shards/train", "--json"],
    "show labelled": ["shards", "show", "shards/labelled", "--json"],
    "shard videos": [*SHARD_VIDEOS, "--json"],
    "shard train": [*SHARD_TRAIN, "--json"],
    # Checkpoints and records of runs
    "checkpoints": ["checkpoint", "ls", "runs/pretrain", "--json"],
    "checkpoint": ["checkpoint", "verify", "runs/pretrain", "--json"],
    "checkpoint of two ranks": ["checkpoint", "verify", "runs/two-ranks", "--json"],
    "checkpoint reshaped": ["checkpoint", "verify", "runs/reshaped", "--json"],
    "collected": ["checkpoint", "gc", "runs/finetune/fold-1", "--dry-run", "--json"],
    "audit": ["audit", "runs/pretrain", "--json"],
    "audit of two ranks": ["audit", "runs/two-ranks", "--json"],
    "audit of a fold": ["audit", "runs/finetune/fold-1", "--json"],
    "report": ["report", "runs/pretrain", "-o", "out/report.html"],
    "report of a fold": ["report", "runs/finetune/fold-1", "-o", "out/fold.html"],
    "reconstruct": ["reconstruct", "runs/pretrain", "videos/clip0.mp4", "-o", "out/picture.png"],
    # Networks
    "extract": ["extract", "runs/pretrain", "videos", "-o", "out/features.npz", "--step", "4"],
    "extract shards": ["extract", "exports/encoder", "shards/train", "-o", "out/shards.npz"],
    "extract imported": ["extract", "imported", "videos", "-o", "out/imported.npz"],
    "predict": ["predict", "runs/finetune/fold-1", "videos", "--json"],
    "predict export": ["predict", "exports/classifier", "shards/labelled", "--json"],
    "predict import": ["predict", "imported", "videos", "--region", "centre", "--json"],
    "predict onnx": ["predict", "exports/onnx", "videos", "--json"],
    "export": ["export", "runs/finetune/fold-1", "-o", "out/exported", "--licence", "MIT"],
    "export again": ["export", "exports/classifier", "-o", "out/exported-again"],
    "export import": ["export", "imported", "-o", "out/exported-import", "--region", "centre"],
    "predict exported": ["predict", "out/exported", "videos", "--json"],
    "predict exported again": ["predict", "out/exported-again", "videos", "--json"],
    "predict exported import": ["predict", "out/exported-import", "videos", "--json"],
    # Fine-tuning
    "evaluate": ["evaluate", FINETUNE, "runs/finetune", "--json"],
    "evaluate fold": ["evaluate", FINETUNE, "runs/finetune/fold-2", "--json"],
    "finetune": ["finetune", FINETUNE, "--json"],
    "finetune stopped": ["finetune", FINETUNE, *STOPPED, "--json"],
    "finetune from export": [
        *("finetune", FINETUNE, "run.url=runs/from-export", "finetune.init=exports/encoder"),
        *("task.fold=1", "train.max_steps=1", "--json"),
    ],
    # Resumed pre-training
    "pretrain": ["pretrain", PRETRAIN, "--json"],
    "pretrain on one": ["pretrain", PRETRAIN, *ON_ONE, "--json"],
    "pretrain reshaped": ["pretrain", PRETRAIN, *RESHAPED, "--json"],
    "audit after": ["audit", "runs/pretrain", "--json"],
    # Recipes and overrides with the names of that version
    "every key": ["pretrain", "recipes/every_key.toml", "--json"],
    "every finetune key": ["finetune", "recipes/every_finetune_key.toml", "--json"],
    "old overrides": ["pretrain", PRETRAIN, *OLD_KEYS, "train.max_steps=1", "--json"],
    # Last, because it changes the shards that fine-tuning reads
    "shard more": [*MORE_LABELLED, "--json"],
    "verify more": ["shards", "verify", "shards/labelled", "--json"],
}
RUNS = (
    *("pretrain", "two-ranks-on-two", "two-ranks-on-one", "reshaped", "every_key", "old-keys"),
    *("finetune-stopped/fold-1", "finetune-stopped/fold-2", "from-export/fold-1"),
    "every_finetune_key/fold-1",
)


# Commands that begin a run, rather than resume one of the old files.
NEW_RUNS = ("every key", "every finetune key", "old overrides", "finetune from export")

FEATURES = ("features.npz", "out/features.npz", "out/shards.npz", "out/imported.npz")
VIDEO = "videos/clip0.mp4"
NETWORKS = {  # opened by `svfap_dist.load`
    "run": "runs/pretrain",
    "checkpoint": "runs/pretrain/checkpoints/step-000000004",
    "reshaped": "runs/reshaped",
    "fold": "runs/finetune/fold-1",
    "encoder": "exports/encoder",
    "classifier": "exports/classifier",
    "import": "imported",
}
_VOLATILE = {"seconds", "wall_seconds", "clips_per_second", "bytes_read"}


def observe(folder: Path, of_new_runs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run all COMMANDS in `folder`, a copy of the old files.

    Args:
        of_new_runs: overrides for NEW_RUNS.

    Returns:
        commands: exit code and JSON output, by name. runs: metrics, samples and checkpoints, by
        run. features: the arrays of each NPZ. python: features of one video by `load` and
        `extract`, by network. stderr: of each command, by name.
    """
    for copy in COPIES:
        shutil.copytree(folder / "runs/two-ranks", folder / copy)
    python = {name: _extract(folder, url) for name, url in NETWORKS.items()}
    with _two_ranks(folder):
        commands = COMMANDS | {name: [*COMMANDS[name], *of_new_runs] for name in NEW_RUNS}
        finished = svfap_commands.run(commands, folder, _environment())
    return {
        "commands": {name: _seen(each) for name, each in finished.items()},
        "runs": {run: _seen_of_run(folder / "runs" / run) for run in RUNS},
        "features": {path: _arrays(folder / path) for path in FEATURES},
        "python": python,
        "stderr": {name: each.stderr for name, each in finished.items()},
    }


def _environment() -> dict[str, str]:
    """Return this process's variables and import path, without those that describe a rank."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def _two_ranks(folder: Path) -> Iterator[None]:
    """Resume runs/two-ranks-on-two while the body of the `with` statement runs."""
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, "-m", *torchrun, "-m", "svfap_dist", "pretrain", PRETRAIN]
    with open(folder / "two-ranks.log", "w+") as log:
        process = subprocess.Popen(
            [*command, *ON_TWO], cwd=folder, env=_environment(), stdout=log, stderr=log
        )
        try:
            yield
            code = process.wait(timeout=280)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        assert code == 0, log.read()


def _seen(finished: svfap_commands.Finished) -> dict[str, Any]:
    try:
        printed = json.loads(finished.stdout)
    except ValueError:
        printed = None
    return {"code": finished.code, "printed": _lasting(printed)}


def _lasting(value: Any) -> Any:
    """Remove the fields that differ from run to run."""
    if isinstance(value, dict):
        return {name: _lasting(each) for name, each in value.items() if name not in _VOLATILE}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def _seen_of_run(run: Path) -> dict[str, Any]:
    """Return logged numbers, samples as [attempt, rank, step, epoch, lane, key], checkpoints."""
    numbers = ("step", "loss", "lr", "grad_norm")
    metrics = [{name: row[name] for name in numbers} for row in _lines(run / "metrics.jsonl")]
    samples = [
        [*path.relative_to(run).parts[1:], *(row[n] for n in ("step", "epoch", "lane", "key"))]
        for path in sorted(run.glob("ledger/*/*.jsonl"))
        for row in _lines(path)
    ]
    checkpoints = sorted(path.parent.name for path in run.glob("checkpoints/*/COMMIT"))
    return {"metrics": metrics, "samples": samples, "checkpoints": checkpoints}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return {name: arrays[name].tolist() for name in arrays.files}


def _extract(folder: Path, url: str) -> list[list[float]]:
    import svfap_dist

    network = svfap_dist.load(str(folder / url), region="centre")
    return svfap_dist.extract(network, folder / VIDEO, step=4).tolist()
