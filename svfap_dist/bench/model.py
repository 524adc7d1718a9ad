"""`svfap bench model`: the speed of a training step on this device, and its upper bounds.

Ours, the straightforward baseline and a large matrix product take turns, so that other load on the
machine affects all three alike; medians of the rounds count. Operations of a step are counted in
two ways. The nominal count is that of the paper's figures, of a network that also computes what the
loss never uses; it is the same for ours and the baseline, and measures progress per clip. The exact
count is what our step computes; MFU uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch

from svfap_dist.bench.against import CheckoutSteps
from svfap_dist.bench.steps import (
    MATMUL_SIZE,
    StepProcess,
    StepSpec,
    check_device,
    describe_variant,
)
from svfap_dist.model import flops
from svfap_dist.model.sizes import resolve
from svfap_dist.profiling.step import noise_batch
from svfap_dist.profiling.timing import take_turns
from svfap_dist.text_table import format_table

log = logging.getLogger(__name__)

_WARM_UP = 2  # steps


@dataclasses.dataclass(frozen=True)
class ModelBench:
    """Figures of a training step; rates are per second, operations of one clip.

    Args:
        gflops, *_share: by the nominal count; exact_*, tflops, mfu: by the exact one.
        matmul_*: of `torch.matmul`.
        linear_*: of the same product by our linear layers, which are faster on some CPUs, so that
            the share of `torch.matmul` may exceed 1.
        mfu: share of the device's peak rate; None where that is unknown.
        *peak_bytes: bytes that weights, optimizer and steps needed at most.
        means, baseline_means: linear layers, allocator and optimizer of both sides.
        parts: operations of the forward pass, in units of 1e9.
        vit_*: of the plain ViT of the same name; None unless it is compared.
        against_*: of another checkout of this repository; None unless it is compared.
    """

    size: str
    batch_size: int
    dtype: str
    compile: bool
    device: str
    threads: int
    torch: str
    steps: int
    clips_per_second: float
    gflops: float
    exact_gflops: float
    tflops: float
    matmul_size: int
    matmul_gflops: float
    matmul_share: float
    exact_matmul_share: float
    linear_gflops: float
    linear_share: float
    mfu: float | None
    peak_bytes: int
    baseline_clips_per_second: float
    ratio: float
    baseline_peak_bytes: int
    loss: float
    baseline_loss: float
    means: str
    baseline_means: str
    parts: dict[str, float]
    vit_clips_per_second: float | None = None
    vit_gflops: float | None = None
    vit_ratio: float | None = None
    vit_peak_bytes: int | None = None
    against: str | None = None
    against_clips_per_second: float | None = None
    against_ratio: float | None = None
    against_loss: float | None = None

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        place = f"{self.device}, {self.threads} threads, torch {self.torch}"
        text = f"ours is {self.ratio:.2f} times as fast"
        rows = [
            ("Ours", self.clips_per_second, self.peak_bytes, ""),
            ("Baseline", self.baseline_clips_per_second, self.baseline_peak_bytes, text),
        ]
        notes = []
        if self.vit_clips_per_second is not None:
            text = f"ours is {self.vit_ratio:.2f} times as fast, and by the nominal counts does "
            text += f"{self.gflops:.1f} GFLOP per clip to its {self.vit_gflops:.1f}"
            rows.append(("ViT", self.vit_clips_per_second, self.vit_peak_bytes or 0, text))
            notes.append(
                "The paper's claim is fewer operations: 43.5 G multiply-adds per clip to ViT-B's "
                "80.7, fine-tuned."
            )
        if self.against is not None:
            notes.append(
                f"Ours is {self.against_ratio:.2f} times as fast as {self.against}, "
                f"which makes {self.against_clips_per_second:.2f} clips/s."
            )
        parts = "  ".join(f"{name} {value:.2f}" for name, value in self.parts.items())
        product = f"{self.matmul_size} x {self.matmul_size}"
        return [
            f"Autoencoder {self.size}, batch {self.batch_size}, {self.dtype}"
            f"{', compiled' if self.compile else ''}: {place}.",
            *format_table(
                [
                    (name, f"{rate:.2f} clips/s", f"{num_bytes / 2**30:.2f} GiB", text)
                    for name, rate, num_bytes, text in rows
                ],
                right=(1, 2),
            ),
            *notes,
            f"Ours has {self.means}; the baseline has {self.baseline_means}.",
            f"Work of a clip: {self.gflops:.1f} GFLOP nominal, {self.exact_gflops:.1f} exact; "
            f"{self.tflops:.3f} TFLOP/s exact.",
            f"Matrix product {product}: {self.matmul_gflops:.0f} GFLOP/s by torch.matmul; the step "
            f"reaches {self.matmul_share:.0%} of it nominal, {self.exact_matmul_share:.0%} exact.",
            f"The same product by our linear layers: {self.linear_gflops:.0f} GFLOP/s; the step "
            f"reaches {self.linear_share:.0%} of it nominal.",
            f"MFU: {'unknown' if self.mfu is None else f'{self.mfu:.1%}'}",
            f"Forward pass of a clip, GFLOP: {parts}",
        ]


def run(
    size: str,
    batch_size: int,
    *,
    dtype: str = "float32",
    device: str = "auto",
    compile: bool = False,
    compare_vit: bool = False,
    against: str = "",
    steps: int = 7,
) -> ModelBench:
    """Time training steps of each variant, after warming up.

    Args:
        size: of the model.
        batch_size: clips of a step.
        dtype: "float32" or "bfloat16".
        device: "cpu", "cuda", or "auto": the GPU if there is one.
        compile: whether torch compiles our model.
        compare_vit: whether to time the plain ViT, too.
        against: folder of another checkout of this repository that takes the same steps; empty:
            none.
        steps: that are timed.

    Raises:
        ConfigError: for an unknown size or type, or a missing device.
        ClusterError: a step fails, for lack of memory, say.
    """
    device = check_device(device, dtype)
    ours = StepSpec(size, batch_size, dtype, device, compile)
    baseline = dataclasses.replace(ours, compile=False, straightforward=True)
    variants = {"ours": ours, "baseline": baseline}
    if compare_vit:
        variants["vit"] = dataclasses.replace(ours, encoder="vit")
    nominal, exact, parts = _count_operations(ours)
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(StepProcess(name, spec)) for name, spec in variants.items()
        }
        steppers: dict[str, StepProcess | CheckoutSteps] = {**processes}
        if against:
            options = dataclasses.asdict(ours)
            steppers["against"] = stack.enter_context(CheckoutSteps(against, options))
        losses: dict[str, float] = {}
        for name, process in steppers.items():
            log.info("Warming up %s ...", name)
            losses[name] = process.step()[1]
            for _ in range(_WARM_UP - 1):
                process.step()
        turns: dict[str, Callable[[int], tuple[float, float]]] = {
            name: lambda _, process=process: process.step() for name, process in steppers.items()
        }
        turns["matmul"] = lambda _: processes["ours"].matmul_rates()

        def note(name: str, result: tuple[float, float]) -> str:
            return "" if name == "matmul" else f"{name} {batch_size / result[0]:.2f} clips/s"

        results = take_turns(turns, steps, note=note)
        peaks = {name: process.peak_bytes() for name, process in processes.items()}
    rates = {
        name: batch_size / statistics.median(seconds for seconds, _ in results[name])
        for name in steppers
    }
    matmul, linear = map(statistics.median, zip(*results["matmul"], strict=True))
    rate = rates["ours"]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    peak = flops.peak_rate(name, dtype)
    others: dict[str, Any] = {}
    if against:
        others = {
            "against": against,
            "against_clips_per_second": rates["against"],
            "against_ratio": rate / rates["against"],
            "against_loss": losses["against"],
        }
    if compare_vit:
        others |= {
            "vit_clips_per_second": rates["vit"],
            "vit_gflops": _count_operations(variants["vit"])[0] / 1e9,
            "vit_ratio": rate / rates["vit"],
            "vit_peak_bytes": peaks["vit"],
        }
    return ModelBench(
        size=size,
        batch_size=batch_size,
        dtype=dtype,
        compile=compile,
        device=name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        steps=steps,
        clips_per_second=rate,
        gflops=nominal / 1e9,
        exact_gflops=exact / 1e9,
        tflops=rate * exact / 1e12,
        matmul_size=MATMUL_SIZE[device],
        matmul_gflops=matmul / 1e9,
        matmul_share=rate * nominal / matmul,
        exact_matmul_share=rate * exact / matmul,
        linear_gflops=linear / 1e9,
        linear_share=rate * nominal / linear,
        mfu=rate * exact / peak if peak else None,
        peak_bytes=peaks["ours"],
        baseline_clips_per_second=rates["baseline"],
        ratio=rate / rates["baseline"],
        baseline_peak_bytes=peaks["baseline"],
        loss=losses["ours"],
        baseline_loss=losses["baseline"],
        means=describe_variant(ours),
        baseline_means=describe_variant(baseline),
        parts={name: value / 1e9 for name, value in parts.items()},
        **others,
    )


def _count_operations(spec: StepSpec) -> tuple[int, int, dict[str, int]]:
    """Return a clip's operations: nominal and exact of a step; of the forward pass by part."""
    size, batch = resolve(spec.size, {"encoder": spec.encoder}), noise_batch(spec.config, 1)
    visible, masked = batch.visible.shape[1], batch.masked.shape[1]
    parts = flops.autoencoder(size, visible, masked)
    dense = flops.dense_autoencoder(size, visible, masked)
    return 3 * sum(dense.values()), flops.training_step(parts), parts
