"""What single trackers do with accounts, names and runs that a server does not accept."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import wandb_files
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from wandb.errors import CommError

from svfap_dist import storage
from svfap_dist.config import Config, recipe
from svfap_dist.telemetry import tracking

pytestmark = pytest.mark.timeout(600)

OPENED = """
import logging, sys
from svfap_dist.config import recipe
from svfap_dist.telemetry import tracking

logging.basicConfig(format="%(message)s")
config = recipe.load("tiny_cpu", sys.argv[1:])
tracking._CLOSE_SECONDS = 400.0
tracking.check_installed(config.track)
print("now open")
with tracking.Tracking(config, 0):
    pass
"""


def test_wandb_asks_for_no_key_in_a_terminal(tmp_path: Path) -> None:
    """It would ask in the thread that opens it, across the progress bar, and wait."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "TERM": "xterm"}  # no key in ~/.netrc
    command = [sys.executable, "-c", OPENED, f"run.url={tmp_path}", "track.wandb=svfap"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs
    ) as child:
        os.close(theirs)
        shown = ""
        with contextlib.suppress(OSError):  # the terminal's end
            while "Enter your choice" not in shown:
                shown += os.read(ours, 4096).decode()
        if "Enter your choice" in shown:
            child.kill()
    os.close(ours)
    assert "Enter your choice" not in shown
    before, _, after = shown.partition("now open")
    advice = "set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline"
    assert advice in before  # in the check before the run
    assert advice in after
    assert "wandb is off until the run is started again" in after
    assert child.returncode == 0


def _config(folder: Path, *overrides: str) -> Config:
    return recipe.load("tiny_cpu", [f"run.url={folder}/run", *overrides])


@pytest.fixture
def store(tmp_path: Path) -> MlflowClient:
    """A client of a folder, which MLflow refuses unless this is set."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return MlflowClient(str(tmp_path / "store"))


def _runs(store: MlflowClient) -> list[Run]:
    experiment = store.get_experiment_by_name("svfap")
    assert experiment is not None
    return list(store.search_runs([experiment.experiment_id]))


def _track(config: Config, **values: float) -> None:
    """Send numbers in an attempt of their own, and end."""
    with tracking.Tracking(config, 0) as tracked:
        tracked.write_scalars("train", 1, {"source_loss": values})
        done = threading.Event()
        tracked._put(lambda tracker: done.set())
        (feed,) = tracked._feeds.values()
        while feed._is_on and not done.wait(0.1):
            pass


@pytest.fixture(autouse=True)
def _waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_WAITS", (0.0,))
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 400.0)  # on a busy machine


def test_mlflow_gets_the_loss_of_a_source_of_any_name(
    tmp_path: Path, store: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    values = {
        "faces,v2": 1.0,
        "vox@2": 2.0,
        "a/../b": 3.0,
        "/x//": 4.0,
        "y" * 300: 5.0,
        "ö:- .": 6.0,
    }
    _track(_config(tmp_path, f"track.mlflow={tmp_path}/store"), **values)
    (run,) = _runs(store)
    long = "train/source_loss/".ljust(250, "y")
    names = ("faces_v2", "vox_2", "a/_/b", "_/x/_/_", "ö:- .")
    expected = {f"train/source_loss/{name}" for name in names} | {long}
    assert set(run.data.metrics) == expected
    assert run.data.metrics["train/source_loss/faces_v2"] == 1.0
    assert "mlflow" not in caplog.text


def _fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception) -> None:
    """Make the first call of a function fail."""
    function, calls = getattr(owner, name), []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return function(*args, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("what", ["server", "reference"])
def test_opening_again_makes_no_second_mlflow_run(
    tmp_path: Path,
    store: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    if what == "server":
        _fail_once(monkeypatch, MlflowClient, "update_run", ConnectionError("gone"))
    else:
        written = SimpleNamespace(**vars(storage))
        monkeypatch.setattr(tracking, "storage", written)
        _fail_once(monkeypatch, written, "write_bytes", OSError("gone"))
    _track(_config(tmp_path, f"track.mlflow={tmp_path}/store"), a=1.0)
    assert "mlflow failed: gone" in caplog.text
    (run,) = _runs(store)
    assert run.data.metrics == {"train/source_loss/a": 1.0}
    assert run.info.status == "FINISHED"


def test_opening_again_makes_no_second_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    written = SimpleNamespace(**vars(storage))
    monkeypatch.setattr(tracking, "storage", written)
    _fail_once(monkeypatch, written, "write_bytes", OSError("gone"))
    _track(_config(tmp_path, "track.wandb=svfap"), a=1.0)
    assert "wandb failed: gone" in caplog.text
    (path,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    wandb_files.wait_until_written(path)
    rows = wandb_files.history(path)
    assert [row["train/source_loss/a"] for row in rows] == [1.0]


def test_parameters_that_were_refused_are_written_by_the_next_attempt(
    tmp_path: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, f"track.mlflow={tmp_path}/store")
    with monkeypatch.context() as patched:
        write = MlflowClient.log_batch

        def refuse(self: Any, number: str, metrics: Any = (), params: Any = ()) -> None:
            if params:
                raise ConnectionError("gone")
            write(self, number, metrics=metrics)

        patched.setattr(MlflowClient, "log_batch", refuse)
        _track(config, a=1.0)
    (run,) = _runs(store)
    assert run.data.metrics == {"train/source_loss/a": 1.0}
    assert not run.data.params
    _track(config, a=2.0)
    (run,) = _runs(store)
    assert run.data.params["run.name"] == config.run.name


@pytest.mark.parametrize("is_purged", [False, True])
def test_a_deleted_mlflow_run_is_begun_anew(
    tmp_path: Path, store: MlflowClient, caplog: pytest.LogCaptureFixture, is_purged: bool
) -> None:
    config = _config(tmp_path, f"track.mlflow={tmp_path}/store")
    _track(config, a=1.0)
    (old,) = _runs(store)
    store.delete_run(old.info.run_id)
    if is_purged:
        shutil.rmtree(tmp_path / "store" / old.info.experiment_id / old.info.run_id)
    _track(config, a=2.0)
    (new,) = _runs(store)
    assert new.info.run_id != old.info.run_id
    assert new.data.metrics == {"train/source_loss/a": 2.0}
    assert f"mlflow: run {old.info.run_id} was deleted there" in caplog.text
    assert json.loads((tmp_path / "run/track/mlflow.json").read_text())["id"] == new.info.run_id
    assert "mlflow failed" not in caplog.text


def test_a_deleted_wandb_run_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """W&B's server refuses the id of a deleted run for good; no server here, so a fake one does."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    begin, refused = wandb.init, []

    def init(**options: Any) -> Any:
        if options["id"] == "deleted":
            refused.append(options["id"])
            raise CommError(
                "Error 409: run team/svfap/deleted was previously created and deleted; "
                "try a new run name"
            )
        return begin(**options)

    monkeypatch.setattr(wandb, "init", init)
    kept = tmp_path / "run/track/wandb.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"entity": "team", "project": "svfap", "id": "deleted"}))
    _track(_config(tmp_path, "track.wandb=team/svfap"), a=1.0)
    assert refused == ["deleted"]
    assert "this run was deleted there, so another one is begun" in caplog.text
    number = json.loads(kept.read_text())["id"]
    (path,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    assert path.name == f"run-{number}.wandb"
