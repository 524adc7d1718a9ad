"""Your own labeled videos, from a folder to a confusion matrix, by the README's three commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from data_sharding.sources import find_source

ROOT = Path(__file__).parents[2]
# Smaller than the recipe, which is otherwise taken as it is; from scratch.
SMALL = [
    *("model.size=nano", "data.frame_size=32", "data.num_frames=8", "data.sampling_rate=2"),
    *("train.global_batch_size=4", "train.max_steps=2", "data.decode_workers=0"),
    *("train.threads_per_rank=1", "finetune.init="),
]
EXPRESSIONS = ("happy", "sad")


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```\n(svfap faces my-videos .*?)```", text, re.DOTALL)
    return block.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered videos of three persons, and their list, as a spreadsheet saves it."""
    root = tmp_path_factory.mktemp("own")
    rows = ["Path;Label;Subject"]
    for clip in find_source("synthetic").samples("clips=21,identities=3,frames=18,size=224"):
        if (expression := clip.labels["class_name"]) in EXPRESSIONS:
            path = root / "my-videos" / expression / f"{len(rows)}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(clip.read())
            rows.append(f"{expression}\\{path.name};{expression};{clip.labels['subject']}")
    text = "\r\n".join(rows)
    (root / "my-videos/labels.csv").write_bytes(text.encode("utf-8-sig"))
    return root


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_folder_of_videos_becomes_a_confusion_matrix_in_three_commands(folder: Path) -> None:
    lines = commands()
    assert len(lines) == 3
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        assert name == "svfap"
        arguments += SMALL if arguments[0] == "finetune" else []
        done = subprocess.run(
            [sys.executable, "-m", "svfap_dist", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    run = folder / "runs/mine"
    results = json.loads((run / "results.json").read_text())
    assert (results["folds"], results["num_samples"]) == (3, 6)
    assert (run / "pictures/confusion.png").stat().st_size > 1000
    tasks = [tomllib.loads(path.read_text()) for path in run.glob("fold-*/config.toml")]
    assert len(tasks) == 3
    for config in tasks:
        assert config["task"]["names"] == list(EXPRESSIONS)
        assert config["task"]["folds_by"] == "subject"
        assert isinstance(config["cluster"]["use_gpu"], bool)
