"""`svfap bench model`: how fast a training step is on this device, and what it could be.

Ours, the straightforward baseline and a large matrix product take turns, so that whatever else the
machine does meets all three alike; the median of the rounds counts. Two counts of a step's
operations are told. The nominal one is that of the paper's figures: what a network written without
thought of unneeded work does. It measures progress per clip, and is the same for ours and the
baseline. The exact one is what our step really does; MFU, which is about the device, uses it.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
from typing import Any

import torch

from svfap_dist.bench.steps import MATMUL_SIZE, Spec, Worker, means, token_splits, workers
from svfap_dist.errors import ConfigError
from svfap_dist.model import flops
from svfap_dist.model.sizes import resolve
from svfap_dist.progress import Progress, say

_WARM_UP = 2  # steps


@dataclasses.dataclass(frozen=True)
class ModelBench:
    """What came out. Rates are per second; operations are of a training step of one clip; peaks are
    bytes that weights, optimizer and steps needed at most.

    gflops, *_share: by the nominal count; exact_*, tflops, mfu: by the exact one.
    matmul_*: of `torch.matmul`; linear_*: of the same product by our linear layers, which on some
    CPUs take a faster way, so that the share of `torch.matmul` may pass 1.
    mfu: share of what the device is known to do at best; None where that is not known.
    vit_*: the plain ViT of the same name, None unless asked for.
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
    means: str  # linear layers, memory and optimizer of ours, and then of the baseline
    baseline_means: str
    parts: dict[str, float]  # operations of the forward pass, in units of 1e9
    vit_clips_per_second: float | None = None
    vit_gflops: float | None = None
    vit_ratio: float | None = None
    vit_peak_bytes: int | None = None

    def lines(self) -> list[str]:
        """For people."""
        place = f"{self.device}, {self.threads} threads, torch {self.torch}"
        parts = "  ".join(f"{name} {value:.2f}" for name, value in self.parts.items())
        product = f"{self.matmul_size} x {self.matmul_size}"
        text = [
            f"Autoencoder {self.size}, batch {self.batch_size}, {self.dtype}"
            f"{', compiled' if self.compile else ''}: {place}.",
            f"Ours      {self.clips_per_second:8.2f} clips/s  {_gb(self.peak_bytes)}",
            f"Baseline  {self.baseline_clips_per_second:8.2f} clips/s  "
            f"{_gb(self.baseline_peak_bytes)}   ours is {self.ratio:.2f} times as fast",
        ]
        if self.vit_clips_per_second is not None:
            text.append(
                f"ViT       {self.vit_clips_per_second:8.2f} clips/s  {_gb(self.vit_peak_bytes)}   "
                f"ours is {self.vit_ratio:.2f} times as fast, and by the nominal counts does "
                f"{self.gflops:.1f} GFLOP per clip to its {self.vit_gflops:.1f}"
            )
            text.append(
                "          The paper's claim is fewer operations: 43.5 G multiply-adds per clip to "
                "ViT-B's 80.7, fine-tuned"
            )
        return [
            *text,
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


def _gb(num_bytes: int | None) -> str:
    return f"{(num_bytes or 0) / 2**30:6.2f} GiB"


@dataclasses.dataclass
class _Measured:
    """What a variant's process told."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    loss: float = 0.0  # of the first step
    peak_bytes: int = 0

    def clips_per_second(self, batch_size: int) -> float:
        return batch_size / statistics.median(self.seconds)


def run(
    size: str,
    batch_size: int,
    *,
    dtype: str = "float32",
    device: str = "auto",
    compile: bool = False,
    compare_vit: bool = False,
    steps: int = 7,
) -> ModelBench:
    """Time `steps` steps of each variant, after warming up.

    Raises: ConfigError for a size, type or device that there is not; ClusterError if a step fails,
    for lack of memory, say.
    """
    device = _checked_device(device, dtype)
    ours = Spec(size, "tpsbt", batch_size, dtype, device, compile)
    baseline = dataclasses.replace(ours, compile=False, straightforward=True)
    variants = {"ours": ours, "baseline": baseline}
    if compare_vit:
        variants["vit"] = dataclasses.replace(ours, encoder="vit")
    counts = {spec.encoder: _count(spec) for spec in variants.values()}
    with workers(variants) as started:
        measured, products = _rounds(started, batch_size, steps)
    return _result(ours, steps, counts, measured, products)


def _checked_device(device: str, dtype: str) -> str:
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError("No such type", where="--dtype", found=dtype, do="float32 or bfloat16")
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device == "auto":
        return there[-1]
    if device not in there:
        raise ConfigError(
            "No such device", where="--device", found=device, do=f"use auto or {' or '.join(there)}"
        )
    return device


@dataclasses.dataclass(frozen=True)
class _Count:
    """Operations for a clip: of a training step in two counts, of the forward pass by part."""

    nominal: int
    exact: int
    parts: dict[str, int]


def _count(spec: Spec) -> _Count:
    size = resolve(spec.size, {"encoder": spec.encoder})
    visible, masked = (split.shape[1] for split in token_splits(size, 1))
    parts = flops.autoencoder(size, visible, masked)
    dense = flops.dense_autoencoder(size, visible, masked)
    return _Count(3 * sum(dense.values()), flops.training_step(parts), parts)


def _rounds(
    started: dict[str, Worker], batch_size: int, steps: int
) -> tuple[dict[str, _Measured], tuple[float, float]]:
    """What each variant's process told, and the median rates of the matrix products."""
    measured = {name: _Measured() for name in started}
    rates: list[tuple[float, float]] = []
    for name, worker in started.items():
        say(f"Warming up {name} ...")
        _, measured[name].loss = worker.ask("step")
        for _ in range(_WARM_UP - 1):
            worker.ask("step")
    with Progress("Rounds", steps) as progress:
        for number in range(steps):
            rates.append(started["ours"].ask("products"))
            for name, worker in started.items():
                measured[name].seconds.append(worker.ask("step")[0])
            notes = (f"{n} {m.clips_per_second(batch_size):.2f}" for n, m in measured.items())
            progress.update(number + 1, note=f"clips/s: {', '.join(notes)}")
    for name, worker in started.items():
        measured[name].peak_bytes = worker.ask("memory")
    matmul, linear = (statistics.median(column) for column in zip(*rates, strict=True))
    return measured, (matmul, linear)


def _result(
    spec: Spec,
    steps: int,
    counts: dict[str, _Count],
    measured: dict[str, _Measured],
    products: tuple[float, float],
) -> ModelBench:
    count, ours, baseline = counts[spec.encoder], measured["ours"], measured["baseline"]
    rate, (matmul, linear) = ours.clips_per_second(spec.batch_size), products
    baseline_rate = baseline.clips_per_second(spec.batch_size)
    name = torch.cuda.get_device_name() if spec.device == "cuda" else platform.machine() + " CPU"
    peak = flops.peak_rate(name, spec.dtype)
    vit: dict[str, Any] = {}
    if "vit" in measured:
        vit_rate = measured["vit"].clips_per_second(spec.batch_size)
        vit = {
            "vit_clips_per_second": vit_rate,
            "vit_gflops": counts["vit"].nominal / 1e9,
            "vit_ratio": rate / vit_rate,
            "vit_peak_bytes": measured["vit"].peak_bytes,
        }
    return ModelBench(
        size=spec.size,
        batch_size=spec.batch_size,
        dtype=spec.dtype,
        compile=spec.compile,
        device=name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        steps=steps,
        clips_per_second=rate,
        gflops=count.nominal / 1e9,
        exact_gflops=count.exact / 1e9,
        tflops=rate * count.exact / 1e12,
        matmul_size=MATMUL_SIZE[spec.device],
        matmul_gflops=matmul / 1e9,
        matmul_share=rate * count.nominal / matmul,
        exact_matmul_share=rate * count.exact / matmul,
        linear_gflops=linear / 1e9,
        linear_share=rate * count.nominal / linear,
        mfu=rate * count.exact / peak if peak else None,
        peak_bytes=ours.peak_bytes,
        baseline_clips_per_second=baseline_rate,
        ratio=rate / baseline_rate,
        baseline_peak_bytes=baseline.peak_bytes,
        loss=ours.loss,
        baseline_loss=baseline.loss,
        means=means(spec),
        baseline_means=means(dataclasses.replace(spec, compile=False, straightforward=True)),
        parts={name: value / 1e9 for name, value in count.parts.items()},
        **vit,
    )
