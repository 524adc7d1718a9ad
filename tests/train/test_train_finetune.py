"""Fine-tuning runs on real ranks: folds, resuming, linear probes, and testing again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clips import make_video
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_ranks import recipe_tables, start

from data_sharding import pipeline as sharding
from svfap_dist.checkpoint import load as trained
from svfap_dist.checkpoint import store
from svfap_dist.config import Config, recipe
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.evaluate import command, runner
from svfap_dist.evaluate.results import Predictions
from svfap_dist.inference import export
from svfap_dist.inference import load as inference
from svfap_dist.model import autoencoder, classifier, weights
from svfap_dist.model.sizes import size_of_build
from svfap_dist.train import audit, finetune, loop
from svfap_dist.train.signals import TIME_IS_UP

ACTORS = (1001, 1019, 1037, 1055, 1073)  # one of each of CREMA-D's folds
NAMES = ["anger", "disgust", "fear", "happy", "neutral", "sad"]
TASK = {
    "kind": "classification",
    "set": "cremad",
    "label": "class",
    "names": NAMES,
    "folds": 5,
    "fold": 2,
    "subject_independent": True,
    "metrics": ["uar", "war"],
}
CALM = {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
STILL = {"flip": 0.0, "rand_augment_ops": 0, "erasing": 0.0}
pytestmark = pytest.mark.timeout(1000)  # more than `runs` may take


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """Thirty labeled videos of 6 to 15 frames: some shorter than a clip."""
    for number, actor in enumerate(ACTORS):
        for place, emotion in enumerate(("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")):
            path = folder / f"set/VideoFlash/{actor}_DFA_{emotion}_XX.flv"
            length = 6 + (3 * number + place) % 10
            make_video(path, length, seed=6 * number + place, codec="flv1", container="flv")
    url = folder / "shards"
    sharding.shard("cremad", str(folder / "set"), str(url), min_frames=1, workers=0)
    return url


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Path:
    """Weights of a nano autoencoder that was trained on nothing, with a license."""
    torch.manual_seed(1)
    arguments = {"size": "nano", "num_frames": 8, "frame_size": 32}
    model = autoencoder.build(**arguments)
    info = weights.ModelInfo.of_build(arguments, size_of_build(arguments))
    info = dataclasses.replace(info, license="CC-BY-NC-4.0")
    weights.save(str(folder / "init/model.safetensors"), model.state_dict(), arguments, info)
    return folder / "init"


def tables(data: Path, run: Path, /, **changes: dict[str, Any]) -> dict[str, Any]:
    base = recipe_tables(str(data), str(run), train={"max_steps": 6, "checkpoint_every": 3})
    base |= {"task": TASK, "finetune": {"head_init_scale": 1.0}, "augment": {}, "track": {}}
    return {section: {**values, **changes.get(section, {})} for section, values in base.items()}


@pytest.fixture(scope="module")
def runs(data: Path, pretrained: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Attempts on one rank, by name."""

    def task(run: str, stop_after: int = 0, /, **changes: Any) -> tuple[str, dict[str, Any]]:
        wanted = tables(data, folder / run, **changes)
        return "finetune", {"tables": wanted, "stop_after": stop_after}

    linear = {"mode": "linear", "init": str(pretrained)}
    lora = {"mode": "lora", "lora_rank": 4, "init": str(pretrained)}
    attentive = {"mode": "attentive", "stages": "all", "init": str(pretrained)}
    quick = {"lr": 3.0, "warmup_lr": 3.0}
    gone = {"init": "/gone"}
    often = {"checkpoint_every": 1, "keep_last": 9}
    judged, long = {"validation": 0.5, "patience": 1}, {"max_steps": 12, "checkpoint_every": 12}
    ema, even = {"ema": 0.25}, {"sampling": "balanced"}
    tasks = {
        "straight": task("straight", track={"tensorboard": True}),
        "every step": task("every", train=often),
        "weighted": task("weighted", finetune={"class_weights": "balanced"}),
        "balanced stopped": task("balanced", 4, finetune=even),
        "balanced resumed": task("balanced", finetune=even),
        "validated stopped": task("validated", 3, finetune=judged, train=long),
        "validated": task("validated", finetune=judged, train=long),
        "ema": task("ema", finetune=ema),
        "ema stopped": task("ema-cut", 4, finetune=ema),
        "ema resumed": task("ema-cut", finetune=ema),
        "lora": task("lora", finetune=lora, optim=quick),
        "lora stopped": task("lora-cut", 4, finetune=lora, train={"zero_stage": 1}, optim=quick),
        "lora resumed": task("lora-cut", finetune=lora | gone, optim=quick),
        "lora again": task("again", finetune=lora | {"init": str(folder / "lora/fold-2")}),
        "attentive": task("attentive", finetune=attentive, optim=quick),
        "attentive stopped": task("attentive-cut", 4, finetune=attentive, optim=quick),
        "attentive resumed": task("attentive-cut", finetune=attentive | gone, optim=quick),
        "stopped": task("cut", 4),
        "resumed": task("cut"),
        "stopped in the test": task("late", 8),
        "tested": task("late"),
        "calm": task("calm", finetune=CALM, augment=STILL),
        "device": task("device", augment={"run_on": "device"}),
        "linear stopped": task("linear", 4, finetune=linear),
        "linear": task("linear", finetune=linear | {"init": "/gone"}, train={"zero_stage": 1}),
        "too large": task("large", model={"size": "tiny"}, finetune={"init": str(pretrained)}),
        # Last: at stage 3 DeepSpeed replaces torch's linear layer in the whole process.
        "ema stopped for stage 0": task("ema-0", 4, finetune=ema, train={"zero_stage": 3}),
        "ema in stage 0": task("ema-0", finetune=ema, train={"zero_stage": 0}),
    }
    results = start(1, list(tasks.values()), folder / "one", seconds=900)
    return dict(zip(tasks, (of_ranks[0] for of_ranks in results), strict=True))


def state(run: Path) -> dict[str, torch.Tensor]:
    return weights.load(str(run / "checkpoints/step-000000006/model.safetensors"))[1]


def test_a_fold_is_trained_tested_and_summed_up(runs: dict[str, Any], folder: Path) -> None:
    assert runs["straight"]["stop_reason"] == "finished"
    run = folder / "straight/fold-2"
    tested = Predictions.read(str(run / "predictions.jsonl"))
    said = {
        key.split("/")[-1].split("_")[2]: label
        for key, label in zip(tested.keys, tested.labels, strict=True)
    }
    assert said == {"ANG": 0, "DIS": 1, "FEA": 2, "HAP": 3, "NEU": 4, "SAD": 5}
    assert all(str(ACTORS[1]) in key for key in tested.keys)
    assert np.allclose(tested.scores.sum(axis=1), 1, atol=1e-5)  # means of probabilities
    results = json.loads((folder / "straight/results.json").read_text())
    assert results["num_samples"] == 6
    assert results["metrics"]["war"]["pooled"] == pytest.approx(
        100 * np.mean(tested.predicted() == tested.labels)
    )
    assert (folder / "straight/pictures/confusion.png").stat().st_size > 1000
    # The fold and the result over all folds are tracked, each as a run.
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "test"]
    assert event["scores"]["war"] == pytest.approx(results["metrics"]["war"]["pooled"])
    for where, tag in ((run, "test/scores/war"), (folder / "straight", "results/war")):
        tracked = EventAccumulator(str(where / "tensorboard"))
        tracked.Reload()
        assert [e.value for e in tracked.Scalars(tag)] == [pytest.approx(event["scores"]["war"])]
        assert len(tracked.Images("confusion")) == 1
    ledger = [
        json.loads(line)
        for path in (run / "ledger/attempt-0001").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert len(ledger) == 6 * 4
    assert not any(str(ACTORS[1]) in row["key"] for row in ledger)
    checked = audit.audit(str(run))
    assert (checked.steps, checked.is_exact) == (6, True)


def test_the_device_may_augment(runs: dict[str, Any], folder: Path) -> None:
    """Its clips are mixed differently, so other weights are learned."""
    assert runs["device"]["stop_reason"] == "finished"
    straight, other = state(folder / "straight/fold-2"), state(folder / "device/fold-2")
    assert not any(torch.equal(straight[name], other[name]) for name in straight)
    assert audit.audit(str(folder / "device/fold-2")).is_exact


def test_stopping_and_resuming_changes_no_bit(runs: dict[str, Any], folder: Path) -> None:
    """Though drop path, mixing and augmentation are random."""
    assert runs["stopped"] == {"stop_reason": "stop requested", "step": 4, "fold": 2}
    assert runs["resumed"]["stop_reason"] == "finished"
    straight, cut = state(folder / "straight/fold-2"), state(folder / "cut/fold-2")
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    assert not all(
        torch.equal(straight[name], value) for name, value in state(folder / "calm/fold-2").items()
    )


def test_a_test_that_is_stopped_is_done_again(runs: dict[str, Any], folder: Path) -> None:
    """The run is at its end then, but not finished."""
    assert runs["stopped in the test"] == {"stop_reason": "stop requested", "step": 6, "fold": 2}
    assert runs["tested"]["stop_reason"] == "finished"
    straight, late = folder / "straight/fold-2", folder / "late/fold-2"
    said = [(run / "predictions.jsonl").read_bytes() for run in (straight, late)]
    assert said[0] == said[1]
    events = [json.loads(line) for line in (late / "events.jsonl").read_text().splitlines()]
    windows = [event for event in events if event["event"] in ("window", "stop")]
    assert [event.get("reason") for event in windows if event["event"] == "stop"] == [
        "stop requested",
        "finished",
    ]
    before_stops = [a for a, b in pairwise(windows) if b["event"] == "stop"]
    assert all(event["evaluation_seconds"] > 0 for event in before_stops)  # no goodput


def test_a_linear_probe_leaves_the_encoder(
    runs: dict[str, Any], pretrained: Path, folder: Path
) -> None:
    assert runs["linear"]["stop_reason"] == "finished"
    before = weights.load(str(pretrained / "model.safetensors"))[1]
    after = state(folder / "linear/fold-2")
    kept = [name for name in after if name.startswith("encoder.")]
    assert kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    # It was stopped, and resumed in another ZeRO stage: the checkpoint was reshaped.
    stages = [store.read_state(str(folder / "linear/fold-2"), step).zero_stage for step in (4, 6)]
    assert stages == [2, 1]
    earlier = weights.load(
        str(folder / "linear/fold-2/checkpoints/step-000000004/model.safetensors")
    )
    assert not torch.equal(after["head.weight"], earlier[1]["head.weight"])


@pytest.mark.parametrize("mode", ["lora", "attentive"])
def test_a_mode_trains_its_part_alone_and_resumes(
    runs: dict[str, Any], pretrained: Path, folder: Path, mode: str
) -> None:
    for name in (mode, f"{mode} resumed"):
        assert runs[name]["stop_reason"] == "finished", runs[name]
    assert runs[f"{mode} stopped"]["step"] == 4
    before = weights.load(str(pretrained / "model.safetensors"))[1]
    after, cut = state(folder / f"{mode}/fold-2"), state(folder / f"{mode}-cut/fold-2")
    close = {"atol": 1e-5 if mode == "lora" else 0.0, "rtol": 0.0}  # stages 1 and 2 sum otherwise
    assert all(torch.allclose(after[name], cut[name], **close) for name in after)
    kept = [name for name in after if name.startswith("encoder.") and ".adapter." not in name]
    assert kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    trained_part = [name for name in after if ".adapter.up" in name or name.startswith("pool.")]
    assert trained_part
    assert all(after[name].any() for name in trained_part)


def test_the_network_is_the_average_of_the_weights_of_all_steps(
    runs: dict[str, Any], data: Path, folder: Path, tmp_path: Path
) -> None:
    for name in ("every step", "ema", "ema resumed", "weighted"):
        assert runs[name]["stop_reason"] == "finished", runs[name]
    where = str(folder / "every/fold-2/checkpoints/step-{:09d}/model.safetensors")
    steps = [weights.load(where.format(step))[1] for step in range(1, 7)]
    average = dict(steps[0])
    for n, step in enumerate(steps[1:], start=1):
        decay = min(0.25, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * w for name, w in step.items()}
    found = state(folder / "ema/fold-2")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)
    last = steps[-1]["head.weight"]
    assert not torch.allclose(found["head.weight"], last, atol=1e-5, rtol=0.0)
    cut = state(folder / "ema-cut/fold-2")
    assert all(torch.equal(found[name], value) for name, value in cut.items())
    # The test is of the averaged weights, too.
    config = recipe.from_tables(tables(data, folder / "unused"), where="test")
    command.evaluate(config, str(folder / "ema"), predictions_url=str(tmp_path / "again.jsonl"))
    said = Predictions.read(str(folder / "ema/fold-2/predictions.jsonl"))
    assert np.allclose(said.scores, Predictions.read(str(tmp_path / "again.jsonl")).scores)


def test_balanced_classes_resume_and_are_audited(runs: dict[str, Any], folder: Path) -> None:
    assert runs["balanced stopped"]["step"] == 4
    assert runs["balanced resumed"]["stop_reason"] == "finished", runs["balanced resumed"]
    run = folder / "balanced/fold-2"
    rows = [
        json.loads(line)
        for path in run.glob("ledger/attempt-*/*")
        for line in path.read_text().splitlines()
    ]
    assert {row["epoch"] for row in rows} == {0, 1}  # of a class; the run has one of all samples
    checked = audit.audit(str(run))
    assert (checked.attempts, checked.steps, checked.is_exact) == (2, 6, True)


def test_the_best_epoch_is_tested_and_training_ends_early(
    runs: dict[str, Any], data: Path, folder: Path, tmp_path: Path
) -> None:
    """An epoch is 3 steps: 12 samples of two persons; as many validate, and one person tests."""
    assert runs["validated stopped"]["step"] == 3
    assert runs["validated"]["stop_reason"] == "finished", runs["validated"]
    run = folder / "validated/fold-2"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "validation"]
    assert {event["samples"] for event in found} == {12}, "the test has six"
    scores = {event["step"]: event["score"] for event in found}
    best, end = max(scores, key=lambda step: (scores[step], -step)), max(scores)
    assert list(scores) == list(range(3, end + 1, 3))
    assert end == min(best + 3, 12)
    assert best < end, "the network of the last epoch would be tested in any case"
    assert store.latest_committed(str(run)) == end
    assert json.loads((run / "checkpoints/best.json").read_text())["step"] == best
    rows = [
        json.loads(line)
        for path in run.glob("ledger/attempt-*/*")
        for line in path.read_text().splitlines()
    ]
    trained_on = {row["key"].split("/")[-1].split("_")[0] for row in rows}
    assert len(trained_on) == 2
    assert str(ACTORS[1]) not in trained_on
    assert audit.audit(str(run)).is_exact
    where, _ = trained.locate_weights(str(run))
    assert f"step-{best:09d}" in where
    config = recipe.from_tables(tables(data, folder / "unused"), where="test")
    command.evaluate(config, str(folder / "validated"), predictions_url=str(tmp_path / "again"))
    said = Predictions.read(str(run / "predictions.jsonl"))
    assert np.allclose(said.scores, Predictions.read(str(tmp_path / "again")).scores, atol=1e-6)


def test_an_average_continues_in_another_zero_stage(runs: dict[str, Any], folder: Path) -> None:
    assert runs["ema in stage 0"]["stop_reason"] == "finished", runs["ema in stage 0"]
    run = str(folder / "ema-0/fold-2")
    assert [store.read_state(run, step).zero_stage for step in (4, 6)] == [3, 0]
    one, other = state(folder / "ema/fold-2"), state(folder / "ema-0/fold-2")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_adapters_continue_in_another_zero_stage(folder: Path, runs: dict[str, Any]) -> None:
    assert runs["lora resumed"]["stop_reason"] == "finished", runs["lora resumed"]
    run = str(folder / "lora-cut/fold-2")
    assert [store.read_state(run, step).zero_stage for step in (4, 6)] == [1, 2]


def test_adapters_are_merged_where_the_network_is_used(
    runs: dict[str, Any], data: Path, folder: Path, tmp_path: Path
) -> None:
    """Exported, tested again, or as the start of another fine-tuning."""
    run = str(folder / "lora/fold-2")
    build, apart = weights.load(f"{run}/checkpoints/step-000000006/model.safetensors")
    assert build["lora"] == {"rank": 4, "alpha": 16.0}
    adapted = classifier.build(**build).eval()
    adapted.load_state_dict(apart)
    export.export(run, str(tmp_path / "export"), "safetensors", overrides={})
    network = inference.load(str(tmp_path / "export"))
    assert "lora" not in network.info.build
    assert not any("adapter" in name for name in network.state_dict())
    clips = torch.randint(0, 256, (3, 8, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(network.outputs(clips), adapted(clips), atol=1e-5, rtol=0)
        adapted.load_state_dict(
            {n: torch.zeros_like(v) if n.endswith("adapter.up") else v for n, v in apart.items()}
        )
        assert not torch.allclose(network.outputs(clips), adapted(clips), atol=1e-3)
    config = recipe.from_tables(tables(data, folder / "unused"), where="test")
    command.evaluate(config, str(folder / "lora"), predictions_url=str(tmp_path / "again.jsonl"))
    then = Predictions.read(f"{run}/predictions.jsonl")
    now = Predictions.read(str(tmp_path / "again.jsonl"))
    assert np.allclose(then.scores, now.scores, atol=1e-5)
    assert runs["lora again"]["stop_reason"] == "finished", runs["lora again"]
    began = state(folder / "again/fold-2")["encoder.blocks.0.attn.qkv.weight"]
    assert torch.equal(began, network.state_dict()["encoder.blocks.0.attn.qkv.weight"])


def test_weights_of_another_encoder_are_refused_by_the_recipes_words(runs: dict[str, Any]) -> None:
    assert runs["too large"]["error"] == "ConfigError"
    assert "model.embed_dim" in runs["too large"]["message"]
    assert "model.size=nano" in runs["too large"]["message"]


@pytest.mark.parametrize("place", ["", "/fold-2", "/fold-2/checkpoints/step-000000006"])
def test_testing_again_says_the_same(
    runs: dict[str, Any], data: Path, folder: Path, place: str
) -> None:
    assert runs["calm"]["stop_reason"] == "finished"
    config = recipe.from_tables(tables(data, folder / "unused"), where="test")
    results = command.evaluate(config, str(folder / "calm") + place)
    said = json.loads((folder / "calm/results.json").read_text())
    assert json.loads(results.to_json())["confusion"] == said["confusion"]


def test_testing_again_is_refused_where_other_values_would_be_wrong_or_not_heard(
    runs: dict[str, Any], data: Path, folder: Path
) -> None:
    wanted = tables(data, folder)
    wanted["data"] |= {"frame_size": 48}
    other = recipe.from_tables(wanted, where="test")
    with pytest.raises(CheckpointError, match=r"other clips.*data.frame_size = 32.*has 48"):
        command.evaluate(other, str(folder / "calm"))
    changed = tables(data, folder / "straight", finetune={"test_segments": 5})
    with pytest.raises(ConfigError, match=r"5, but .*fold-2 was tested with 2.*svfap evaluate"):
        finetune.run(recipe.from_tables(changed, where="test"), pytest.fail)


def test_what_outputs_mean_is_the_networks_and_not_the_recipes(
    runs: dict[str, Any], data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, theirs = trained.locate_weights(str(folder / "calm/fold-2"))
    output = theirs.finetune.model_copy(update={"output": "tanh"})
    found = (path, theirs.model_copy(update={"finetune": output}))
    monkeypatch.setattr(trained, "locate_weights", lambda url: found)
    seen: list[str] = []
    score_selection = runner.score_selection

    def watched(config: Any, *arguments: Any) -> Any:
        seen.append(config.finetune.output)
        return score_selection(config, *arguments)

    monkeypatch.setattr(runner, "score_selection", watched)
    command.evaluate(recipe.from_tables(tables(data, folder), where="test"), str(folder / "calm"))
    assert seen == ["tanh"]


def test_all_folds_share_one_time_limit_and_each_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"task": TASK | {"fold": 0}, "train": {"max_seconds": 100}}
    config = recipe.from_tables(recipe_tables("d", str(tmp_path)) | changes, where="test")
    monkeypatch.setattr(loop, "preflight", lambda *given: SimpleNamespace(step=0))
    now, limits = [7.0], []
    monkeypatch.setattr(finetune.time, "monotonic", lambda: now[0])

    def train(one: Config, _: Any) -> Any:
        limits.append(one.train.max_seconds)
        now[0] += 40.5
        right = np.eye(len(TASK["names"]), dtype=np.float32)[:2]
        said = right if len(limits) == 1 else right[::-1]
        Predictions(("a", "b"), np.arange(2), said).write(f"{one.run.url}/predictions.jsonl")
        return SimpleNamespace(step=3, stop_reason="finished" if len(limits) < 4 else TIME_IS_UP)

    told: list[str] = []
    ended = finetune.run(
        config, train, on_tested=lambda fold, results: told.append(f"{fold}: {results.line()}")
    )
    assert limits == [100, 60, 19, 1]
    assert told == [
        "1: UAR 100.00 %, WAR 100.00 %",
        *(f"{f}: UAR 0.00 %, WAR 0.00 %" for f in (2, 3)),
    ]
    assert [one.run.name for one in finetune.configs_of_folds(config).values()] == [
        f"{config.run.name}-fold-{fold}" for fold in (1, 2, 3, 4, 5)
    ]
    assert (ended.stop_reason, ended.fold) == (TIME_IS_UP, 4)


def test_the_license_of_the_initial_weights_is_stored_and_kept_when_these_are_gone(
    runs: dict[str, Any], folder: Path
) -> None:
    """Runs that resume have no readable finetune.init; "again" began with "lora"."""
    licenses = {
        run: inference.load(str(folder / run / "fold-2")).info.license
        for run in ("straight", "lora", "lora-cut", "attentive-cut", "linear", "again")
    }
    assert licenses.pop("straight") == ""
    assert set(licenses.values()) == {"CC-BY-NC-4.0"}


def test_runs_store_where_their_initial_weights_are_for_any_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "preflight", lambda *given: SimpleNamespace(step=0))
    stored: list[str] = []

    def train(one: Config, _: Any) -> Any:
        stored.append(one.finetune.init)
        return SimpleNamespace(step=3, stop_reason=TIME_IS_UP)

    for init in ("runs/base", "s3://bucket/runs/base", "hf://owner/name", ""):
        wanted = recipe_tables("d", "run") | {"task": TASK, "finetune": {"init": init}}
        finetune.run(recipe.from_tables(wanted, where="test"), train)
    assert stored == [str(tmp_path / "runs/base"), "s3://bucket/runs/base", "hf://owner/name", ""]


def test_seeds_are_runs_of_their_own_that_are_summed_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"task": TASK | {"fold": 2}, "finetune": {"seeds": 3}}
    wanted = recipe_tables("d", str(tmp_path), run={"seed": 7}) | changes
    config = recipe.from_tables(wanted, where="test")
    monkeypatch.setattr(loop, "preflight", lambda *given: SimpleNamespace(step=0))
    trained_on: list[tuple[int, str]] = []
    says = np.eye(len(TASK["names"]), dtype=np.float32)[:4]

    def train(one: Config, _: Any) -> Any:
        trained_on.append((one.run.seed, one.run.url.removeprefix(f"{tmp_path}/")))
        assert one.finetune.seeds == 1
        right = len(trained_on)  # of four
        scores = np.concatenate([says[:right], np.roll(says, 1, axis=0)[right:]])
        Predictions(tuple("abcd"), np.arange(4), scores).write(f"{one.run.url}/predictions.jsonl")
        return SimpleNamespace(step=3, stop_reason="finished")

    ended = finetune.run(config, train)
    assert trained_on == [(7, "seed-1/fold-2"), (8, "seed-2/fold-2"), (9, "seed-3/fold-2")]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["seeds"] == 3
    war = content["metrics"]["war"]
    assert war["per_seed"] == [25.0, 50.0, 75.0]
    assert (war["mean"], war["deviation"]) == (50.0, 25.0)
    low, high = war["interval"]
    assert low < 50 < high
    lines = "\n".join(ended.lines())
    assert "mean over seeds" in lines
    assert "95 % interval" in lines
    assert (tmp_path / "seed-2/results.json").exists()


def test_a_begun_run_may_get_more_seeds_but_not_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loop, "preflight", lambda *given: SimpleNamespace(step=0))
    trained_on: list[str] = []

    def train(one: Config, _: Any) -> Any:
        trained_on.append(one.run.url.removeprefix(f"{tmp_path}/"))
        Path(one.run.url).mkdir(parents=True, exist_ok=True)
        (Path(one.run.url) / "config.toml").write_text(recipe.dumps(one))
        right = np.eye(len(TASK["names"]), dtype=np.float32)[:2]
        Predictions(("a", "b"), np.arange(2), right).write(f"{one.run.url}/predictions.jsonl")
        return SimpleNamespace(step=3, stop_reason="finished")

    def run(name: str, seeds: int, fold: int = 2) -> None:
        wanted = recipe_tables("d", str(tmp_path / name))
        wanted |= {"task": TASK | {"fold": fold}, "finetune": {"seeds": seeds}}
        finetune.run(recipe.from_tables(wanted, where="test"), train)

    run("many", 2)
    run("many", 3)
    assert trained_on == [f"many/seed-{number}/fold-2" for number in (1, 2, 3)]
    assert json.loads((tmp_path / "many/results.json").read_text())["seeds"] == 3
    run("one", 1)
    for name, seeds, fold, found, advice in (
        ("many", 2, 2, "2, but .*many has seed-1/ to seed-3/", "3 or more, or give another"),
        ("many", 1, 4, "1, but .*many has seed-1/ to seed-3/", "3 or more, or give another"),
        ("one", 2, 4, "2, but .*one has a run of one seed", "1, or give another"),
    ):
        message = f"(?s)does not fit the begun run.*{found}.*set finetune.seeds={advice} run.url"
        with pytest.raises(ConfigError, match=message):
            run(name, seeds, fold)
    assert len(trained_on) == 4


def test_samples_that_cannot_be_tested_are_told(
    runs: dict[str, Any], data: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = folder / "damaged"
    shutil.copytree(data, damaged)
    index = json.loads((damaged / "shard-000000.index.json").read_text())
    row = next(n for n, labels in enumerate(index["labels"]) if labels["fold"] == 2)
    with open(damaged / "shard-000000.tar", "r+b") as tar:
        tar.seek(index["offsets"][row] + 1024)
        tar.write(b"\0" * 512)
    config = recipe.from_tables(tables(damaged, folder / "unused"), where="test")
    results = command.evaluate(config, str(folder / "calm"))
    assert results.pooled.num_samples == 5
    assert (
        f"1 of 6 test samples cannot be used and do not count; the first: {index['keys'][row]}"
        in caplog.text
    )


@pytest.mark.slow
def test_two_ranks_learn_and_say_what_one_does(
    runs: dict[str, Any], data: Path, folder: Path
) -> None:
    wanted = tables(data, folder / "calm-2", finetune=CALM, augment=STILL)
    results = start(2, [("finetune", {"tables": wanted})], folder / "two")
    assert [result["stop_reason"] for result in results[0]] == ["finished"] * 2
    one, two = (
        Predictions.read(str(folder / name / "fold-2/predictions.jsonl"))
        for name in ("calm", "calm-2")
    )
    assert one.keys == two.keys
    assert np.allclose(one.scores, two.scores, atol=1e-4)


@pytest.mark.slow
def test_a_finished_task_is_trained_and_tested_for_more_epochs(data: Path, folder: Path) -> None:
    """Six steps are an epoch. Predictions of the shorter training never count for the longer one,
    even if its first start fails when the new recipe is stored already."""
    run = folder / "longer/fold-2"

    def task(epochs: int, *allowed: str, **options: Any) -> tuple[str, dict[str, Any]]:
        train = {"max_steps": 0, "epochs": epochs}
        wanted = tables(data, folder / "longer", train=train)
        wanted["run"]["allow_change"] = list(allowed)
        return "finetune", {"tables": wanted, **options}

    start(1, [task(1)], folder / "shorter-ranks")
    shorter = (run / "predictions.jsonl").read_bytes()
    tasks = [
        task(2),
        task(2, "train.epochs", start_fails=True),
        task(2, "train.epochs"),
        task(2),
    ]
    unnamed, failed, longer, again = (of[0] for of in start(1, tasks, folder / "longer-ranks"))
    assert "train.epochs is 2, was 1" in unnamed["message"]
    assert "run.allow_change=train.epochs" in unnamed["message"]
    assert failed["message"].startswith("Planted")
    assert longer["stop_reason"] == again["stop_reason"] == "finished"

    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    starts = [event for event in events if event["event"] in ("start", "resume")]
    assert [(event["step"], event["total_steps"]) for event in starts] == [(0, 6), (6, 12)]
    (change,) = (event for event in events if event["event"] == "change")
    assert (change["key"], change["from"], change["to"]) == ("train.epochs", 1, 2)
    audited = audit.audit(str(run))
    assert (audited.steps, audited.is_exact) == (12, True)
    assert (run / "predictions.jsonl").read_bytes() != shorter
    tested = Predictions.read(str(run / "predictions.jsonl"))
    results = json.loads((folder / "longer/results.json").read_text())
    assert results["metrics"]["war"]["pooled"] == pytest.approx(
        100 * np.mean(tested.predicted() == tested.labels)
    )
