"""Probes on real ranks: they change no bit of the training, and a failed one costs no step."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import make_video
from numbered_shards import DataSet, video_of, write_data_set
from train_ranks import recipe_tables, start
from typer.testing import CliRunner

import svfap_dist
from data_sharding import pipeline as sharding
from svfap_dist import cli
from svfap_dist.checkpoint import best, gc, load, store
from svfap_dist.config import recipe
from svfap_dist.errors import CheckpointError, ConfigError, SvfapError
from svfap_dist.inference.load import network_of
from svfap_dist.model import autoencoder, classifier, pooling, weights
from svfap_dist.model.weights import ModelInfo
from svfap_dist.report import page
from svfap_dist.telemetry.goodput import Goodput
from svfap_dist.train.context import load_run_context
from svfap_dist.train.feature_probe import clip_features, probe_pool
from svfap_dist.train.objective import build_arguments
from svfap_dist.video.info import VideoInfo

pytestmark = pytest.mark.timeout(1000)  # more than the runs may take

SAMPLES = 11  # of the probe: two ranks have unequal parts
EVERY = 3
PROBED = [0, 3, 6, 9, 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probes")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    for number in range(8):
        make_video(folder / f"videos/clip{number:02d}.mp4", 12, seed=number)
    url = folder / "shards"
    sharding.shard("folder", str(folder / "videos"), str(url), min_frames=8, workers=0)
    return url


@pytest.fixture(scope="module")
def labeled(folder: Path) -> DataSet:
    """A labeled set of two classes and six subjects; one video is damaged."""
    videos = [video_of(number) for number in range(SAMPLES)]
    rows = [{"set": "painted", "class": n % 2, "subject": f"id{n // 2}"} for n in range(SAMPLES)]
    info = VideoInfo(30, 25.0, 48, 48, "h264")
    samples = {n: (videos[n], dataclasses.replace(info, labels=rows[n])) for n in range(SAMPLES)}
    data_set = write_data_set(str(folder / "labeled"), [4, 7], videos, samples)
    data_set.damage(1)
    return data_set


def tables_of(data: Path, run: Path, labeled: DataSet | None, **changes: Any) -> dict[str, Any]:
    probe = {"url": labeled.url, "every": EVERY} if labeled else {}
    tables = recipe_tables(str(data), str(run), **changes)
    return {**tables, "probe": probe}


@pytest.fixture(scope="module")
def two_ranks(data: Path, labeled: DataSet, folder: Path) -> dict[str, list[Any]]:
    probed = tables_of(data, folder / "probed", labeled, train={"keep_last": 1})
    cut = tables_of(data, folder / "cut", labeled)
    tasks = {
        "plain": ("train", {"tables": tables_of(data, folder / "plain", None)}),
        "probed": ("train", {"tables": probed}),
        "stopped": ("train", {"tables": cut, "stop_after": 18}),
        "resumed": ("train", {"tables": cut}),
        "unstored": (
            "train_with_failing_upload",
            {
                "tables": tables_of(data, folder / "unstored", labeled),
                "uars": [0.1, 0.9, 0.5, 0.7, 0.6],
            },
        ),
        "failing": (
            "train_with_failing_probes",
            {"tables": tables_of(data, folder / "failing", labeled)},
        ),
    }
    found = start(2, list(tasks.values()), folder / "two", seconds=900)
    return dict(zip(tasks, found, strict=True))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in lines(run / "metrics.jsonl")]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == kind]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return weights.load(str(run / "checkpoints/step-000000012/model.safetensors"))[1]


@pytest.mark.parametrize("probed", ["probed", "cut", "failing"])
def test_probes_change_no_bit_of_the_training(
    two_ranks: dict[str, Any], folder: Path, probed: str
) -> None:
    assert_same_training(folder / "plain", folder / probed)


def assert_same_training(plain: Path, probed: Path) -> None:
    assert losses(plain) == losses(probed)
    assert len(losses(plain)) == 12
    wanted, found = final_weights(plain), final_weights(probed)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow
def test_probes_change_no_bit_of_the_training_on_one_rank(
    data: Path, labeled: DataSet, folder: Path
) -> None:
    runs = {"plain-1": None, "probed-1": labeled}
    tasks = [
        ("train", {"tables": tables_of(data, folder / run, probed)}) for run, probed in runs.items()
    ]
    start(1, tasks, folder / "one")
    assert_same_training(folder / "plain-1", folder / "probed-1")
    assert [probe["step"] for probe in events(folder / "probed-1", "probe")] == PROBED


@pytest.mark.slow
def test_probes_at_stage_3(data: Path, labeled: DataSet, folder: Path) -> None:
    train = {"zero_stage": 3, "max_steps": 3}
    tasks = [
        ("train", {"tables": tables_of(data, folder / run, probed, train=train)})
        for run, probed in {"warm-3": None, "plain-3": None, "probed-3": labeled}.items()
    ]
    start(2, tasks, folder / "stage-3")
    assert losses(folder / "plain-3") == losses(folder / "probed-3")
    assert [probe["step"] for probe in events(folder / "probed-3", "probe")] == [0, 3]
    assert not events(folder / "probed-3", "probe_failed")


def test_every_probe_is_an_event_with_its_cost(two_ranks: dict[str, Any], folder: Path) -> None:
    assert two_ranks["resumed"][0]["stop_reason"] == "finished"
    for run in ("probed", "cut"):
        probes = events(folder / run, "probe")
        steps = [probe["step"] for probe in probes]
        # One that is due when the run stops is left out.
        assert steps == PROBED or (run == "cut" and set(PROBED) - set(steps) == {6})
        for probe in probes:
            assert (probe["clips"], probe["bad_clips"]) == (SAMPLES - 1, 1)
            assert (probe["classes"], probe["split_by"]) == (2, "subject")
            assert 0 <= probe["uar"]["knn"] <= 1
            assert 0 <= probe["uar"]["logistic"] <= 1
            assert probe["feature_seconds"] > 0
            assert probe["score_seconds"] > 0
        assert not events(folder / run, "probe_failed")
    assert events(folder / "plain", "probe") == []


def test_their_time_is_a_class_of_the_goodput(two_ranks: dict[str, Any], folder: Path) -> None:
    of = {run: lines(folder / run / "events.jsonl") for run in ("plain", "probed")}
    assert Goodput(of["plain"]).seconds()["probe"] == 0
    cost = sum(
        probe["feature_seconds"] + probe["score_seconds"]
        for probe in of["probed"]
        if probe["event"] == "probe"
    )
    spent = Goodput(of["probed"]).seconds()
    assert spent["probe"] >= cost
    whole = of["probed"][-1]["time"] - of["probed"][0]["time"]
    assert sum(spent.values()) == pytest.approx(whole)


def test_a_probe_that_fails_costs_no_step(two_ranks: dict[str, Any], folder: Path) -> None:
    assert [result["stop_reason"] for result in two_ranks["failing"]] == ["finished"] * 2
    failures = {
        failure["step"]: failure["error"] for failure in events(folder / "failing", "probe_failed")
    }
    assert list(failures) == [0, 3, 6]
    assert failures[0].startswith("rank 1: StorageError: ")
    assert failures[3] == "rank 1: RuntimeError: planted in the network"
    assert failures[6] == "ImportError: planted in the scores"
    assert [probe["step"] for probe in events(folder / "failing", "probe")] == [9, 12]


def test_the_best_checkpoint_is_marked_kept_and_can_be_named(
    two_ranks: dict[str, Any], folder: Path
) -> None:
    run = str(folder / "probed")
    scores = {
        probe["step"]: probe["uar"]["logistic"] for probe in events(folder / "probed", "probe")
    }
    del scores[0]  # an untrained network is no checkpoint
    wanted = max(scores, key=lambda step: (scores[step], -step))
    found = best.read_best(run)
    assert found is not None
    assert (found.step, found.score) == (wanted, scores[wanted])
    assert store.committed_steps(run) == sorted({wanted, 12})  # train.keep_last = 1
    assert not {wanted} & set(gc.plan_gc(run, keep_last=1).steps)
    path, _ = load.locate_weights(f"{run}/checkpoints/best")
    assert path == f"{store.checkpoint_url(run, wanted)}/model.safetensors"
    assert svfap_dist.load(f"{run}/checkpoints/best").info.provenance["step"] == wanted

    listed = CliRunner().invoke(cli.app, ["checkpoint", "ls", run])
    mark = f"step {wanted} (best by probes, UAR {100 * scores[wanted]:.1f} %)"
    assert mark in listed.stdout.splitlines()
    listed = CliRunner().invoke(cli.app, ["checkpoint", "ls", run, "--json"])
    assert json.loads(listed.stdout)["best"] == {"step": wanted, "uar": scores[wanted]}
    with pytest.raises(CheckpointError, match="No best checkpoint"):
        load.locate_weights(f"{folder / 'plain'}/checkpoints/best")


def test_a_checkpoint_that_is_not_committed_is_not_the_best(
    two_ranks: dict[str, Any], folder: Path
) -> None:
    """Step 3 has the best features, and its checkpoint is lost: the best of the others counts."""
    assert [result["stop_reason"] for result in two_ranks["unstored"]] == ["finished"] * 2
    (lost,) = events(folder / "unstored", "checkpoint_failed")
    assert lost["step"] == 3
    assert "The checkpoint of step 3 was not stored" in (folder / "two/rank-0.log").read_text()
    found = best.read_best(str(folder / "unstored"))
    assert found is not None
    assert (found.step, found.score) == (9, 0.7)


def test_the_report_has_the_curve_and_the_cost(two_ranks: dict[str, Any], folder: Path) -> None:
    texts = {}
    for run in ("plain", "probed"):
        page.make(str(folder / run), str(folder / f"{run}.html"))
        texts[run] = (folder / f"{run}.html").read_text()
    for shown in ("probe UAR, start → end", "cost of a probe, median", "best checkpoint by probes"):
        assert shown in texts["probed"]
        assert shown not in texts["plain"]


def test_features_are_those_of_extraction() -> None:
    config = recipe.load("tiny_cpu", ["data.num_frames=8", "data.frame_size=32"])
    torch.manual_seed(0)
    arguments = {"size": "nano", "num_frames": 8, "frame_size": 32}
    model = autoencoder.build(**arguments)
    info = ModelInfo.of_build(arguments, model.size)
    clips = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        found = clip_features(model.eval(), clips, probe_pool(config))
        wanted = network_of(info, model).features(clips)
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize("probe", ["grid", "all", "both"])
def test_features_of_grids_and_stages_are_those_of_a_fine_tuning(probe: str) -> None:
    overrides = ["data.num_frames=8", "data.frame_size=32", "model.size=nano", "model.patch_size=8"]
    options = {"grid": ["pool=grid", "grid=2"], "all": ["stages=all"]}
    options["both"] = options["grid"] + options["all"]
    overrides += [f"probe.{option}" for option in options[probe]]
    config = recipe.load("tiny_cpu", overrides)
    arguments = build_arguments(config)
    torch.manual_seed(0)
    model = autoencoder.build(**arguments)
    del arguments["num_visible_tubelets"]
    pool = pooling.arguments(config.probe.pool, config.probe.stages, config.probe.grid)
    tuned = classifier.build(**arguments, num_outputs=2, pool=pool)
    tuned.load_encoder(model.state_dict())
    clips = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        found = clip_features(model.eval(), clips, probe_pool(config))
        tuned = tuned.eval()
        wanted = tuned.fc_norm(tuned.pool(tuned.encoder(clips))).flatten(1)
    vectors = {"grid": 4, "all": 3, "both": 12}[probe]
    assert found.shape == (2, vectors * tuned.size.embed_dim)
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-6)


def test_a_grid_that_is_too_fine_is_refused_before_a_run(labeled: DataSet, data: Path) -> None:
    tables = tables_of(data, data / "unused", labeled)
    tables["probe"] |= {"pool": "grid", "grid": 3}  # the frame has 2 x 2 patches
    with pytest.raises(ConfigError, match=r"finer than the patches.*probe.grid.*has 2 patches"):
        load_run_context(recipe.from_tables(tables, where="test"))


def test_a_bad_set_is_an_error_before_a_new_run_and_a_warning_in_one_that_resumes(
    data: Path, labeled: DataSet, folder: Path, tmp_path: Path
) -> None:
    gone = dataclasses.replace(labeled, url=str(tmp_path / "gone"))
    config = recipe.from_tables(tables_of(data, tmp_path / "run", gone), where="test")
    with pytest.raises(SvfapError):
        load_run_context(config)
    begun = tmp_path / "begun"
    shutil.copytree(folder / "probed", begun)
    config = recipe.from_tables(tables_of(data, begun, gone), where="test")
    context = load_run_context(config)
    assert context.step == 12
    assert context.probe_set is None
    assert context.probe_error
