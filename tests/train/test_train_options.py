"""Launch options that change how a step is computed and not what comes of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from clips import make_video
from train_ranks import recipe_tables, start

from data_sharding import pipeline as sharding
from svfap_dist.config import recipe
from svfap_dist.data.loader import ClipLoader
from svfap_dist.distributed import World
from svfap_dist.shards import format as shard_format


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("options")
    for number in range(4):
        make_video(folder / f"videos/clip{number}.mp4", 12, seed=number)
    sharding.shard(
        "folder", str(folder / "videos"), str(folder / "shards"), min_frames=8, workers=0
    )
    return str(folder / "shards")


def _losses(data: str, folder: Path, *options: dict[str, object]) -> list[list[float]]:
    """Losses of three steps for each set of options of [train], on one rank."""
    runs = [str(folder / f"run-{number}") for number in range(len(options))]
    model = {"size": "nano", "stage_depths": [1, 1]}  # a block of each kind: quick to compile
    tasks = [
        (
            "train",
            {"tables": recipe_tables(data, run, model=model, train={"max_steps": 3, **option})},
        )
        for run, option in zip(runs, options, strict=True)
    ]
    for ((result,),) in zip(start(1, tasks, folder), strict=True):
        assert result.get("stop_reason") == "finished", result
    return [
        [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        for run in runs
    ]


@pytest.mark.slow
def test_activation_checkpointing_changes_no_bit(data: str, tmp_path: Path) -> None:
    options = {"activation_checkpointing": True}
    plain, frugal, frugal_3 = _losses(
        data, tmp_path, {}, options, {**options, "zero_stage": 3, "micro_batch_size": 4}
    )
    assert len(plain) == 3
    assert frugal == plain
    assert frugal_3 == pytest.approx(plain, abs=1e-5)


def test_activation_checkpointing_reaches_the_model(tmp_path: Path) -> None:
    """It changes no loss, so it is checked directly."""
    options = {}, {"activation_checkpointing": True}
    tasks = [
        ("mlp_calls", {"tables": recipe_tables("", "", train={"micro_batch_size": 4, **option})})
        for option in options
    ]
    assert start(1, tasks, tmp_path) == [[1], [2]]


@pytest.mark.parametrize(("ratio", "predicted"), [(1.0, 8), (0.5, 4), (0.25, 2)])
def test_the_loader_asks_for_as_many_tokens_as_the_recipe(
    data: str, ratio: float, predicted: int
) -> None:
    tables = recipe_tables(data, "", mask={"ratio": 0.5, "decoder_ratio": ratio})
    config = recipe.from_tables(tables, where="test")
    manifest = shard_format.load_manifest(data)
    batches = ClipLoader(config, data, manifest, World(0, 0, 1, 1)).batches(0, 1)
    with contextlib.closing(batches):
        batch = next(batches)
    assert batch.visible.shape == (4, 8)  # of 4 tubelet frames with 4 patches each
    assert batch.masked.shape == (4, predicted)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler on a CPU")
def test_a_compiled_model_trains_alike(data: str, tmp_path: Path) -> None:
    compiled: dict[str, object] = {"compile": True, "activation_checkpointing": True}
    compiled["micro_batch_size"] = 4
    plain, fast, fast_3 = _losses(data, tmp_path, {}, compiled, {**compiled, "zero_stage": 3})
    assert fast == pytest.approx(plain, abs=1e-5)
    assert fast_3 == pytest.approx(plain, abs=1e-5)
