"""Which epoch of a fine-tuning is the best, when it ends early, and what a resumed run knows."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from train_ranks import recipe_tables

from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.best import read_best
from svfap_dist.checkpoint.saver import SaveOutcome
from svfap_dist.config import recipe
from svfap_dist.data.selection import Selection
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError
from svfap_dist.evaluate import runner
from svfap_dist.evaluate.results import Predictions
from svfap_dist.train.attempt import Attempt
from svfap_dist.train.early_stop import EarlyStop

TASK = {
    "kind": "classification",
    "set": "toy",
    "label": "class",
    "names": ["a", "b"],
    "folds": 2,
    "metrics": ["war"],
}
VALUES = TASK | {"kind": "regression", "label": "values", "metrics": ["ccc"]}
SELECTION = Selection(np.arange(10), np.arange(10) % 2)
EPOCH, TOTAL = 3, 20


class Recorder:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.scores: list[tuple[Any, ...]] = []

    def record_validation(self, *given: Any) -> None:
        self.scores.append(given)

    def add_test_seconds(self, seconds: float) -> None:
        assert seconds >= 0


class Engine:
    """A network that is not called."""

    network, device = staticmethod(lambda clips: clips), torch.device("cpu")

    def evaluating(self) -> Any:
        return contextlib.nullcontext()


def right(count: int) -> Predictions:
    """Of ten samples of two classes, the first ones are right."""
    labels = np.arange(10) % 2
    said = np.where(np.arange(10) < count, labels, 1 - labels)
    return Predictions(tuple("abcdefghij"), labels, np.eye(2, dtype=np.float32)[said])


class Runs:
    """Attempts at a run whose epochs have given predictions."""

    def __init__(self, url: Path, monkeypatch: pytest.MonkeyPatch, **finetune: Any) -> None:
        wanted = recipe_tables("d", str(url)) | {"task": TASK}
        self.tables = wanted | {"finetune": {"validation": 0.2, **finetune}}
        self.url, self.patch, self.recorder = str(url), monkeypatch, Recorder()

    def attempt(self) -> EarlyStop:
        config, manifest = (
            recipe.from_tables(self.tables, where="test"),
            SimpleNamespace(fingerprint="f"),
        )
        data, world = (manifest, SELECTION), World(0, 0, 1, 1)
        return EarlyStop(config, world, data, (EPOCH, TOTAL), self.recorder)  # type: ignore[arg-type]

    def score(self, attempt: EarlyStop, step: int, predictions: Predictions) -> bool:
        """Validate an epoch."""
        tested = runner.TestedSelection(predictions, [])
        self.patch.setattr(runner, "score_selection", lambda *given, **options: tested)
        return attempt.run(Engine(), step, lambda: False)  # type: ignore[arg-type]

    def validate(self, attempt: EarlyStop, step: int, predictions: Predictions) -> bool:
        """Validate, and commit and mark the checkpoint of an epoch that is the best."""
        if is_best := self.score(attempt, step, predictions):
            commit = Path(store.checkpoint_url(self.url, step), store.COMMIT)
            commit.parent.mkdir(parents=True)
            commit.write_text("{}")
            attempt.mark()
        return is_best


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch, patience=2)


def test_the_first_of_the_best_epochs_counts_and_patience_ends_the_run(runs: Runs) -> None:
    attempt = runs.attempt()
    assert [step for step in range(1, 21) if attempt.is_due(step)] == [3, 6, 9, 12, 15, 18, 20]
    for step, count, is_best, is_over in (
        (3, 4, True, False),
        (6, 8, True, False),
        (9, 8, False, False),
        (12, 7, False, True),
    ):
        assert not attempt.is_over(step - 1)
        assert runs.validate(attempt, step, right(count)) is is_best
        assert attempt.is_over(step) is is_over
    best = read_best(runs.url)
    assert best is not None
    assert (best.step, best.score, best.score_text) == (6, 0.8, "UAR 80.0 %")
    assert [given[:3] for given in runs.recorder.scores] == [
        (3, "uar", 0.4),
        (6, "uar", 0.8),
        (9, "uar", 0.8),
        (12, "uar", 0.7),
    ]


def test_a_resumed_run_continues_to_count(runs: Runs) -> None:
    runs.validate(runs.attempt(), 3, right(6))
    resumed = runs.attempt()
    assert resumed.best is not None
    assert resumed.best.step == 3
    assert not resumed.may_be_unscored(3), "it is marked"
    assert resumed.may_be_unscored(6), "it may have been killed before the mark"
    assert not resumed.may_be_unscored(7)
    assert not runs.validate(resumed, 6, right(6))
    assert resumed.is_over(9)
    assert resumed.may_be_unscored(9), "it may have been stopped before its score"
    runs.tables["finetune"]["validation"] = 0.3
    assert runs.attempt().best is None, "scores of other samples"


def test_an_epoch_whose_checkpoint_is_lost_is_not_the_best(runs: Runs) -> None:
    """The next one better than those in the store is marked, and patience starts from zero."""
    epochs = runs.attempt()
    runs.validate(epochs, 3, right(4))
    runs.score(epochs, 6, right(9))

    def end_upload(step: int, **outcome: Any) -> None:
        ended = SaveOutcome(6, 0, 0.0, **outcome)
        saver = SimpleNamespace(finish_upload=lambda: ended)
        parts = {"_early_stop": epochs, "_checkpointer": saver, "_recorder": MagicMock()}
        parts["_world"] = World(0, 0, 1, 1)
        Attempt.finish_upload(SimpleNamespace(step=step, _probe=None, **parts))  # type: ignore[arg-type]

    end_upload(9, error="", is_marked=True)
    end_upload(6, error="the store is away")
    assert epochs.best is not None
    assert epochs.best.step == 6, "the last step is saved again"
    end_upload(9, error="the store is away")
    assert epochs.best.step == 3
    assert runs.validate(epochs, 9, right(6))
    best = read_best(runs.url)
    assert best is not None
    assert (best.step, best.score) == (9, 0.6)
    assert not epochs.is_over(14)


def test_without_patience_the_run_never_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, monkeypatch)
    attempt = runs.attempt()
    runs.validate(attempt, 3, right(9))
    assert not any(attempt.is_over(step) for step in range(21))


def test_a_regression_is_scored_by_its_mean_ccc_and_nan_is_never_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, monkeypatch, patience=1)
    runs.tables["task"] = VALUES
    attempt, keys = runs.attempt(), tuple("abcd")
    values = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0], [3.0, 0.0]], np.float32)
    flat = Predictions(keys, np.zeros_like(values), np.zeros_like(values))
    assert not runs.validate(attempt, 3, flat)
    assert attempt.is_over(3)
    assert attempt.network_to_test(Engine()) is Engine.network  # type: ignore[arg-type]
    assert runs.validate(attempt, 6, Predictions(keys, values, values))
    best = read_best(runs.url)
    assert best is not None
    assert (best.metric, best.score, best.score_text) == ("ccc", 1.0, "CCC 1.000")


def test_a_notice_to_stop_ends_the_validation(runs: Runs) -> None:
    def stopped(*given: Any, **options: Any) -> Any:
        assert options["stops"]()
        raise runner.StoppedError

    runs.patch.setattr(runner, "score_selection", stopped)
    assert not runs.attempt().run(Engine(), 3, lambda: True)  # type: ignore[arg-type]
    assert runs.recorder.scores == []


def test_patience_needs_validation(tmp_path: Path) -> None:
    tables = recipe_tables("d", str(tmp_path)) | {"task": TASK, "finetune": {"patience": 2}}
    with pytest.raises(ConfigError, match="patience needs validation"):
        recipe.from_tables(tables, where="test")


def test_a_mark_of_an_older_version_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    commit = Path(store.checkpoint_url(str(tmp_path), 5), store.COMMIT)
    commit.parent.mkdir(parents=True)
    commit.write_text("{}")
    (folder / "best.json").write_text(json.dumps({"step": 5, "uar": 0.25, "probe": "some"}))
    best = read_best(str(tmp_path))
    assert best is not None
    assert (best.score_text, best.judged_by) == ("UAR 25.0 %", "probes")
