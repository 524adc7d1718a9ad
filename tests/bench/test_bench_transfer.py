"""The transfer table: cells, what a killed one leaves, statistics, and its options."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from clips import make_video

from data_sharding import pipeline as sharding
from svfap_dist import cli
from svfap_dist.bench import transfer, transfer_setup
from svfap_dist.bench.frozen_features import FrozenFeatures
from svfap_dist.bench.transfer_setup import METHODS, TransferOptions
from svfap_dist.bench.transfer_table import (
    Cell,
    CellResult,
    Interval,
    TransferTable,
    compute_power,
)
from svfap_dist.config import Config, recipe
from svfap_dist.errors import ConfigError, HealthError, ShardError
from svfap_dist.evaluate import protocol
from svfap_dist.evaluate.results import Predictions, Results
from svfap_dist.model import autoencoder, weights
from svfap_dist.train import finetune, loop
from svfap_dist.train.attempt import RunResult
from svfap_dist.train.context import RunContext
from svfap_dist.train.signals import FINISHED

NAMES = ("pretrained", "linear", "knn")
OPTIONS = TransferOptions(labels=(1, 0), methods=NAMES, seeds=1)
SMALL = (
    *("data.num_frames=8", "data.sampling_rate=1", "data.frame_size=32", "model.size=nano"),
    *("train.global_batch_size=2", "train.micro_batch_size=2", "train.max_steps=2"),
    *("data.num_lanes=2", "train.threads_per_rank=1", "cluster.use_gpu=false"),
    *("finetune.test_segments=1", "finetune.test_crops=1", "augment.rand_augment_ops=0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black and white videos of two persons, a fold each, and weights of an untrained network."""
    root = tmp_path_factory.mktemp("transfer")
    rows = ["path,label,subject,fold"]
    for number in range(12):
        name, person = ("black", "white")[number % 2], number % 4 // 2
        painted = [4095 * (number % 2)] * 8
        make_video(root / f"{number}.mp4", 8, size=(32, 32), seed=number, painted=painted)
        rows.append(f"{number}.mp4,{name},p{person},{person + 1}")
    (root / "labels.csv").write_text("\n".join(rows))
    sharding.shard("csv", str(root / "labels.csv"), str(root / "shards"), min_frames=1, workers=0)
    torch.manual_seed(1)
    arguments = {"size": "nano", "num_frames": 8, "frame_size": 32}
    model = autoencoder.build(**arguments)
    for name in ("init", "other"):
        weights.save(str(root / name / "model.safetensors"), model.state_dict(), arguments)
    return root


def overrides(folder: Path, table: str) -> list[str]:
    urls = f"data.url={folder}/shards", f"run.url={folder}/{table}", f"finetune.init={folder}/init"
    return [*SMALL, *urls]


class _KilledError(Exception):
    """Raised in place of the end of the process."""


def test_a_killed_table_continues_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, killed = [], []
    train = loop.run

    def counted(config: Config, *, context: RunContext) -> RunResult:
        trained.append(config.run.url.removeprefix(f"{folder}/table/runs/"))
        if len(trained) == 4 and not killed:  # in the second fold of a cell
            killed.append(trained.pop())
            raise _KilledError
        return train(config, context=context)

    monkeypatch.setattr(loop, "run", counted)
    arguments = ("finetune_custom", overrides(folder, "table"), OPTIONS)
    with pytest.raises(_KilledError):
        transfer.run(*arguments)
    assert killed == ["pretrained-all-seed0/fold-2"]
    cells = {path.name.partition(".")[0] for path in (folder / "table/cells").iterdir()}
    assert cells == {f"{method}-1-seed0" for method in NAMES}

    seen: list[str] = []
    table = transfer.run(
        *arguments,
        lambda result, table: seen.append(table.cell_lines(result)[-1]),
    )
    assert table.stop_reason == "finished"
    assert trained == [
        f"pretrained-{labels}-seed0/fold-{fold}" for labels in ("1", "all") for fold in (1, 2)
    ]  # no fold twice
    assert seen[0] == "3 of 6 cells are there already."
    assert seen[1].startswith("[4/6] pretrained, all labels per class, seed 0: UAR % ")
    assert len(seen) == 4

    files = {path.name for path in (folder / "table").iterdir()}
    assert files == {"cells", "features", "pictures", "runs", "transfer.json", "transfer.md"}
    assert (folder / "table/pictures/transfer.png").stat().st_size > 1000
    assert list((folder / "table/runs").iterdir()) == []
    assert len(list((folder / "table/features").iterdir())) == 1
    content = json.loads((folder / "table/transfer.json").read_text())
    assert [tuple(row["cell"].values()) for row in content["results"]] == [
        (method, labels, 0) for labels in (1, 0) for method in NAMES
    ]
    # Black and white are far apart even for an untrained encoder.
    scores = {(row["method"], row["labels"]): row["mean"] for row in content["rows"]}
    assert scores["knn", 1] == scores["knn", 0] == scores["linear", 0] == 100.0
    assert all(result["num_samples"] == 12 for result in content["results"])

    assert transfer.run(*arguments) == table
    assert len(trained) == 4
    with pytest.raises(ConfigError, match=r"another recipe.*give another run\.url"):
        transfer.run(arguments[0], [*arguments[1], "train.max_steps=3"], OPTIONS)

    # A cell is what a fine-tuning gives.
    alone = [*arguments[1], f"run.url={folder}/fine", "data.decode_workers=0"]
    ended = finetune.run(
        recipe.load("finetune_custom", [*alone, "metrics.enabled=false"]),
        lambda config, context: train(config, context=context),
    )
    assert isinstance(ended.results, Results)
    assert table.results[3].values == ended.results.pooled.values
    found = Predictions.read(f"{folder}/table/cells/pretrained-all-seed0.predictions.jsonl")
    assert found.keys == ended.results.predictions.keys
    assert np.array_equal(found.scores, ended.results.predictions.scores)


def test_commands_share_the_cells_of_a_table(folder: Path) -> None:
    options = TransferOptions(labels=(1, 0), methods=("knn", "linear"), seeds=2)
    given = overrides(folder, "shared")
    for number in (1, 2):
        part = dataclasses.replace(options, part=(number, 2))
        table = transfer.run("finetune_custom", given, part)
        assert not (folder / "shared/transfer.json").exists()
        assert len(table.results) == 4 * number
    assert table.is_complete
    assert len(table.cells_of_part(1, 3)) + len(table.cells_of_part(2, 3)) == 6
    with pytest.raises(ConfigError, match="another initial weights"):
        transfer.run("finetune_custom", [*given, f"finetune.init={folder}/other"], options)
    table = transfer.run("finetune_custom", given, options)
    assert json.loads((folder / "shared/transfer.json").read_text())["stop_reason"] == "finished"
    assert table.command in (folder / "shared/transfer.md").read_text()


@pytest.mark.parametrize("labels", [1, 2, 0])
@pytest.mark.parametrize("method", ["knn", "linear"])
def test_classifiers_learn_from_training_samples_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, labels: int
) -> None:
    """The same ones as a training with this seed, and other ones with another seed."""
    options = TransferOptions(labels=(labels,), methods=(method, "pretrained"), seeds=3)
    setup = transfer_setup.set_up_transfer("finetune_custom", overrides(folder, "none"), options)
    numbers = np.arange(setup.manifest.num_samples)
    features = FrozenFeatures(numbers, numbers.astype(str), np.eye(len(numbers), dtype=np.float32))
    monkeypatch.setattr(transfer, "load_features", lambda *_: features)
    found: list[tuple[list[int], list[int]]] = []

    def predict(
        known: np.ndarray, targets: np.ndarray, asked: np.ndarray, *_: Any
    ) -> dict[str, np.ndarray]:
        found.append((known.argmax(axis=1).tolist(), asked.argmax(axis=1).tolist()))
        assert len(targets) == len(known)
        return dict.fromkeys(("knn", "logistic"), np.zeros(len(asked), np.int64))

    monkeypatch.setattr(transfer.feature_probe, "predict", predict)
    drawn = []
    for seed in range(options.seeds):
        found.clear()
        config = setup.config_of(Cell(method, labels, seed))
        transfer._compute(setup, config, METHODS[method].classifier, torch.device("cpu"))
        trained = setup.config_of(Cell("pretrained", labels, seed))
        splits = [protocol.split_samples(trained, setup.manifest, fold) for fold in (1, 2)]
        assert found == [(s.train.indices.tolist(), s.test.indices.tolist()) for s in splits]
        assert all(len(known) == (2 * labels or 6) for known, _ in found)
        assert all(set(known).isdisjoint(asked) for known, asked in found)
        drawn.append(str(found))
    assert len(set(drawn)) == (options.seeds if labels else 1)


def test_intervals_are_over_whole_persons(folder: Path) -> None:
    setup = transfer_setup.set_up_transfer(
        "finetune_custom", overrides(folder, "none"), TransferOptions(labels=(0,), methods=("knn",))
    )
    found = transfer._subjects(setup.configs["knn"], setup.manifest)
    assert found == {str(number): f"p{number % 4 // 2}" for number in range(12)}


def test_a_training_that_fails_leaves_the_other_cells(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(config: Config, *, context: RunContext) -> RunResult:
        raise HealthError("Losses are not finite", "step 3", "nan", "lower optim.lr")

    monkeypatch.setattr(loop, "run", diverge)
    options = TransferOptions(labels=(0,), methods=("pretrained", "knn"), seeds=1)
    table = transfer.run("finetune_custom", overrides(folder, "failed"), options)
    assert [result.cell.method for result in table.results] == ["knn"]
    assert table.lines()[-1].startswith("Failed: pretrained-all-seed0: Losses are not finite.")
    content = json.loads((folder / "failed/transfer.json").read_text())
    assert list(content["failed"]) == ["pretrained-all-seed0"]


def test_a_stopped_training_is_no_cell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: Config, *, context: RunContext) -> RunResult:
        return RunResult(1, 2, "SIGTERM", config.run.url, None, None, None, None)

    monkeypatch.setattr(loop, "run", stop)
    options = TransferOptions(labels=(0,), methods=("pretrained", "knn"), seeds=1)
    table = transfer.run("finetune_custom", overrides(folder, "stopped"), options)
    assert (table.results, table.stop_reason) == ((), "SIGTERM")
    assert table.lines()[-1] == "Stopped (SIGTERM): run the same command again to resume."
    assert not (folder / "stopped/cells").exists()


def test_the_vit_has_its_own_dimensions_and_settings_are_of_one_method(folder: Path) -> None:
    settings = ("vit:model.num_heads=4", "attentive:optim.lr=0.5")
    options = TransferOptions(methods=("scratch", "attentive", "vit"), settings=settings)
    given = [*overrides(folder, "none"), "finetune.pool=grid", "finetune.grid=2"]
    setup = transfer_setup.set_up_transfer(
        "finetune_custom", given, dataclasses.replace(options, labels=(0,))
    )
    scratch, attentive, vit = (setup.configs[name] for name in options.methods)
    assert (scratch.finetune.init, scratch.finetune.mode, scratch.finetune.pool) == (
        "",
        "full",
        "grid",
    )
    assert attentive.finetune.init == f"{folder}/init/model.safetensors"
    assert (attentive.finetune.mode, attentive.finetune.pool) == ("attentive", "mean")
    assert (attentive.optim.lr, scratch.optim.lr) == (0.5, 1e-3)
    assert (vit.model.encoder, vit.model.num_heads, vit.finetune.init) == ("vit", 4, "")
    assert not (folder / "none").exists()


def test_weights_of_a_vit_add_a_row(folder: Path) -> None:
    arguments = {"size": "nano", "num_frames": 8, "frame_size": 32, "encoder": "vit"}
    arguments["stage_depths"] = (3,)
    model = autoencoder.build(**arguments)
    weights.save(str(folder / "vit/model.safetensors"), model.state_dict(), arguments)
    options = TransferOptions(vit_init=str(folder / "vit"), methods=("vit", "knn"), labels=(0,))
    setup = transfer_setup.set_up_transfer("finetune_custom", overrides(folder, "none"), options)
    assert setup.table.methods == ("vit", "vit-pretrained", "knn")
    for name, init in (("vit", ""), ("vit-pretrained", f"{folder}/vit/model.safetensors")):
        config = setup.configs[name]
        assert (config.model.encoder, config.model.stage_depths) == ("vit", (3,))
        assert config.finetune.init == init


@pytest.mark.parametrize(
    ("options", "changes", "error", "message"),
    [
        ({"methods": ("scratch", "knm")}, (), ConfigError, "No such method.*knn"),
        ({"settings": ("knn:probe",)}, (), ConfigError, "METHOD:KEY=VALUE"),
        ({"settings": ("nn:probe.neighbors=1",)}, (), ConfigError, "No such method.*knn"),
        ({}, ("finetune.init=",), ConfigError, "pre-trained weights.*pretrained.*--init"),
        ({"part": (3, 2)}, (), ConfigError, "No such part"),
        ({"methods": ("vit-pretrained",)}, (), ConfigError, "--vit-init"),
        ({"labels": (4,)}, (), ShardError, "Too few labeled samples of a class"),
        ({}, ("train.global_batch_size=8",), ConfigError, "smaller than one global batch"),
        ({}, ("model.embed_dim=64",), ConfigError, "Model of finetune.init does not match"),
        ({}, ("run.url=",), ConfigError, "Missing required setting: run.url"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    folder: Path, options: dict[str, Any], changes: tuple[str, ...], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        transfer.run(
            "finetune_custom",
            [*overrides(folder, "none"), *changes],
            dataclasses.replace(OPTIONS, **options),
        )
    assert not (folder / "none").exists()


def table_of(scores: dict[str, list[float]], metric: str = "uar") -> TransferTable:
    """A table of all labels, of scores by method and seed."""
    results = tuple(
        CellResult(Cell(method, 0, seed), {metric: value}, 100, 1.0)
        for method, values in scores.items()
        for seed, value in enumerate(values)
    )
    seeds = max(map(len, scores.values()))
    return TransferTable("ck", "class", metric, tuple(scores), (0,), seeds, results, None, FINISHED)


def test_differences_are_paired_by_seed() -> None:
    scores = {"scratch": [30.0, 50.0, 40.0], "pretrained": [32.0, 53.0, 41.0]}
    table = table_of(scores)
    (difference,) = table.differences()
    assert difference.mean == pytest.approx(2.0)
    assert difference.standard_error == pytest.approx(1 / math.sqrt(3))
    assert difference.is_shown
    assert difference.detectable == pytest.approx(2.8416 / math.sqrt(3))
    row = table.rows()[0]
    assert (row.mean, row.deviation) == (40.0, 10.0)  # far more than the difference
    assert row.standard_error == pytest.approx(10 / math.sqrt(3))
    assert "| pretrained - scratch | **+2.00 ± 0.58** |" in table.to_markdown()
    less = table_of(scores | {"pretrained": [31.0, 53.0, 39.0]})
    assert not less.differences()[0].is_shown


def test_intervals_are_shown_beside_their_difference() -> None:
    table = table_of({"scratch": [30.0, 40.0], "pretrained": [40.0, 50.0]})
    table = dataclasses.replace(table, intervals=(Interval("pretrained", 0, -1.5, 21.5),))
    assert "| its 95 % interval | -1.50 to +21.50 |" in table.to_markdown()
    assert table.lines()[-1].endswith("-1.50 to +21.50")


def test_one_seed_shows_nothing() -> None:
    table = table_of({"scratch": [30.0, 40.0], "pretrained": [90.0]})
    (difference,) = table.differences()
    assert (difference.seeds, difference.mean, difference.is_shown) == (1, 60.0, False)
    assert "| pretrained - scratch | +60.00 |" in table.to_markdown()
    assert json.loads(table.to_json())["differences"][0]["standard_error"] is None
    assert "3 of 4 cells" in table.lines()[0]


def test_the_stated_power_is_that_of_repetitions() -> None:
    """Clips that are right or wrong by themselves, in classes of different sizes."""
    counts, seeds, repetitions = (60, 20, 40), 5, 4000
    power = compute_power("uar", counts, seeds)
    assert power is not None
    random, half = np.random.default_rng(0), power.all_seeds / 200
    uar = []
    for p in (0.5 - half, 0.5 + half):
        hits = [random.binomial(n, p, (repetitions, seeds)) / n for n in counts]
        uar.append(100 * np.mean(hits, axis=0))
    error = math.sqrt(2) * 100 * math.sqrt(sum(0.25 / n for n in counts)) / 3 / math.sqrt(seeds)
    exceeds = (uar[1] - uar[0]).mean(axis=1) > 2 * error
    assert exceeds.mean() == pytest.approx(0.8, abs=0.03)
    assert power.one_seed == pytest.approx(power.all_seeds * math.sqrt(seeds))
    assert compute_power("weighted_f1", counts, seeds) is None


def test_the_example_of_the_help_is_parsed() -> None:
    group: Any = typer.main.get_command(cli.app)
    command = group.commands["bench"].commands["transfer"]
    _, _, example = command.help.replace("\n", " ").partition("Example: svfap bench transfer ")
    context = command.make_context("transfer", example.split())
    found = context.params
    assert (found["name"], found["init"]) == ("finetune_custom", "runs/base")
    assert found["settings"] == ["attentive:optim.lr=1e-2"]
    assert len(found["overrides"]) == 2
