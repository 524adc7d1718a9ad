"""Every recipe of the labeled sets, from its published layout to its result, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import pytest
from train_ranks import start

from data_sharding import pipeline as sharding
from svfap_dist.config import recipe
from svfap_dist.evaluate.results import Predictions

FOLDS = {
    "afewva": 5,
    "avcaffe_arousal": 0,
    "avcaffe_valence": 0,
    "celebvhq": 5,
    "cremad": 5,
    "daisee": 0,
    "dfew": 5,
    "enterface05": 5,
    "ferv39k": 0,
    "firstimpressions": 0,
    "mafw": 5,
    "mead": 5,
    "ravdess": 6,
    "werewolfxl": 5,
}
TINY = [
    *("model.size=nano", "data.frame_size=16", "data.num_frames=8", "data.sampling_rate=1"),
    *(
        "data.num_lanes=1",
        "data.decode_workers=0",
        "data.decode_threads=1",
        "cluster.use_gpu=false",
    ),
    *("data.region=full", "train.global_batch_size=2", "train.micro_batch_size=2"),
    *("train.max_steps=1", "train.dtype=float32", "train.log_every=1", "cluster.num_workers=1"),
    *("train.threads_per_rank=1", "augment.rand_augment_ops=1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("protocols")


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, dict[str, Any]]:
    """How each recipe's fine-tuning ended, in one process."""
    for name in {name.partition("_")[0] for name in FOLDS}:
        layouts.LAYOUTS[name](folder / name)
        sharding.shard(name, str(folder / name), str(folder / f"{name}-shards"), min_frames=1)
    tasks = []
    for name in FOLDS:
        places = [
            f"data.url={folder}/{name.partition('_')[0]}-shards",
            f"run.url={folder}/runs/{name}",
        ]
        config = recipe.load(f"finetune_{name}", [*TINY, *places])
        tasks.append(("finetune", {"tables": config.model_dump(mode="json")}))
    results = start(1, tasks, folder / "one")
    return {name: result[0] for name, result in zip(FOLDS, results, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDS)
def test_each_recipe_runs_from_its_layout_to_its_result(
    ended: dict[str, Any], folder: Path, name: str
) -> None:
    assert ended[name].get("stop_reason") == "finished", ended[name]
    run = folder / "runs" / name
    results = json.loads((run / "results.json").read_text())
    assert results["folds"] == FOLDS[name]
    assert results["is_complete"]
    task = recipe.load(f"finetune_{name}").task
    assert task is not None
    assert set(results["metrics"]) == set(task.metrics)
    parts = [run / f"fold-{fold}" for fold in range(1, FOLDS[name] + 1)] or [run]
    tested = [Predictions.read(str(part / "predictions.jsonl")).keys for part in parts]
    assert len({key for keys in tested for key in keys}) == sum(map(len, tested))
    assert sum(map(len, tested)) == results["num_samples"]
