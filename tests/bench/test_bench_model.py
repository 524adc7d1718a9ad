"""`svfap bench model`: a whole run at the smallest size, its numbers held against each other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from svfap_dist import cli
from svfap_dist.bench import model, steps
from svfap_dist.bench.against import CheckoutSteps
from svfap_dist.bench.steps import StepProcess, StepSpec, TrainingStep, describe_variant
from svfap_dist.errors import ClusterError, ConfigError
from svfap_dist.model import flops, layers, sizes

NANO = StepSpec("nano", 2, "float32", "cpu")


@pytest.mark.slow
def test_printed_figures_add_up() -> None:
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
    assert found["gflops"] == pytest.approx(model._count_operations(NANO)[0] / 1e9)
    assert found["linear_share"] == pytest.approx(rate * found["gflops"] / found["linear_gflops"])


def test_the_nominal_count_is_that_of_the_papers_figures() -> None:
    (nominal, exact, _), size = model._count_operations(NANO), sizes.resolve("nano", {})
    dense = flops.dense_autoencoder(size, 80, 720)
    assert nominal == 3 * sum(dense.values())
    assert exact == flops.training_step(flops.autoencoder(size, 80, 720))
    assert exact < nominal


def _operations(step: TrainingStep) -> set[str]:
    step.run()
    with torch.profiler.profile() as profile:
        step.run()
    return {event.key for event in profile.key_averages()}


def test_the_baseline_is_the_other_implementation() -> None:
    frank, lean = {"aten::conv3d", "aten::softmax"}, {"aten::scaled_dot_product_attention"}
    baseline = _operations(TrainingStep(dataclasses.replace(NANO, straightforward=True)))
    ours = _operations(TrainingStep(NANO))
    assert frank <= baseline
    assert not lean & baseline
    assert lean <= ours
    assert "aten::conv3d" not in ours  # a softmax it has: that of the bottleneck


def test_variants_match_their_description(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dataclasses.replace(NANO, straightforward=True)
    kept: list[bool] = []
    monkeypatch.setattr(steps, "keep_freed_memory", lambda: kept.append(True) or True)
    convolutions = layers._prefers_convolutions()
    try:
        for spec, expected in ((NANO, ([True], convolutions)), (plain, ([], False))):
            kept.clear()
            steps._state.__wrapped__(spec)
            assert (kept, layers.uses_convolutions()) == expected
    finally:
        layers.use_convolutions(convolutions)
    assert ("oneDNN" in describe_variant(NANO)) is convolutions
    assert describe_variant(NANO).endswith("freed memory kept, AdamW fused")
    assert describe_variant(plain) == (
        "linear layers by torch's linear, freed memory returned to the system, AdamW not fused"
    )
    fused = [TrainingStep(spec)._optimizer.defaults["fused"] for spec in (NANO, plain)]
    assert fused == [True, None]


def test_compile_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, plain = (
        TrainingStep(dataclasses.replace(NANO, compile=flag))._model._compiled_call_impl
        for flag in (True, False)
    )
    assert compiled is not None
    assert plain is None
    variants: dict[str, StepSpec] = {}

    def no_process(name: str, spec: StepSpec) -> None:
        variants[name] = spec
        if len(variants) == 2:
            raise ConfigError("No run")

    monkeypatch.setattr(
        model, "StepProcess", lambda name, spec: no_process(name, spec) or contextlib.nullcontext()
    )
    words = ["bench", "model", "--size", "nano", "--compile", "--device", "cpu"]
    CliRunner().invoke(cli.app, words)
    assert [variants[name].compile for name in ("ours", "baseline")] == [True, False]


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_CLIP_NORM", 1e-12)  # so short that AdamW's epsilon swallows it
    step = TrainingStep(NANO)
    step.run()
    assert _biases(step).abs().max() < 1e-6
    monkeypatch.undo()
    step = TrainingStep(NANO)
    step.run()
    assert _biases(step).abs().max() > 1e-5


def _biases(step: TrainingStep) -> torch.Tensor:
    """The values' biases, which start at zero and do not decay."""
    named = step._model.named_parameters()
    return torch.cat([value.detach() for name, value in named if name.endswith("v_bias")])


def test_the_clock_runs_from_forward_to_optimizer() -> None:
    step = TrainingStep(NANO)
    step.run()

    def wait(*ignored: object) -> None:
        time.sleep(0.5)

    step._model.register_forward_pre_hook(wait)
    next(step._model.parameters()).register_post_accumulate_grad_hook(wait)
    step._optimizer.register_step_pre_hook(wait)
    assert step.run()[0] > 1.5


def test_lines_name_all_figures() -> None:
    values = {field.name: 1.5 for field in dataclasses.fields(model.ModelBench)}
    given = {**values, "size": "base", "device": "some CPU", "torch": "2.13.0", "matmul_size": 2048}
    result = model.ModelBench(**{**given, "parts": {"head": 0.85}, "mfu": None})  # type: ignore[arg-type]
    text = "\n".join(result.lines())
    for word in (
        "base",
        "some CPU",
        "2048 x 2048",
        "MFU: unknown",
        "head 0.85",
        "ViT",
        "paper's claim",
    ):
        assert word in text


def test_another_checkout_takes_turns_with_its_own_modules(tmp_path: Path) -> None:
    """A copy of the package whose steps claim to take a fixed time, which nothing else does."""
    package = Path(steps.__file__).parents[1]
    shutil.copytree(package, tmp_path / "svfap_dist")
    copied = tmp_path / "svfap_dist/bench/steps.py"
    text, ending = copied.read_text(), "return time.perf_counter() - began, value.item()"
    copied.write_text(text.replace(ending, "return 400.0, value.item()"))
    found = model.run("nano", 2, device="cpu", against=str(tmp_path), steps=1)
    assert found.against_clips_per_second == pytest.approx(2 / 400)
    assert found.against_ratio == pytest.approx(found.clips_per_second / (2 / 400))
    assert found.against_loss == pytest.approx(found.loss)
    assert f"times as fast as {tmp_path}" in "\n".join(found.lines())


def test_a_failing_or_missing_checkout_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="git worktree add"):
        CheckoutSteps(str(tmp_path), {})
    (tmp_path / "svfap_dist").mkdir()
    (tmp_path / "svfap_dist/__init__.py").write_text("raise ImportError('a broken checkout')")
    with (
        CheckoutSteps(str(tmp_path), {"device": "cpu"}) as steps_of_it,
        pytest.raises(ClusterError, match="a broken checkout"),
    ):
        steps_of_it.step()


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


def test_a_failing_step_is_an_error() -> None:
    process = StepProcess("ours", dataclasses.replace(NANO, device="meta:9"))
    with process, pytest.raises(ClusterError, match=r"ours.*--batch-size"):
        process.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "huge"}, "Unknown model size"),
        ({"dtype": "int8"}, "float32 or bfloat16"),
        ({"device": "abacus"}, "use auto or cpu"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model.run(**{"size": "nano", "batch_size": 1, **options})  # type: ignore[arg-type]
