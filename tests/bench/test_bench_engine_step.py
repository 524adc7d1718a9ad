"""`svfap bench step`: what it counts on a CPU, and which rows it makes."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
from typer.testing import CliRunner

from svfap_dist import cli
from svfap_dist.bench import engine_step
from svfap_dist.bench.clip_sets import ClipSet
from svfap_dist.bench.engine_step import StepSpec
from svfap_dist.distributed import World
from svfap_dist.profiling.loader import RankCost
from svfap_dist.profiling.ranks import run_on_local_ranks

SPEC = StepSpec("", 1, 2, "off", "bfloat16", "cpu", steps=2)
_update = engine_step._Steps.update
PLANTED_MS = 50.0


def _wait_once(steps: engine_step._Steps) -> None:
    _update(steps)
    float(steps.loss)


def _loop_over_parameters(steps: engine_step._Steps) -> None:
    _update(steps)
    for parameter in steps.engine._engine.module.parameters():
        parameter.data.mul_(1)


def _compute_on_the_host(steps: engine_step._Steps) -> None:
    _update(steps)
    end = time.thread_time() + PLANTED_MS / 1e3
    while time.thread_time() < end:
        pass


def _measure_variants(world: World) -> list[dict[str, Any]]:
    """Return the host's figures of the step as it is, and with something planted in it."""
    found = []
    for update in (_update, _wait_once, _loop_over_parameters, _compute_on_the_host):
        engine_step._Steps.update = update  # type: ignore[method-assign]
        found.append(engine_step._measure_host(SPEC, world))
    return found


def test_a_planted_wait_and_a_planted_loop_show() -> None:
    ((plain, waiting, looping, busy),) = run_on_local_ranks(_measure_variants, 1)
    assert waiting["device_waits"] == plain["device_waits"] + 1
    assert looping["update_operations"] == plain["update_operations"] + 441  # parameters of base
    assert looping["device_waits"] == plain["device_waits"]
    assert plain["operations"] > plain["update_operations"] > 0
    assert plain["host_ms"] > max(plain["host_phases_ms"].values()) > 0
    assert plain["host_phases_ms"]["update"] < PLANTED_MS <= busy["host_phases_ms"]["update"]


def test_size_is_measured_by_phase(tmp_path) -> None:
    spec = dataclasses.replace(SPEC, size="nano", micro_batch=2, trace=str(tmp_path / "trace.json"))
    found = engine_step._in_new_process(engine_step._measure_device, spec)
    assert set(found["phases_ms"]) == {
        *("h2d", "conversion", "forward", "loss", "backward", "update")
    }
    assert found["phases_ms"]["forward"] > 0
    assert found["clips_per_second"] == pytest.approx(2000 / found["step_ms"])
    names = {
        event.get("name")
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    assert "aten::linear" in names or "aten::addmm" in names


def test_rows_and_fields_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_step.clip_sets, "render", lambda folder: ClipSet("train", "source"))
    monkeypatch.setattr(engine_step, "measure_rank_cost", lambda run: RankCost(3.0, 30.0))
    host = {"host_phases_ms": {"backward": 9.0, "update": 2.0}, "operations": 900}
    asked: list[StepSpec] = []

    def figures(measure: object, spec: StepSpec) -> dict[str, Any]:
        asked.append(spec)
        if measure is engine_step._measure_device:
            return {"step_ms": 10.0, "clips_per_second": spec.micro_batch / 0.01}
        counts = {"update_operations": 200, "device_waits": 1}
        return {**host, **counts, "host_ms": 10.0 + spec.zero_stage}

    monkeypatch.setattr(engine_step, "_in_new_process", figures)
    engine_step._host_figures.cache_clear()
    words = ["bench", "step", "--size", "nano", "--micro-batch", "2,4", "--stage", "1,2"]
    words += ["--compile", "off,default", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    rows = [(r["micro_batch"], r["zero_stage"], r["compile"]) for r in found["rows"]]
    assert rows == [(m, s, c) for m in (2, 4) for s in (1, 2) for c in ("off", "default")]
    assert len(asked) == 4 + 8  # the host's share is measured once per stage and compilation
    assert (found["host_ms"], found["update_operations"], found["device_waits"]) == (11.0, 200, 1)
    assert (found["loader_us_per_clip"], found["rank_cpu_us_per_clip"]) == (3.0, 30.0)
    assert found["rows"][-1]["clips_per_second"] == pytest.approx(400)
    assert 0 < found["bytes_per_clip"] < 10e6  # of the paper's clip
    assert "mfu" in found
    text = CliRunner().invoke(cli.app, words).stdout
    assert "4 clips, stage 2, compile default" in text
    engine_step._host_figures.cache_clear()


def test_busy_time_counts_overlapping_kernels_once() -> None:
    assert engine_step._union([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


@pytest.mark.parametrize(
    "words", [["--micro-batch", "32;64"], ["--compile", "maybe"], ["--dtype", "int8"]]
)
def test_wrong_options_are_refused(words: list[str]) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "step", *words])
    assert done.exit_code != 0
    assert words[1] in str(done.exception)


@pytest.mark.gpu
def test_a_gpu_has_all_figures() -> None:
    for compile in ("off", "default", "reduce-overhead"):
        spec = StepSpec("nano", 4, 2, compile, "bfloat16", "cuda", steps=2)
        row = engine_step._measure_row(spec)
        assert row.launches
        assert row.device_ms
        assert 0 < row.device_ms <= row.step_ms * 1.5
        assert 0 <= row.idle_share < 1
        assert row.peak_bytes > 0
        assert row.host_ms > 0
        assert row.device_waits <= 1
        assert min(row.phases_ms.values()) >= 0
