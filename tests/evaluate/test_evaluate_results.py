"""From predictions to a table, JSON and a picture, and predictions as a file."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy import stats
from sklearn import metrics as sklearn_metrics

from svfap_dist.config import TaskConfig
from svfap_dist.errors import CheckpointError, ConfigError, HealthError
from svfap_dist.evaluate import results
from svfap_dist.evaluate.metrics import SCORE_FUNCTIONS, ScoreFunction
from svfap_dist.evaluate.results import Predictions, summarize

NAMES = ("sad", "happy", "calm")
SIZES = {1: 40, 2: 25, 3: 30}


def task(**fields: Any) -> TaskConfig:
    given = {"kind": "classification", "set": "toy", "label": "class", "names": NAMES, "folds": 3}
    given |= {"metrics": ("uar", "war"), "published": (50.0, 60.5), "published_source": "a paper"}
    return TaskConfig(**given | fields)


def regression(**fields: Any) -> TaskConfig:
    given = {"kind": "regression", "label": "values", "names": ("b", "a"), "published": ()}
    return task(**given | {"metrics": ("pcc", "acc")} | fields)


def classified(fold: int, size: int) -> Predictions:
    rng = np.random.default_rng(fold)
    labels = rng.integers(0, 3, size)
    scores = rng.normal(size=(size, 3)).astype(np.float32)
    scores[np.arange(size), labels] += 1
    return Predictions(tuple(f"fold{fold}/{n}" for n in range(size)), labels, scores)


def rated(fold: int, size: int) -> Predictions:
    rng = np.random.default_rng(fold)
    labels = rng.normal(size=(size, 2)).astype(np.float32)
    scores = (labels + rng.normal(size=(size, 2))).astype(np.float32)
    return Predictions(tuple(f"fold{fold}/{n}" for n in range(size)), labels, scores)


CLASSIFIED = {fold: classified(fold, size) for fold, size in SIZES.items()}
RATED = {fold: rated(fold, size) for fold, size in SIZES.items()}


def uar(*parts: Predictions) -> float:
    labels = np.concatenate([part.labels for part in parts])
    said = np.concatenate([part.scores.argmax(1) for part in parts])
    return 100 * float(sklearn_metrics.balanced_accuracy_score(labels, said))


def test_classification_per_fold_pooled_and_beside_the_published_figure():
    content = json.loads(summarize(task(), CLASSIFIED).to_json())
    per_fold = [uar(part) for part in CLASSIFIED.values()]
    assert [f["values"]["uar"] for f in content["per_fold"].values()] == pytest.approx(per_fold)
    found = content["metrics"]["uar"]
    assert found["pooled"] == pytest.approx(uar(*CLASSIFIED.values()))
    assert found["pooled"] != pytest.approx(statistics.fmean(per_fold), abs=1e-3)
    assert found["mean"] == pytest.approx(statistics.fmean(per_fold))
    assert found["deviation"] == pytest.approx(np.std(per_fold, ddof=1))
    assert found["published"] == 50
    assert found["difference"] == pytest.approx(found["pooled"] - 50)
    labels = np.concatenate([part.labels for part in CLASSIFIED.values()])
    said = np.concatenate([part.scores.argmax(1) for part in CLASSIFIED.values()])
    matrix = sklearn_metrics.confusion_matrix(labels, said)
    assert content["confusion"] == matrix.tolist()
    assert list(content["recall"].values()) == pytest.approx(
        (100 * matrix.diagonal() / matrix.sum(1)).tolist()
    )
    assert statistics.fmean(content["recall"].values()) == pytest.approx(found["pooled"])
    assert content["num_samples"] == 95
    assert content["is_complete"]


def test_regression_per_dimension_and_their_mean():
    content = json.loads(summarize(regression(), RATED).to_json())
    labels = np.concatenate([part.labels for part in RATED.values()]).astype(np.float64)
    scores = np.concatenate([part.scores for part in RATED.values()]).astype(np.float64)
    each = [stats.pearsonr(labels[:, k], scores[:, k]).statistic for k in (0, 1)]
    found = content["metrics"]["pcc"]
    assert found["parts"] == pytest.approx({"b": each[0], "a": each[1]})
    assert found["pooled"] == pytest.approx(statistics.fmean(each))
    assert found["published"] is found["difference"] is None
    assert content["metrics"]["acc"]["pooled"] == pytest.approx(1 - np.abs(labels - scores).mean())
    assert "confusion" not in content
    with pytest.raises(ConfigError, match="No confusion matrix"):
        summarize(regression(), RATED).picture()


def test_table_of_folds():
    labels = np.array([0, 0, 1, 2])
    right = Predictions(("a", "b", "c", "d"), labels, np.eye(3)[labels])
    wrong = Predictions(("e", "f", "g", "h"), labels, np.eye(3)[[0, 1, 1, 2]])
    assert summarize(task(folds=2), {2: wrong, 1: right}).lines() == [
        "toy, class: 2 folds",
        "                   samples   UAR %   WAR %",
        "fold 1                   4  100.00  100.00",
        "fold 2                   4   83.33   75.00",
        "pooled                   8   91.67   87.50",
        "mean over folds              91.67   87.50",
        "deviation (n - 1)            11.79   17.68",
        "published                    50.00   60.50",
        "difference                  +41.67  +27.00",
        "Published: a paper",
    ]


def test_figures_that_the_authors_reproduced_are_beside_the_published_ones():
    labels = np.array([0, 0, 1, 2])
    right = {0: Predictions(("a", "b", "c", "d"), labels, np.eye(3)[labels])}
    both = task(folds=0, reproduced=(51.0, 61.5), reproduced_source="their code")
    lines = summarize(both, right).lines()[3:]
    assert [" ".join(line.split()) for line in lines] == [
        "published 50.00 60.50",
        "difference +50.00 +39.50",
        "reproduced 51.00 61.50",
        "difference +49.00 +38.50",
        "Published: a paper",
        "Reproduced: their code",
    ]
    content = json.loads(summarize(both, right).to_json())
    assert [content["metrics"][name]["reproduced"] for name in ("uar", "war")] == [51.0, 61.5]
    assert content["reproduced_source"] == "their code"
    other = task(folds=0, reproduced=(51.0, 61.5), published=(), metrics=("war",))
    assert len(summarize(other, right).lines()) == 3


def test_table_of_a_fixed_split_and_of_some_folds():
    fixed = summarize(regression(folds=0), {0: RATED[1]})
    lines = fixed.lines()
    assert lines[0] == "toy, values: trained on train, tested on test"
    assert [line.split()[0] for line in lines[1:]] == ["samples", "test", "b", "a"]
    assert fixed.is_complete
    some = summarize(task(fold=2), {2: CLASSIFIED[2]})
    assert not some.is_complete
    assert "1 of 3 folds" in some.lines()[-1]
    assert json.loads(some.to_json())["metrics"]["uar"]["deviation"] is None


def test_undefined_measures_are_null_and_nan():
    constant = Predictions(RATED[1].keys, RATED[1].labels, np.ones_like(RATED[1].scores))
    found = summarize(regression(), {1: constant, 2: RATED[2]})
    content = json.loads(found.to_json())
    assert content["per_fold"]["1"]["values"]["pcc"] is None
    assert content["metrics"]["pcc"]["mean"] is content["metrics"]["pcc"]["deviation"] is None
    assert content["metrics"]["pcc"]["pooled"] > 0
    assert "nan" in "\n".join(found.lines())


def test_confusion_of_a_class_without_samples():
    matrix = results.count_confusion(np.array([0, 0, 2]), np.array([0, 1, 2]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(results.recalls(matrix), [0.5, np.nan, 1])


def test_picture_is_darker_where_more_was_said():
    matrix = np.array([[90, 10], [0, 20]])
    picture = Image.open(io.BytesIO(results.draw_confusion(matrix, ("sad", "happy"), "toy")))
    grey = np.asarray(picture.convert("L"), np.float64)
    assert min(picture.size) > 300
    # The matrix is the largest square of colour: its cells' corners, away from text.
    colored = np.argwhere(np.ptp(np.asarray(picture.convert("RGB"), np.int16), axis=2) > 60)
    (top, left), (bottom, right) = colored.min(axis=0), colored.max(axis=0)
    rows = [top + 8, bottom - 8]
    columns = [left + 8, right - 8]
    shades = [[grey[row, column] for column in columns] for row in rows]
    assert shades[0][0] < shades[0][1] - 60  # 90 % against 10 %
    assert shades[1][1] < shades[0][0] < shades[0][1] <= shades[1][0]


@pytest.mark.parametrize("found", [CLASSIFIED[1], RATED[2]], ids=["classes", "values"])
def test_predictions_read_back_as_themselves(found: Predictions, tmp_path: Path):
    url = str(tmp_path / "predictions.jsonl")
    found.write(url)
    again = Predictions.read(url)
    assert again.keys == found.keys
    for name in ("labels", "scores"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
        assert getattr(again, name).dtype == getattr(found, name).dtype
    first = json.loads(Path(url).read_text().splitlines()[0])
    assert list(first) == ["key", "label", "scores"]


@pytest.mark.parametrize(
    "content", [None, "", "{", '{"key": "a"}\n', '{"key": "a", "label": 1, "scores": [[]]}\n[]']
)
def test_damaged_predictions_are_refused(content: str | None, tmp_path: Path):
    file = tmp_path / "predictions.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CheckpointError, match="test this fold again"):
        Predictions.read(str(file))


def test_predictions_that_cannot_be():
    with pytest.raises(CheckpointError, match="2 keys, 1 labels"):
        Predictions(("a", "b"), np.array([1]), np.ones((2, 3)))
    with pytest.raises(CheckpointError, match="1 samples twice, such as a"):
        Predictions(("a", "a"), np.array([1, 1]), np.ones((2, 3)))
    with pytest.raises(HealthError, match=r"sample b.*1 of 2"):
        Predictions(("a", "b"), np.array([1, 1]), np.array([[0.0, 1], [np.nan, 1]]))


def test_results_of_another_task_are_refused():
    with pytest.raises(CheckpointError, match=r"40 samples twice"):
        summarize(task(), {1: CLASSIFIED[1], 2: CLASSIFIED[1]})
    with pytest.raises(ConfigError, match=r"folds \[4\]"):
        summarize(task(), {4: CLASSIFIED[1]})
    with pytest.raises(ConfigError, match=r"folds \[\]"):
        summarize(task(), {})
    with pytest.raises(CheckpointError, match=r"fold 1.*scores \[40, 3\] for 2"):
        summarize(task(names=("sad", "happy")), {1: CLASSIFIED[1]})
    with pytest.raises(CheckpointError, match="not classes 0 to 1"):
        summarize(task(names=("sad", "happy")), {1: RATED[1]})
    with pytest.raises(CheckpointError, match=r"labels \[40\] for 3"):
        summarize(regression(names=NAMES), {1: CLASSIFIED[1]})


def test_a_new_row_is_a_score_of_recipes_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="worst is not a metric of a classification"):
        task(metrics=("uar", "worst"))
    row = ScoreFunction("Worst", "classification", lambda labels, predicted: 0.25)
    monkeypatch.setitem(SCORE_FUNCTIONS, "worst", row)
    results = summarize(task(folds=2, metrics=("uar", "worst")), {1: classified(1, 9)})
    assert results.mean("worst") == 0.25
    assert "Worst" in "\n".join(results.lines())
