"""`svfap bench model`: a whole run at the smallest size, its numbers held against each other."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from svfap_dist import cli
from svfap_dist.bench import model
from svfap_dist.bench.steps import Spec, TrainingStep, Worker
from svfap_dist.errors import ClusterError, ConfigError

NANO = Spec("nano", "tpsbt", 2, "float32", "cpu")


def test_what_it_prints_adds_up() -> None:
    words = ["bench", "model", "--size", "nano", "--batch-size", "2", "--steps", "2"]
    done = CliRunner().invoke(cli.app, [*words, "--device", "cpu", "--compare", "vit", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    rate, baseline = found["clips_per_second"], found["baseline_clips_per_second"]
    assert found["ratio"] == pytest.approx(rate / baseline)
    assert found["vit_ratio"] == pytest.approx(rate / found["vit_clips_per_second"])
    share = rate * found["gflops"] / found["matmul_gflops"]
    assert found["matmul_share"] == pytest.approx(share)
    assert found["exact_matmul_share"] < found["matmul_share"]
    assert found["exact_gflops"] == pytest.approx(rate and 1e3 * found["tflops"] / rate)
    assert 2 * sum(found["parts"].values()) < found["exact_gflops"]
    assert found["baseline_loss"] == pytest.approx(found["loss"], abs=1e-4)
    assert found["mfu"] is None  # what a CPU can do at best is not known
    for name in ("peak_bytes", "baseline_peak_bytes", "vit_peak_bytes"):
        assert 1e7 < found[name] < 2e9
    assert "2 of 2" not in done.stdout  # progress goes to standard error


def test_lines_are_for_people() -> None:
    values = {field.name: 1.5 for field in dataclasses.fields(model.ModelBench)}
    told = {**values, "size": "base", "device": "some CPU", "torch": "2.13.0", "matmul_size": 2048}
    result = model.ModelBench(**{**told, "parts": {"head": 0.85}, "mfu": None})  # type: ignore[arg-type]
    text = "\n".join(result.lines())
    for word in ("base", "some CPU", "2048 x 2048", "MFU: unknown", "head 0.85", "ViT"):
        assert word in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_implementations_train_alike(dtype: str) -> None:
    ours, baseline = (
        TrainingStep(dataclasses.replace(NANO, dtype=dtype, straightforward=flag))
        for flag in (False, True)
    )
    losses = [ours.run()[1] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.003
    exact = {"float32": 1e-4, "bfloat16": 2e-3}[dtype]
    assert [baseline.run()[1] for _ in range(10)] == pytest.approx(losses, abs=exact)


def test_a_failing_step_is_told() -> None:
    worker = Worker("ours", dataclasses.replace(NANO, device="meta:9"))
    try:
        with pytest.raises(ClusterError, match=r"ours.*--batch-size"):
            worker.ask("step")
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "huge"}, "Unknown model size"),
        ({"dtype": "int8"}, "float32 or bfloat16"),
        ({"device": "abacus"}, "use auto or cpu"),
    ],
)
def test_what_there_is_not_is_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model.run(**{"size": "nano", "batch_size": 1, **options})  # type: ignore[arg-type]
