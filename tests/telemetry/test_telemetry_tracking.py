"""Trackers: written to and read back by their own readers, resumed, broken and hung."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import wandb_files
from PIL import Image

from svfap_dist.config import Config, recipe
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError
from svfap_dist.telemetry import tracking
from svfap_dist.telemetry.recorder import Recorder
from svfap_dist.telemetry.trackers import TRACKERS, Reference, TrackedRun

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def _time_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, importing the packages alone may take longer than a run waits."""
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 400.0)


def _config(run: Path, *overrides: str) -> Config:
    return recipe.load("tiny_cpu", [f"run.url={run}", "run.name=faces", *overrides])


def _png() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(data, "PNG")
    return data.getvalue()


def _batch() -> Any:
    return SimpleNamespace(
        frames=[None] * 4,
        fetch_seconds=0.5,
        decode_seconds=0.25,
        bytes_fetched=100,
        batches_ready=3,
        bad=[],
        sources=None,
        ledger=b"",
    )


def _train(config: Config, attempt: int, steps: range, message: str = "") -> None:
    """What an attempt records that logs each of its steps; the loss of step n is n + attempt/10."""
    parts = (attempt, steps.start - 1, lambda row: None, lambda found: None, (1, 1), None)
    with Recorder(config, World(0, 0, 1, 1), *parts) as recorder:
        recorder.record_start(steps.start - 1, 9, "manifest-1", {"torch": "2.13.0"})
        recorder.record_ready()
        for step in steps:
            recorder.count_step(step, _batch())
            numbers = {"total_steps": 9, "epoch": 0, "lr": 1.0, "grad_norm": 1.0}
            recorder.log_step({"step": step, "loss": step + attempt / 10, **numbers}, {})
        recorder.record_evaluation(steps.stop - 1, 0.5, seconds=0.0)
        recorder.record_validation(steps.stop - 1, "uar", 0.25, 12, 0, is_best=True)
        recorder.record_test(steps.stop - 1, 30, {"uar": 41.5, "war": 52.0})
        recorder.track_picture("confusion", steps.stop - 1, _png())
        recorder.record_stop(steps.stop - 1, "RuntimeError" if message else "finished", message)


def _steps_logged(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_tensorboard_reads_a_resumed_run_as_one(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = _config(tmp_path, "track.tensorboard=true")
    _train(config, 1, range(1, 5), "killed")
    _train(config, 2, range(4, 7))  # of a checkpoint at step 3
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = [(event.step, round(event.value, 3)) for event in found.Scalars("train/loss")]
    assert losses == [(1, 1.1), (2, 2.1), (3, 3.1), (4, 4.2), (5, 5.2), (6, 6.2)]
    assert [event.value for event in found.Scalars("test/scores/uar")][-1] == 41.5
    assert found.Scalars("eval/held_out_loss")[-1].step == 6
    assert found.Scalars("validation/score")[-1].step == 6
    (picture,) = found.Images("confusion")[-1:]
    assert (picture.width, picture.height) == (6, 4)
    texts = set(found.Tags()["tensors"])
    assert {"recipe/text_summary", "run/text_summary", "version.torch/text_summary"} <= texts
    text = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert 'name = "faces"' in text


def test_wandb_keeps_a_resumed_run_offline(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = _config(tmp_path, "track.wandb=team/svfap")
    _train(config, 1, range(1, 5), "killed")
    _train(config, 2, range(4, 7))
    reference = json.loads((tmp_path / "track/wandb.json").read_text())
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    assert first.name == second.name == f"run-{reference['id']}.wandb"  # W&B adds one to the other
    for path, number, steps in ((first, 1, (1, 2, 3, 4)), (second, 2, (4, 5, 6))):
        wandb_files.wait_until_written(path)
        rows = wandb_files.history(path)
        losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
        assert losses == [(step, pytest.approx(step + number / 10)) for step in steps]
        assert [row["test/scores/war"] for row in rows if "test/scores/war" in row] == [52.0]
        (picture,) = [row for row in rows if any(key.startswith("confusion") for key in row)]
        assert picture["step"] == steps[-1]
        records = wandb_files.records(path)
        (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        place = started.entity, started.project, started.run_id, started.display_name
        assert place == ("team", "svfap", reference["id"], "faces")
        kept = {
            item.key: json.loads(item.value_json)
            for record in records
            for item in record.config.update
        }
        assert kept["url"] == str(tmp_path)
        assert kept["facts"]["version.torch"] == "2.13.0"
        assert kept["facts"]["attempt"] == str(number)
        assert kept["train"]["global_batch_size"] == config.train.global_batch_size
        (code,) = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
        assert code == (number == 1)
        assert len(list(path.parent.glob("files/media/images/*.png"))) == 1


def test_mlflow_continues_a_resumed_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    long = f"{tmp_path}/" + "x" * 600
    config = _config(tmp_path / "run", f"track.mlflow={tmp_path}/store", f"data.eval_url={long}")
    _train(config, 1, range(1, 5), "killed")
    client = MlflowClient(f"{tmp_path}/store")
    experiment = client.get_experiment_by_name("svfap")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FAILED", "faces")
    _train(config, 2, range(4, 7))
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    found = [(each.step, round(each.value, 3)) for each in losses]
    assert sorted(found) == [(1, 1.1), (2, 2.1), (3, 3.1), (4, 4.1), (4, 4.2), (5, 5.2), (6, 6.2)]
    assert run.data.metrics["test/scores/uar"] == 41.5
    assert run.data.params["train.global_batch_size"] == str(config.train.global_batch_size)
    assert run.data.tags["url"] == str(tmp_path / "run")
    assert run.data.tags["version.torch"] == "2.13.0"
    assert run.data.params["data.eval_url"] == long[:500]
    stored = client.download_artifacts(run.info.run_id, "config.toml", str(tmp_path))
    assert recipe.load(stored, []) == config
    names = {each.path for each in client.list_artifacts(run.info.run_id, "pictures")}
    assert names == {"pictures/confusion-000004.png", "pictures/confusion-000006.png"}


def test_a_killed_wandb_process_costs_no_step(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "_WAITS", (0.0,) * 2)
    killed = threading.Event()
    write = TRACKERS["wandb"].write_scalars  # type: ignore[attr-defined]

    def kill_and_write(self: Any, step: int, values: Any) -> None:
        if not killed.is_set():
            (core,) = [p for p in psutil.Process().children() if "wandb-core" in p.name()]
            core.send_signal(signal.SIGKILL)
            core.wait()
            killed.set()
        write(self, step, values)

    monkeypatch.setattr(TRACKERS["wandb"], "write_scalars", kill_and_write)
    _train(_config(tmp_path, "track.wandb=svfap"), 1, range(1, 9))
    assert killed.is_set()
    assert _steps_logged(tmp_path) == list(range(1, 9))
    assert "wandb is off until the run is started again" in caplog.text
    _train(_config(tmp_path / "next", "track.wandb=svfap"), 1, range(1, 3))  # in this process
    (path,) = tmp_path.glob("next/wandb/offline-run-*/*.wandb")
    wandb_files.wait_until_written(path)
    assert [row["step"] for row in wandb_files.history(path) if "train/loss" in row] == [1, 2]


HUNG = """
import sys, threading
from pathlib import Path
import psutil
from svfap_dist.telemetry import tracking
from svfap_dist.config import recipe

stopped = threading.Event()

def stop(tracker):
    (core,) = [p for p in psutil.Process().children() if "wandb-core" in p.name()]
    core.suspend()
    print(core.pid, flush=True)
    stopped.set()

with tracking.Tracking(recipe.load("tiny_cpu", sys.argv[1:]), 0) as tracked:
    tracked._put(stop)
    assert stopped.wait(400)
    tracked.write_scalars("train", 1, {"loss": 1.0})
    tracking._CLOSE_SECONDS = 1.0
"""


def test_a_hung_wandb_process_does_not_keep_ours(tmp_path: Path) -> None:
    """W&B itself would wait for its process without limit when Python ends."""
    environment = os.environ | {"WANDB_MODE": "offline"}
    environment.pop("WANDB_SERVICE", None)  # of this process
    command = [sys.executable, "-c", HUNG, f"run.url={tmp_path}", "track.wandb=svfap"]
    files = tmp_path / "out", tmp_path / "err"  # no pipes, which the hung process would keep open
    with files[0].open("w") as out, files[1].open("w") as err:
        done = subprocess.run(
            command, env=environment, stdout=out, stderr=err, timeout=500, check=False
        )
    assert done.returncode == 0, files[1].read_text()
    assert not psutil.pid_exists(int(files[0].read_text()))


class _Fake:
    """A tracker that does what a test wants at each call."""

    module, extra = "json", "fake"
    calls: list[str]

    def __init__(self, track: Any) -> None:
        type(self).calls = []

    def _act(self, name: str) -> None:
        self.calls.append(name)

    def open(self, run: TrackedRun) -> Reference:
        self._act("open")
        return {"url": "http://tracker/run"}

    def write_recipe(self, run: TrackedRun) -> None:
        self._act("recipe")

    def write_scalars(self, step: int, values: Any) -> None:
        self._act(f"scalars {step}")

    def write_facts(self, facts: Any) -> None:
        self._act("facts")

    def write_picture(self, name: str, step: int, png: bytes) -> None:
        self._act("picture")

    def close(self, failed: bool) -> None:
        self._act("close")

    def abandon(self) -> None: ...


def test_a_tracker_that_raises_is_turned_off(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A value is sent again, then left out; the next one that fails, too, ends it."""
    off = threading.Event()
    end = tracking._Feed.end

    class Broken(_Fake):
        def _act(self, name: str) -> None:
            super()._act(name)
            if name.startswith("scalars"):
                raise ConnectionError("the server is gone")

        def abandon(self) -> None:
            off.set()

    monkeypatch.setitem(TRACKERS, "wandb", Broken)
    monkeypatch.setattr(tracking, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(tracking._Feed, "end", lambda *given: off.wait(120) and end(*given))
    _train(_config(tmp_path, "track.wandb=svfap"), 1, range(1, 9))
    assert _steps_logged(tmp_path) == list(range(1, 9))
    assert Broken.calls == ["open", "recipe", "facts", *["scalars 1"] * 3, "scalars 2"]
    assert caplog.text.count("wandb failed: the server is gone") == 1
    assert caplog.text.count("wandb is off until the run is started again") == 1


def _track_steps(config: Config, steps: range) -> None:
    """Send a number for each step, wait until all of that is done, and end."""
    with tracking.Tracking(config, 0) as tracked:
        for step in steps:
            tracked.write_scalars("train", step, {"loss": 1.0})
        (feed,) = tracked._feeds.values()
        done = threading.Event()
        tracked._put(lambda tracker: done.set())
        while feed._is_on and not done.wait(0.1):
            pass


def test_a_value_that_is_always_refused_is_left_out(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Strict(_Fake):
        def _act(self, name: str) -> None:
            super()._act(name)
            if name in ("scalars 2", "scalars 4"):
                raise ValueError("invalid name")

    monkeypatch.setitem(TRACKERS, "wandb", Strict)
    monkeypatch.setattr(tracking, "_WAITS", (0.0,))
    _track_steps(_config(tmp_path, "track.wandb=svfap"), range(1, 6))
    calls = ["scalars 1", *["scalars 2"] * 2, "scalars 3", *["scalars 4"] * 2, "scalars 5"]
    assert Strict.calls == ["open", "recipe", *calls, "close"]
    assert caplog.text.count("wandb refuses a value, which is left out: invalid name") == 2
    assert "is off" not in caplog.text


@pytest.mark.parametrize("error", [OSError("full"), ConfigError("No account", "", "", "log in")])
def test_a_tracker_that_cannot_be_opened_gets_no_values(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    class Closed(_Fake):
        def open(self, run: TrackedRun) -> Reference:
            super().open(run)
            raise error

    monkeypatch.setitem(TRACKERS, "wandb", Closed)
    monkeypatch.setattr(tracking, "_WAITS", (0.0, 0.0))
    config = _config(tmp_path, "track.wandb=svfap")
    _track_steps(config, range(1, 4))
    assert Closed.calls == ["open"] * (1 if isinstance(error, ConfigError) else 3)
    assert f"wandb is off until the run is started again: {error}" in caplog.text
    assert "track/wandb.json" not in caplog.text
    kept = tmp_path / "track/wandb.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text('{"id": "x"}')
    _track_steps(config, range(1, 4))
    assert f"If its run was deleted there, delete {kept} to begin another." in caplog.text


def test_an_error_while_opening_is_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    class Opened(_Fake):
        def _act(self, name: str) -> None:
            super()._act(name)
            if self.calls == ["open"]:
                raise ConnectionError("the server starts")

    monkeypatch.setitem(TRACKERS, "wandb", Opened)
    monkeypatch.setattr(tracking, "_WAITS", (0.0,))
    _track_steps(_config(tmp_path, "track.wandb=svfap"), range(1, 2))
    assert Opened.calls == ["open", "open", "recipe", "scalars 1", "close"]
    reference = json.loads((tmp_path / "track/wandb.json").read_text())
    assert reference == {"url": "http://tracker/run"}


def test_a_call_that_fails_is_made_again(tmp_path: Path, monkeypatch: Any) -> None:
    class Recovering(_Fake):
        def _act(self, name: str) -> None:
            super()._act(name)
            if name == "scalars 2" and self.calls.count(name) < 3:
                raise ConnectionError("the server restarts")

    monkeypatch.setitem(TRACKERS, "wandb", Recovering)
    monkeypatch.setattr(tracking, "_WAITS", (0.0,) * 4)
    _track_steps(_config(tmp_path, "track.wandb=svfap"), range(1, 4))
    calls = ["scalars 1", *["scalars 2"] * 3, "scalars 3"]
    assert Recovering.calls == ["open", "recipe", *calls, "close"]


def test_a_tracker_that_hangs_costs_no_step(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes nothing: what waits is bounded, and the end does not wait for it."""
    free = threading.Event()

    class Hanging(_Fake):
        def _act(self, name: str) -> None:
            super()._act(name)
            free.wait()

    monkeypatch.setitem(TRACKERS, "wandb", Hanging)
    monkeypatch.setitem(TRACKERS, "mlflow", _Fake)
    monkeypatch.setattr(tracking, "_MAX_WAITING", 4)
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.2)
    try:
        _train(_config(tmp_path, "track.wandb=svfap", "track.mlflow=x"), 1, range(1, 30))
        assert _steps_logged(tmp_path) == list(range(1, 30))
        assert Hanging.calls == ["open"]
        assert caplog.text.count("wandb is too slow") == 1
        assert "wandb does not answer: its last values are lost" in caplog.text
    finally:
        free.set()


def test_other_ranks_and_untracked_runs_have_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # some of earlier tests may still end
    config = _config(tmp_path, "metrics.enabled=false", "track.tensorboard=true")
    parts = (1, 0, lambda row: None, lambda found: None, (1, 1), None)
    with Recorder(config, World(1, 1, 1, 1), *parts) as recorder:
        assert not recorder.is_tracked
        assert set(threading.enumerate()) <= before
    assert not (tmp_path / "tensorboard").exists()


def test_a_missing_package_is_found_before_the_run(monkeypatch: Any) -> None:
    monkeypatch.setattr(TRACKERS["wandb"], "module", "no_such_module")
    config = _config(Path("x"), "track.wandb=svfap")
    with pytest.raises(ConfigError, match=r"pip install 'svfap-dist\[wandb\]'"):
        tracking.check_installed(config.track)
    tracking.check_installed(_config(Path("x")).track)


def test_only_the_mlflow_folder_is_a_path() -> None:
    values = ("mlruns", "http://host:5000", "sqlite:///x.db", "databricks", "")
    found = [_config(Path("x"), f"track.mlflow={value}").track.mlflow_folder for value in values]
    assert found == ["mlruns", "", "", "", ""]
