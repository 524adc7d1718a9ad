"""Whole runs on real ranks: results, files, and resuming after a stop or a kill.

Ranks are started few times with many tasks each, since imports take most of the time.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import make_video
from train_ranks import enums_of_debian_12, recipe_tables, start

from data_sharding import pipeline as sharding
from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.reshard import reshard_checkpoint
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model import weights
from svfap_dist.report import page
from svfap_dist.train.audit import audit

pytestmark = pytest.mark.timeout(1000)  # more than the runs may take on a busy machine

STEPS = list(range(1, 13))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """Shards of fourteen little videos: three steps of four make an epoch."""
    for number in range(14):
        make_video(folder / f"videos/clip{number:02d}.mp4", 12, seed=number)
    url = folder / "shards"
    sharding.shard(
        "folder", str(folder / "videos"), str(url), min_frames=8, max_samples_per_shard=5, workers=0
    )
    return url


@pytest.fixture(scope="module")
def damaged_data(data: Path, folder: Path) -> Path:
    """The same shards with the bytes of the last sample overwritten."""
    url = folder / "damaged"
    shutil.copytree(data, url)
    index = json.loads((url / "shard-000002.index.json").read_text())
    with open(url / "shard-000002.tar", "r+b") as tar:
        tar.seek(index["offsets"][-1] + 1024)
        tar.write(b"\0" * 512)
    return url


@pytest.fixture(scope="module")
def two_ranks(data: Path, damaged_data: Path, folder: Path) -> dict[str, list[Any]]:
    """Attempts on two ranks, by name; the last one ends by a kill."""

    def task(run: str, url: Path = data, **options: Any) -> tuple[str, dict[str, Any]]:
        changes = options.pop("changes", {})
        tables = recipe_tables(str(url), str(folder / run), **changes)
        return "train", {"tables": tables, **options}

    tracked = {"data": {"eval_url": str(damaged_data)}, "track": {"tensorboard": True}}
    tasks = {
        "straight": task("straight-2", changes=tracked),
        "stopped": task("cut-2", stop_after=6, changes={"profile": {"steps": [2, 3]}}),
        "resumed": task("cut-2"),
        "for one": task("2-to-1", stop_after=6, changes={"profile": {"steps": [5, 50]}}),
        "damaged": task("damaged", damaged_data, changes={"data": {"max_bad_fraction": 0.5}}),
        "too bad": task("too-bad", damaged_data, changes={"data": {"max_bad_fraction": 0.0}}),
        "exploding": task("exploding", changes={"optim": {"lr": 1e30, "clip_grad_norm": 0.0}}),
        "killed": task("killed", die_after=10),
    }
    results = start(2, list(tasks.values()), folder / "two", last_dies=True)
    return dict(zip(tasks, results, strict=False))


@pytest.fixture(scope="module")
def two_ranks_again(
    one_rank: dict[str, Any],
    two_ranks: dict[str, Any],
    data: Path,
    damaged_data: Path,
    folder: Path,
) -> dict[str, Any]:
    """The killed run resumed, and the one of one rank; then a run at ZeRO-3, which leaves
    DeepSpeed's own linear layer in the process and so changes last bits of what comes after it."""
    changes = {
        "train": {"zero_stage": 3, "micro_batch_size": 2},
        "data": {"eval_url": str(damaged_data)},
        "track": {"tensorboard": True},
    }
    stage_3 = recipe_tables(str(data), str(folder / "stage-3"), **changes)
    killed = recipe_tables(str(data), str(folder / "killed"))
    grown = recipe_tables(str(data), str(folder / "1-to-2"))
    tasks = {
        "killed": ("train", {"tables": killed}),
        "from one": ("train", {"tables": grown}),
        "stage 3": ("train", {"tables": stage_3, "stop_after": 2}),
    }
    before = store.latest_committed(str(folder / "killed"))
    results = start(2, list(tasks.values()), folder / "again")
    return {"step before": before, **dict(zip(tasks, results, strict=True))}


@pytest.fixture(scope="module")
def one_rank(
    two_ranks: dict[str, Any], data: Path, damaged_data: Path, folder: Path
) -> dict[str, Any]:
    """Attempts on one rank, by name. Feeders fill the batches of the run that is stopped."""

    def task(run: str, **options: Any) -> tuple[str, dict[str, Any]]:
        changes = options.pop("changes", {})
        tables = recipe_tables(str(data), str(folder / run), **changes)
        return "train", {"tables": tables, **options}

    def explosion(stage: int) -> tuple[str, dict[str, Any]]:
        tables = recipe_tables(str(data), "unused", train={"zero_stage": stage})
        return "explode", {"tables": tables}

    with enums_of_debian_12():
        reshard_checkpoint(str(folder / "2-to-1"), str(folder / "reshaped"), world_size=1)
    tasks = {
        "straight": task("straight-1", changes={"data": {"eval_url": str(damaged_data)}}),
        "stopped": task("cut-1", stop_after=6, changes={"data": {"feeders": 1}}),
        "resumed": task("cut-1", changes={"data": {"feeders": 2}}),
        "from two": task("2-to-1"),
        "for two": task("1-to-2", stop_after=6),
        "again": task("straight-1"),
        "other recipe": task("straight-1", changes={"optim": {"lr": 0.2}}),
        "from reshaped": task("reshaped"),
        "explosion 0": explosion(0),
        "explosion 2": explosion(2),
    }
    return dict(zip(tasks, start(1, list(tasks.values()), folder / "one"), strict=True))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in lines(run / "metrics.jsonl")]


def keys(run: Path) -> list[tuple[int, tuple[str, ...]]]:
    """The keys of each step in lane order, from the ledgers; void lines left out."""
    events = lines(run / "events.jsonl")
    starts = {e["attempt"]: e["step"] for e in events if e["event"] in ("start", "resume")}
    slots: dict[int, list[tuple[int, str]]] = {}
    for attempt in starts:
        limit = min([step for later, step in starts.items() if later > attempt], default=99)
        for path in sorted((run / f"ledger/attempt-{attempt:04d}").iterdir()):
            for line in lines(path):
                if line["step"] <= limit:
                    slots.setdefault(line["step"], []).append((line["lane"], line["key"]))
    return [(step, tuple(key for _, key in sorted(slots[step]))) for step in sorted(slots)]


def test_a_run_ends_with_all_it_promises(two_ranks: dict[str, Any], folder: Path) -> None:
    run = folder / "straight-2"
    assert [result["stop_reason"] for result in two_ranks["straight"]] == ["finished"] * 2
    assert [step for step, _ in losses(run)] == STEPS
    assert two_ranks["straight"][1]["loss"] == losses(run)[-1][1]  # rank 1 knows it too
    assert store.committed_steps(str(run)) == [4, 8, 12]
    store.verify(str(run), 12)
    weights.load_autoencoder(str(run / "checkpoints/step-000000012/model.safetensors"))
    events = lines(run / "events.jsonl")
    uneven = ("checkpoint", "window")
    named = [event["event"] for event in events if event["event"] not in uneven]
    assert named == ["start", "ready", "eval", "first_step", "eval", "stop"]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [4, 8, 12]
    assert len({rank["metrics"] for rank in events[0]["ranks"]}) == 2
    assert len({rank["pid"] for rank in events[0]["ranks"]}) == 2


def test_every_epoch_sees_each_sample_at_most_once(two_ranks: dict[str, Any], folder: Path) -> None:
    steps = keys(folder / "straight-2")
    assert [step for step, _ in steps] == STEPS
    for epoch in range(4):
        seen = [key for _, of_step in steps[3 * epoch : 3 * epoch + 3] for key in of_step]
        assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopping_and_resuming_changes_no_bit(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], folder: Path, ranks: int
) -> None:
    results = one_rank if ranks == 1 else two_ranks
    stopped, resumed = results["stopped"], results["resumed"]
    assert [(r["step"], r["stop_reason"]) for r in stopped] == [(6, "stop requested")] * ranks
    assert [(r["step"], r["stop_reason"]) for r in resumed] == [(12, "finished")] * ranks
    straight, cut = folder / f"straight-{ranks}", folder / f"cut-{ranks}"
    assert losses(cut) == losses(straight)
    assert keys(cut) == keys(straight)


def test_two_ranks_see_what_one_sees(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], folder: Path
) -> None:
    one, two = folder / "straight-1", folder / "straight-2"
    assert keys(two) == keys(one)
    assert losses(two) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in losses(one)]


def test_the_held_out_loss_does_not_depend_on_the_ranks(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], two_ranks_again: dict[str, Any]
) -> None:
    """Thirteen good clips, each a batch; at ZeRO-3 batches of 2, 2, 2, 1 and of 2, 2, 2: every clip
    counts the same, and ZeRO-3 must not mind that one rank has a batch less."""
    expected = pytest.approx(one_rank["straight"][0]["first_held_out_loss"], abs=1e-5)
    for results in (two_ranks["straight"], two_ranks_again["stage 3"]):
        assert [result["first_held_out_loss"] for result in results] == [expected] * 2


@pytest.mark.parametrize("run", ["2-to-1", "1-to-2"])
def test_a_run_goes_on_with_another_number_of_ranks(
    one_rank: dict[str, Any], two_ranks_again: dict[str, Any], folder: Path, run: str
) -> None:
    one, resized = folder / "straight-1", folder / run
    results = one_rank["from two"] if run == "2-to-1" else two_ranks_again["from one"]
    assert [result["step"] for result in results] == [12] * len(results)
    resumed = next(event for event in lines(resized / "events.jsonl") if event["event"] == "resume")
    assert resumed["step"] == 6
    assert keys(resized) == keys(one)
    assert losses(resized) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in losses(one)]


def test_a_checkpoint_resharded_beforehand_resumes_to_the_same_bits(
    one_rank: dict[str, Any], folder: Path
) -> None:
    by_itself, beforehand = folder / "2-to-1", folder / "reshaped"
    assert [result["step"] for result in one_rank["from reshaped"]] == [12]
    assert store.read_state(str(beforehand), 6).universal
    assert losses(beforehand) == losses(by_itself)[6:]
    weights_of = "checkpoints/step-000000012/model.safetensors"
    found, expected = (weights.load(str(run / weights_of))[1] for run in (beforehand, by_itself))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_resharded_is_refused(
    one_rank: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    source = str(folder / "2-to-1/checkpoints/step-000000006")
    with pytest.raises(ConfigError, match=r"--world-size.*3 ranks"):
        reshard_checkpoint(source, str(tmp_path), world_size=3)
    with pytest.raises(ConfigError, match="needs no resharding"):
        reshard_checkpoint(str(folder / "reshaped/checkpoints/step-000000006"), str(tmp_path))
    with pytest.raises(CheckpointError, match="exists already"):
        reshard_checkpoint(source, str(folder / "reshaped"))
    assert list(tmp_path.iterdir()) == []


def test_real_runs_use_every_sample_exactly_once(
    one_rank: dict[str, Any], two_ranks_again: dict[str, Any], folder: Path
) -> None:
    found = {run: audit(str(folder / run)) for run in ("straight-2", "2-to-1", "killed", "damaged")}
    assert all(each.is_exact and each.steps == 12 for each in found.values())
    assert found["damaged"].substituted > 0
    assert found["killed"].redone >= 1
    assert audit(str(folder / "reshaped")).first_step == 7


def test_a_checkpoint_names_the_decode_backend(one_rank: dict[str, Any], folder: Path) -> None:
    """`auto` was settled when the run began, so that nothing can settle it otherwise later."""
    run = str(folder / "straight-1")
    assert one_rank["straight"][0]["step"] == 12
    assert store.read_state(run, 12).config["decode"]["backend"] == "pyav"


def test_a_finished_run_has_nothing_left_to_do(one_rank: dict[str, Any]) -> None:
    assert one_rank["again"] == one_rank["straight"]


def test_another_recipe_does_not_resume_the_run(one_rank: dict[str, Any]) -> None:
    result = one_rank["other recipe"][0]
    assert result["error"] == "ConfigError"
    assert "optim.lr is 0.2, was 0.1" in result["message"]


def test_a_kill_loses_only_steps_that_are_done_again(
    two_ranks_again: dict[str, Any], folder: Path
) -> None:
    run, before = folder / "killed", two_ranks_again["step before"]
    resumed = next(event for event in lines(run / "events.jsonl") if event["event"] == "resume")
    assert (resumed["step"], resumed["attempt"]) == (before, 2)
    assert before in (4, 8)  # it was killed in step 10, maybe before 8 was committed
    assert losses(run) == losses(folder / "straight-2")
    assert keys(run) == keys(folder / "straight-2")


def test_held_out_clips_and_weights_at_stage_3(
    two_ranks_again: dict[str, Any], folder: Path
) -> None:
    first, second = two_ranks_again["stage 3"]
    assert first == second
    assert 0.5 < first["held_out_loss"] != first["first_held_out_loss"] < 1.5
    path = folder / "stage-3/checkpoints/step-000000002/model.safetensors"
    weights.load_autoencoder(str(path))


def test_a_bad_sample_is_replaced_and_listed(two_ranks: dict[str, Any], folder: Path) -> None:
    run = folder / "damaged"
    assert two_ranks["damaged"][0]["step"] == 12
    quarantined = lines(run / "quarantine.jsonl")
    assert quarantined
    assert {line["reason"] for line in quarantined} == {"damaged"}
    ledger = [line for path in (run / "ledger/attempt-0001").iterdir() for line in lines(path)]
    replaced = {(line["step"], line["key"]) for line in ledger if line["substituted"]}
    assert replaced == {(line["step"], line["key"]) for line in quarantined}


def test_too_many_bad_samples_end_the_run_on_all_ranks(
    two_ranks: dict[str, Any], folder: Path
) -> None:
    assert [result["error"] for result in two_ranks["too bad"]] == ["HealthError"] * 2
    assert lines(folder / "too-bad/quarantine.jsonl")
    assert lines(folder / "too-bad/events.jsonl")[-1]["reason"] == "HealthError"


def test_an_exploding_run_ends_on_all_ranks(two_ranks: dict[str, Any], folder: Path) -> None:
    for result in two_ranks["exploding"]:
        assert result["error"] == "NotFiniteError"
        assert "not finite" in result["message"]
    assert len(losses(folder / "exploding")) < 12


@pytest.mark.parametrize("stage", [0, 2])
def test_a_bad_gradient_never_reaches_the_weights(one_rank: dict[str, Any], stage: int) -> None:
    assert one_rank[f"explosion {stage}"][0] == {
        "applied": [True, False],
        "loss_is_finite": [True, False],
        "weights_changed": [True, False],
    }


@pytest.mark.slow
def test_four_ranks_see_what_one_sees(one_rank: dict[str, Any], data: Path, folder: Path) -> None:
    one, four = folder / "straight-1", folder / "straight-4"
    start(4, [("train", {"tables": recipe_tables(str(data), str(four))})], folder / "four")
    assert keys(four) == keys(one)
    assert losses(four) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in losses(one)]


@pytest.mark.parametrize("run", ["straight-2", "stage-3"])
def test_trackers_get_a_reconstruction_with_each_validation(
    two_ranks_again: dict[str, Any], folder: Path, run: str
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = [e["step"] for e in lines(folder / run / "events.jsonl") if e["event"] == "eval"]
    found = EventAccumulator(str(folder / run / "tensorboard"), {"images": 0})
    found.Reload()
    pictures = found.Images("reconstruction")
    assert [picture.step for picture in pictures] == steps
    sizes = {(picture.width > 6 * 16, picture.height >= 3 * 16) for picture in pictures}
    assert sizes == {(True, True)}


@pytest.mark.parametrize(("run", "first", "last"), [("cut-2", 2, 3), ("2-to-1", 5, 6)])
def test_steps_are_traced_on_each_rank(
    two_ranks: dict[str, list[Any]], folder: Path, run: str, first: int, last: int
) -> None:
    """Up to the last step of `profile.steps`, or of the run."""
    steps, url = range(first, last + 1), folder / run
    files = []
    for rank in (0, 1):
        stem = f"profile/steps-{first:09d}-{last:09d}.rank-{rank:04d}"
        names = [f"{stem}.{kind}" for kind in ("operations.txt", "trace.json.gz")]
        files.append(names)
        table, trace = ((url / name).read_bytes() for name in names)
        events = json.loads(gzip.decompress(trace))["traceEvents"]
        ranges = [e["name"] for e in events if e.get("cat") == "user_annotation"]
        assert [name for name in ranges if name.startswith("ProfilerStep")] == [
            f"ProfilerStep#{step}" for step in steps
        ]
        micro_batches = 2 * len(steps)
        for name in ("data", "forward", "backward"):
            assert ranges.count(name) == micro_batches
        assert ranges.count("load") == ranges.count("optimizer") == len(steps)
        assert b"aten::" in table
        sizes = [e["args"]["Bytes"] for e in events if e["name"] == "[memory]"]
        assert min(sizes) < 0 < max(sizes)
    events = [json.loads(line) for line in (url / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "profile"]
    assert (event["first"], event["step"], event["files"]) == (first, last, files[0])
    page.make(str(url), str(folder / "report.html"))
    html = (folder / "report.html").read_text()
    assert all(Path(name).name in html for of_rank in files for name in of_rank)
    assert "aten::" in html
