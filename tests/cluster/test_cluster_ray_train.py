"""Ranks by Ray Train, for real: a local cluster, two workers, and what a killed one costs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import types
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2.api.preemption import PreemptionInfo

from data_sharding.pipeline import shard
from svfap_dist.checkpoint import store
from svfap_dist.cluster import ray_train
from svfap_dist.cluster.board import Board
from svfap_dist.config import recipe
from svfap_dist.errors import ClusterError, ConfigError, HealthError
from svfap_dist.telemetry.goodput import NODES_LEAVING
from svfap_dist.train import loop
from svfap_dist.train.audit import audit
from svfap_dist.train.stalls import StallError

SMALL = [
    "model.size=nano",
    "data.num_frames=8",
    "data.sampling_rate=1",
    "data.frame_size=64",
    "train.log_every=1",
    "run.ledger=true",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("data") / "shards")
    shard("synthetic", "clips=32,frames=16,size=64", folder, min_frames=8, workers=0)
    return folder


def config_of(shards: str, run: Path | str, *overrides: str):
    places = [f"data.url={shards}", f"run.url={run}"]
    return recipe.load("tiny_cpu", [*places, *SMALL, *overrides])


def test_local_paths_do_not_depend_on_the_folder_of_a_rank():
    """Ray Train starts ranks in another folder than the driver's."""
    init = "s3://bucket/runs/base"
    config = config_of("shards", "runs/a", f"finetune.init={init}", "track.mlflow=mlruns")
    found = ray_train._with_absolute_paths(config)
    assert found.track.mlflow == os.path.abspath("mlruns")
    assert (found.data.url, found.run.url) == (os.path.abspath("shards"), os.path.abspath("runs/a"))
    assert (found.data.eval_url, found.finetune.init) == ("", init)
    assert found.fingerprint == config.fingerprint
    mixture = 'data.sources=[{url="shards"}, {url="s3://bucket/others"}]'
    config = recipe.load("tiny_cpu", [mixture, "run.url=runs/a", *SMALL])
    found = ray_train._with_absolute_paths(config)
    assert found.data.urls == (os.path.abspath("shards"), "s3://bucket/others")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sequence(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every log line, floats exactly as they were."""
    return [(row["step"], row["loss"]) for row in lines(run / "metrics.jsonl")]


def keys_by_step(run: Path) -> dict[int, list[tuple[int, str]]]:
    """What each step was trained on, by the last attempt that did it: (lane, key), sorted."""
    attempts: dict[int, dict[int, list[tuple[int, str]]]] = {}
    for path in sorted(run.glob("ledger/attempt-*/rank-*.jsonl")):
        steps = attempts.setdefault(int(path.parent.name[-4:]), {})
        for row in lines(path):
            steps.setdefault(row["step"], []).append((row["lane"], row["key"]))
    merged: dict[int, list[tuple[int, str]]] = {}
    for _, steps in sorted(attempts.items()):
        merged.update({step: sorted(found) for step, found in steps.items()})
    return merged


@pytest.mark.slow
def test_killed_rank_costs_nothing_but_time(shards, tmp_path, caplog):
    """kill -9 of a rank in mid-run: the group restarts and resumes with the same bits."""
    # The kill falls after the second checkpoint began, so that the first is committed, and rows
    # reach the driver well before the end, also on a busy machine.
    steps = ["train.max_steps=48", "train.checkpoint_every=8"]
    undisturbed = config_of(shards, tmp_path / "undisturbed", *steps)
    ray_train.train(undisturbed, on_log=lambda row: None)

    killed: list[int] = []

    def kill_rank_1(row: dict[str, Any]) -> None:
        if row["step"] > 16 and not killed:
            (start,) = [e for e in lines(run / "events.jsonl") if e["event"] == "start"]
            killed.append(start["ranks"][1]["pid"])
            os.kill(killed[0], signal.SIGKILL)

    run = tmp_path / "killed"
    result = ray_train.train(config_of(shards, run, *steps), on_log=kill_rank_1)

    assert killed
    assert "A rank failed" in caplog.text
    # Rank 0 may have lost its connection to rank 1 by the time that Ray looks.
    assert re.search(r"Failed: rank (0, )?1: ", caplog.text)
    assert result.step == 48
    events = [e["event"] for e in lines(run / "events.jsonl")]
    assert "resume" in events
    assert sequence(run) == sequence(tmp_path / "undisturbed")
    assert keys_by_step(run) == keys_by_step(tmp_path / "undisturbed")


def test_ctrl_c_saves_a_checkpoint_on_all_ranks(shards, tmp_path):
    """Two ranks with ZeRO-2, log rows at the driver; the first Ctrl-C ends the run whole."""
    rows: list[dict[str, Any]] = []

    def interrupt_once(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == 1:
            signal.raise_signal(signal.SIGINT)

    # Enough steps that only the requested stop can end it within the test's time.
    config = config_of(shards, tmp_path / "run", "train.max_steps=100000")
    result = ray_train.train(config, on_log=interrupt_once)

    assert result.stop_reason != "finished"
    assert 0 < result.step < 100_000
    assert store.committed_steps(str(tmp_path / "run")) == [result.step]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.slow
def test_error_that_no_restart_fixes_is_raised_unchanged(shards, tmp_path):
    run = tmp_path / "run"
    config = config_of(shards, run, "optim.lr=1e30", "optim.warmup_lr=1e30")
    with pytest.raises(HealthError, match="not finite"):
        ray_train.train(config, on_log=lambda row: None)
    assert store.committed_steps(str(run)) == []


def test_mistakes_are_errors_before_any_rank_starts(shards, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="Window is longer"):
        ray_train.train(config_of(shards, run, "data.sampling_rate=4"), on_log=lambda row: None)
    with pytest.raises(ConfigError, match="temporal_kernel_size"):
        ray_train.train(config_of(shards, run, "data.num_frames=6"), on_log=lambda row: None)
    assert not ray.is_initialized()
    assert not run.exists()


def test_cluster_too_small_is_an_error_at_once(shards, tmp_path):
    config = config_of(shards, tmp_path / "run", "cluster.use_gpu=true")
    with pytest.raises(ClusterError, match="GPU"):
        ray_train.train(config, on_log=lambda row: None)


def test_ranks_get_the_settings_of_the_driver(shards, tmp_path, monkeypatch):
    """Access to store, trackers and Hub, the network's settings, the log level; nothing else."""
    settings = {
        "AWS_ENDPOINT_URL": "http://store",
        "SVFAP_LOG": "debug,json",
        "NCCL_SOCKET_IFNAME": "eth1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "UCX_NET_DEVICES": "mlx5_0:1",
        "TORCH_FR_BUFFER_SIZE": "100",
        "WANDB_API_KEY": "key",
        "MLFLOW_TRACKING_TOKEN": "token",
        "HF_TOKEN": "token",
        "HF_ENDPOINT": "http://hub",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("HF_HOME", "/home/user/cache")
    found = ray_train._variables(config_of(shards, tmp_path))
    assert settings.items() <= found.items()
    assert not {"SECRET", "HF_HOME"} & found.keys()


def test_gloo_listens_on_loopback_in_a_cluster_of_this_machine(shards, tmp_path, monkeypatch):
    for address, interface in (("127.0.0.1", "lo"), ("10.0.0.5", None)):
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda address=address: address)
        found = ray_train._variables(config_of(shards, tmp_path))
        assert found.get("GLOO_SOCKET_IFNAME") == interface


def test_only_ranks_on_cpus_have_one_arena(shards, tmp_path):
    """On a GPU rank dozens of threads would wait for one lock of the allocator."""
    assert ray_train._variables(config_of(shards, tmp_path))["MALLOC_ARENA_MAX"] == "1"
    on_gpu = config_of(shards, tmp_path, "cluster.use_gpu=true")
    assert "MALLOC_ARENA_MAX" not in ray_train._variables(on_gpu)


def test_only_gpu_ranks_record_their_collectives(shards, tmp_path, monkeypatch):
    """By NCCL, for the report of a stall; unless the user has set it."""
    names = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    on_gpu = config_of(shards, tmp_path, "cluster.use_gpu=true")
    assert ray_train._variables(on_gpu)[names[0]] == "2000"
    assert names[0] not in ray_train._variables(config_of(shards, tmp_path))
    monkeypatch.setenv(names[1], "7")
    found = ray_train._variables(on_gpu)
    assert (found[names[1]], names[0] in found) == ("7", False)


def test_a_rank_knows_which_nodes_leave_without_any_other(monkeypatch):
    """Ray Train writes it into each rank's memory; its public function waits for all ranks."""
    known = PreemptionContext()
    context = types.SimpleNamespace(preemption_context=known)
    monkeypatch.setattr("ray.train.v2._internal.execution.context._train_context", context)
    assert ray_train._nodes_leaving() == set()
    known.preemption_info = PreemptionInfo(None, {"node-b": [2, 3], "node-a": [0]})
    assert ray_train._nodes_leaving() == {"node-a", "node-b"}


def test_a_rank_that_fails_while_it_exits_does_not_begin_an_ended_run_again(
    shards, tmp_path, monkeypatch, caplog
):
    """Ray restarts the group; its ranks have nothing to do, and what has ended well stays so."""
    config, result = config_of(shards, tmp_path), object()
    actor = Board(context=None)
    actor.put("result", result)
    board = types.SimpleNamespace(get=types.SimpleNamespace(remote=actor.get))
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(loop, "run", lambda *_, **__: pytest.fail("a rank trains again"))
    ray_train._rank({"config": config.model_dump(mode="json"), "board": board})

    values = actor.read()[1]
    assert ray_train._outcome(values, None, config) is result
    assert ray_train._outcome(values, RuntimeError("died at exit"), config) is result
    assert "died at exit" in caplog.text
    with pytest.raises(ClusterError, match="died earlier"):
        ray_train._outcome({}, RuntimeError("died earlier"), config)


@pytest.mark.parametrize(
    ("sizes", "ranks", "leaving", "reason"),
    [
        ((2, 4), 4, [3], NODES_LEAVING),  # 3 stay, of which 2 train
        ((2, 4), 4, [1, 2, 3], ""),  # too few: use the nodes until they are gone
        ((4,), 4, [3], ""),  # not elastic
        ((2, 4), 4, None, ""),
    ],
)
def test_ranks_leave_a_node_at_once_if_enough_of_them_stay(
    monkeypatch, sizes, ranks, leaving, reason
):
    known = PreemptionContext(PreemptionInfo(None, {"node": leaving}) if leaving else None)
    context = types.SimpleNamespace(preemption_context=known)
    monkeypatch.setattr("ray.train.v2._internal.execution.context._train_context", context)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert ray_train._reason_to_shrink(sizes) == reason


@pytest.mark.slow
@pytest.mark.sequential
def test_a_stopped_rank_is_noticed_named_and_replaced(shards, tmp_path):
    """SIGSTOP of a rank under Ray: its stack cannot be had, those of the others are in the run."""
    stopped: list[float] = []
    run = tmp_path / "run"

    def stop_rank_1(row: dict[str, Any]) -> None:
        if row["step"] >= 6 and not stopped:
            (start,) = [e for e in lines(run / "events.jsonl") if e["event"] == "start"]
            stopped.append(time.time())
            os.kill(start["ranks"][1]["pid"], signal.SIGSTOP)

    seconds = 10
    config = config_of(
        shards,
        run,
        "train.max_steps=40",
        "train.checkpoint_every=4",
        f"train.stall_seconds={seconds}",
    )
    result = ray_train.train(config, on_log=stop_rank_1)

    assert result.step == 40
    events = lines(run / "events.jsonl")
    (stall,) = [event for event in events if event["event"] == "stall"]
    assert (stall["ranks"], stall["kind"]) == ([1], "silent")
    assert "stopped by a signal" in stall["error"][2]
    resumed = next(event for event in events if event["event"] == "resume")
    noticed = stall["time"] - stopped[0]
    print(f"noticed {noticed:.1f} s, resumed {resumed['time'] - stopped[0]:.1f} s")
    assert noticed < seconds + 15
    assert "Thread" in (run / "stalls/attempt-0001/rank-0000.txt").read_text()
    assert audit(str(run)).is_exact


@pytest.mark.slow
@pytest.mark.sequential
def test_the_driver_s_last_message_names_the_stalled_rank(shards, tmp_path):
    run = tmp_path / "run"

    def stop_rank_1(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            (start,) = [e for e in lines(run / "events.jsonl") if e["event"] == "start"]
            os.kill(start["ranks"][1]["pid"], signal.SIGSTOP)

    limits = ["train.stall_seconds=10", "cluster.max_failures=0", "train.max_steps=400"]
    with pytest.raises(StallError, match=r"rank 1 \(process"):
        ray_train.train(config_of(shards, run, *limits), on_log=stop_rank_1)
