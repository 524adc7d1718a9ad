"""A real Prometheus with our rules: alerts of runs in trouble, and the rules' own tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import yaml
from prometheus import Prometheus, wait_until
from watched_runs import start, stop

from data_sharding.pipeline import shard
from svfap_dist import bundled
from svfap_dist.distributed import free_port

pytestmark = pytest.mark.services

RULES = bundled.folder("monitoring") / "prometheus/rules.yml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("data") / "shards")
    shard("synthetic", "clips=16", url)
    return url


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def prometheus(tmp_path, port) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path, port)
    try:
        yield server
    finally:
        server.stop()


def test_a_restart_loop_raises_its_alert(prometheus, shards, tmp_path, port) -> None:
    for number in range(4):
        run = start(shards, tmp_path / "run", port, 1, "train.max_steps=100000")
        try:
            wait_until(lambda n=number: prometheus.query(f"svfap_restarts == {n}"), 120)
            assert number == 3 or "SvfapRestartLoop" not in prometheus.firing()
        finally:
            run.kill()
            run.wait()
    wait_until(lambda: "SvfapRestartLoop" in prometheus.firing(), 30)


def test_a_non_finite_loss_raises_its_alert(prometheus, shards, tmp_path, port) -> None:
    diverging = ("optim.lr=1e30", "optim.warmup_lr=1e30", "optim.min_lr=1e30")
    run = start(shards, tmp_path / "mad", port, 1, *diverging, "metrics.linger_seconds=20")
    try:
        wait_until(lambda: "SvfapNonFinite" in prometheus.firing(), 120)
    finally:
        stop(run)


def test_promtool_accepts_the_files() -> None:
    config = RULES.parent / "prometheus.yml"
    for command in (["check", "rules", str(RULES)], ["check", "config", str(config)]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_s_unit_tests_of_the_rules(tmp_path) -> None:
    """An hour of a run with one failure after another: which alerts fire, and when."""
    ok = {"run": "r", "rank": "0"}

    def series(name: str, values: str, **labels: str) -> dict[str, str]:
        pairs = ", ".join(f'{k}="{v}"' for k, v in (ok | labels).items())
        return {"series": f"{name}{{{pairs}}}", "values": values}

    told = [
        ("SvfapNoStep", "5m", False),
        ("SvfapNoStep", "13m", True),
        ("SvfapDataBound", "9m", False),
        ("SvfapDataBound", "20m", True),
        ("SvfapRestartLoop", "5m", False),
        ("SvfapRestartLoop", "16m", True),
        ("SvfapQuarantineGrowing", "30m", True),
        ("SvfapLowGoodput", "29m", False),
        ("SvfapLowGoodput", "31m", True),
        ("SvfapCheckpointTooOld", "2h", False),
        ("SvfapCheckpointTooOld", "130m", True),
        ("SvfapNonFinite", "1m", False),
        ("SvfapNonFinite", "61m", True),
        ("SvfapUpdatesSkipped", "39m", False),
        ("SvfapUpdatesSkipped", "41m", True),
        ("SvfapRolledBack", "49m", False),
        ("SvfapRolledBack", "51m", True),
        ("SvfapStalled", "44m", False),
        ("SvfapStalled", "46m", True),
        ("SvfapStalled", "76m", False),
        ("SvfapLossSpike", "69m", False),
        ("SvfapLossSpike", "71m", True),
        ("SvfapStraggler", "29m", False),
        ("SvfapStraggler", "31m", True),
        ("SvfapStorageFailing", "4m", False),
        ("SvfapStorageFailing", "12m", True),
    ]
    inputs = [
        series("svfap_last_step_timestamp_seconds", "0+0x140"),
        series("svfap_step_seconds_total", "0+60x140"),
        series("svfap_data_wait_seconds_total", "0+30x140"),
        series("svfap_clips_total", "0+1000x140"),
        series("svfap_bad_samples_total", "0+10x140", reason="damaged"),
        series("svfap_straggler_cost_ratio", "0.09+0x19 0.11+0x120"),
        series("svfap_restarts", "0+0x9 1 1 2 2 3 3+0x120"),
        series("svfap_goodput_ratio", "0.5+0x140"),
        series("svfap_checkpoint_timestamp_seconds", "0+0x140"),
        series("svfap_non_finite_total", "0+0x39 1+0x100"),
        series("svfap_rollbacks", "0+0x49 1+0x90"),
        series("svfap_stalls", "0+0x44 1+0x95"),
        series("svfap_loss_spikes_total", "0+0x69 1+0x70"),
        series("svfap_ended_not_finite", "0+0x60 1+0x79"),
        series("svfap_storage_requests_total", "0+90x140", operation="read", outcome="ok"),
        series("svfap_storage_requests_total", "0+10x140", operation="read", outcome="refused"),
    ]
    names = {name for name, _, _ in told}
    checks = []
    for name in sorted(names):
        for at in [at for known, at, _ in told if known == name]:
            fires = (name, at, True) in told
            checks.append({"eval_time": at, "alertname": name, "fires": fires})
    rules = yaml.safe_load(RULES.read_text())
    by_name = {r["alert"]: r for g in rules["groups"] for r in g["rules"] if "alert" in r}
    expressions = [
        {
            "expr": f"count({_firing(check['alertname'])}) or vector(0)",
            "eval_time": check["eval_time"],
            "exp_samples": [{"labels": "{}", "value": int(check["fires"])}],
        }
        for check in checks
    ]
    assert names <= by_name.keys()
    tests = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {"interval": "1m", "input_series": inputs, "promql_expr_test": expressions},
        ],
    }
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _firing(alert: str) -> str:
    return f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
