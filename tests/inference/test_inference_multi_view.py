"""`svfap predict` and `svfap evaluate` give the same scores to the last bit: they are one code."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clips import make_video
from made_networks import CLASSES, emotions, finetuned, save_run, traits
from typer.testing import CliRunner

from data_sharding import pipeline as sharding
from data_sharding.sources import SOURCES, Source, SourceVideo
from svfap_dist.cli.app import app
from svfap_dist.config import Config, recipe

# Width and frames. a: three windows, two crops that differ; b: one crop, and windows at 0, 0 and 1,
# which count unequally; c: shorter than a window.
SIZES = {"a": (80, 33), "b": (64, 8), "c": (64, 5)}
KINDS = {"classification": (emotions, 3), "regression": (functools.partial(traits, "sigmoid"), 2)}


def samples(text: str) -> Iterator[SourceVideo]:
    """A labeled source: what INPUT names is "KIND FOLDER"."""
    kind, _, folder = text.partition(" ")
    for number, name in enumerate(SIZES):
        values = {"openness": 0.1 * number, "extraversion": 0.5}
        target = {"values": values, "set": "firstimpressions"}
        if kind == "classification":
            target = {"class": number, "class_name": CLASSES[number], "set": "dfew"}
        # Nothing is trained here; a task needs samples on both sides.
        for split in ("train", "test"):
            path = Path(folder) / f"{name}.mp4"
            labels = {**target, "split": split}
            read = functools.partial(Path.read_bytes, path)
            yield SourceVideo(f"{split}-{name}", read, labels, str(path), "mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos")
    for name, (width, frames) in SIZES.items():
        make_video(path / f"{name}.mp4", frames, size=(width, 64), seed=frames)
    return path


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception:
        raise done.exception
    return done.stdout


def evaluated(config: Config, run: str, shards: Path, folder: Path) -> dict[str, list[float]]:
    """The scores that `svfap evaluate` writes, by name of the video."""
    path = folder / "recipe.toml"
    path.write_text(recipe.dumps(config))
    output = folder / "predictions.jsonl"
    overrides = [f"data.url={shards}", "data.decode_workers=1"]
    invoke("evaluate", path, run, *overrides, "--predictions", output)
    rows = map(json.loads, output.read_text().splitlines())
    return {row["key"].removeprefix("test-"): row["scores"] for row in rows}


def predicted(*arguments: object) -> dict[str, list[float]]:
    found = json.loads(invoke("predict", *arguments, "--json"))["predictions"]
    return {Path(row["key"]).stem: list(row["scores"].values()) for row in found}


@pytest.mark.parametrize("kind", KINDS)
def test_predict_and_evaluate_give_bit_equal_scores(kind, folder, tmp_path, monkeypatch):
    row = Source("toy", True, "a folder", "three videos", module=__name__)
    monkeypatch.setitem(SOURCES, "toy", row)
    shards, (make_config, outputs) = tmp_path / "shards", KINDS[kind]
    sharding.shard("toy", f"{kind} {folder}", str(shards), min_frames=1, workers=0)
    config = make_config()
    update = {
        "data": config.data.model_copy(update={"region": "full"}),  # a square region has one crop
        "finetune": config.finetune.model_copy(update={"test_segments": 3}),
    }
    config = config.model_copy(update=update)
    run = save_run(tmp_path / "run", finetuned(outputs), config)
    scores = evaluated(config, run, shards, tmp_path)
    assert scores.keys() == SIZES.keys()
    assert len(set(map(tuple, scores.values()))) == 3
    # The bytes of the samples as files, together and alone, and all samples of the shards.
    assert predicted(run, folder) == scores
    assert predicted(run, folder / "b.mp4") == {"b": scores["b"]}
    of_shards = predicted(run, shards)
    for name in SIZES:
        assert of_shards[f"test-{name}"] == of_shards[f"train-{name}"] == scores[name]
