"""Training steps in processes of their own, for comparisons.

In: a `StepSpec`. Out, step by step: its seconds and loss, and in the end the memory that the
process has needed. Each variant has its own process, so that its memory, threads and compiled
programs affect no other; one works at a time. A step is an optimizer step of a run without its
data, DeepSpeed and other ranks: forward, loss, backward, clipping, AdamW. In bfloat16 the optimizer
updates float32 copies of the weights, as DeepSpeed's does. The straightforward variant has torch's
own linear layers, allocator and AdamW; `describe_variant` says what each side has.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.bench import baseline
from svfap_dist.config import Config, ModelConfig, OptimConfig, recipe
from svfap_dist.errors import ClusterError, ConfigError
from svfap_dist.model import autoencoder, patches
from svfap_dist.model.layers import linear, use_convolutions, uses_convolutions
from svfap_dist.parallel.processes import ChildProcess, CrashedError
from svfap_dist.profiling.step import noise_batch
from svfap_dist.train import optim

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the two factors
_MATMUL_SECONDS = 0.3
_CLIP_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """A variant of a training step."""

    size: str
    batch_size: int
    dtype: str
    device: str
    compile: bool = False
    straightforward: bool = False  # whether `baseline` computes the model, instead of our own code
    encoder: str = ModelConfig().encoder

    @property
    def config(self) -> Config:
        """Return the recipe of the model and its clips."""
        return bench_recipe(self.size, self.batch_size, model={"encoder": self.encoder})


def bench_recipe(size: str, batch_size: int, **sections: dict[str, object]) -> Config:
    """Return the paper's recipe with some keys replaced.

    Args:
        size: of the model.
        batch_size: clips of a step.
        sections: replaced keys by section.
    """
    batch = {"global_batch_size": batch_size, "micro_batch_size": batch_size}
    tables = {
        **sections,
        "data": {"num_lanes": 1} | sections.get("data", {}),
        "model": {"size": size} | sections.get("model", {}),
        "train": batch | sections.get("train", {}),
    }
    return recipe.from_tables(tables, where="svfap bench")


def check_device(device: str, dtype: str) -> str:
    """Return the device that an option names.

    Args:
        device: "cpu", "cuda", or "auto": the GPU if there is one.
        dtype: of the step.

    Raises:
        ConfigError: for an unknown type or a missing device.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError("Unsupported type", "--dtype", dtype, "use float32 or bfloat16")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device == "auto":
        return devices[-1]
    if device not in devices:
        advice = f"use auto or {' or '.join(devices)}"
        raise ConfigError("Device not available", "--device", device, advice)
    return device


def describe_variant(spec: StepSpec) -> str:
    """Return what a variant uses besides its own code for the model, in words.

    Args:
        spec: the variant.
    """
    on_cpu = spec.device == "cpu"
    if spec.straightforward:
        memory = "freed memory returned to the system, " if on_cpu else ""
        return f"linear layers by torch's linear, {memory}AdamW not fused"
    fast = on_cpu and spec.dtype == "float32" and not spec.compile and uses_convolutions()
    linears = "convolutions (oneDNN)" if fast else "torch's linear"
    memory = "freed memory kept, " if on_cpu else ""
    return f"linear layers by {linears}, {memory}AdamW fused"


class TrainingStep:
    """A model with its optimizer and one batch of noise, on a device."""

    def __init__(self, spec: StepSpec) -> None:
        self._spec, self._device = spec, torch.device(spec.device)
        torch.manual_seed(0)
        model = autoencoder.build(spec.size, encoder=spec.encoder)
        self._size = model.size
        noise = noise_batch(spec.config, spec.batch_size)
        assert isinstance(noise.frames, Tensor)
        model.to(self._device, getattr(torch, spec.dtype))
        self._model: nn.Module = baseline.Straightforward(model) if spec.straightforward else model
        if spec.straightforward:  # its loader normalizes, and gives a boolean mask
            mask = torch.ones(spec.batch_size, model.size.num_tokens, dtype=torch.bool)
            batch = patches.normalize(noise.frames), mask.scatter(1, noise.visible, False)
        else:
            batch = noise.frames, noise.visible, noise.masked
        self._batch = tuple(tensor.to(self._device) for tensor in batch)
        if spec.compile:
            self._model.compile(dynamic=False)
        self._optimizer, self._pairs = self._make_optimizer()

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
        """Return AdamW, and (weight, float32 copy) where it updates copies."""
        pairs: list[tuple[Tensor, Tensor]] = []
        if self._spec.dtype != "float32":
            pairs = [(p, nn.Parameter(p.detach().float())) for p in self._model.parameters()]
        parameters = [copy for _, copy in pairs] or list(self._model.parameters())
        owner, settings = nn.ParameterList(parameters), OptimConfig()
        if not self._spec.straightforward:
            return optim.adamw(owner, settings), pairs
        groups = optim.parameter_groups(owner, settings.weight_decay)
        # Not fused, which is torch's default.
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas), pairs

    def _loss(self) -> Tensor:
        patch = self._size.patch
        if self._spec.straightforward:
            clips, mask = self._batch
            target = baseline.targets(clips, mask, patch)
        else:
            frames, _, masked = self._batch
            target = patches.targets(frames, masked, patch)
        return patches.masked_patch_loss(self._model(*self._batch), target)

    def run(self) -> tuple[float, float]:
        """Take a step; return its seconds, and the loss before it."""
        began = time.perf_counter()
        value = self._loss()
        value.backward()
        for weight, copy in self._pairs:
            assert weight.grad is not None
            copy.grad, weight.grad = weight.grad.float(), None
        groups = self._optimizer.param_groups
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for weight, copy in self._pairs:
                weight.copy_(copy)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, value.item()


class StepProcess:
    """A process that takes a variant's steps on request; a context manager.

    Args:
        name: of the variant, for errors.
        spec: the variant.
    """

    def __init__(self, name: str, spec: StepSpec) -> None:
        self._name = name
        self._process = ChildProcess[str, tuple[float, float]](
            functools.partial(_answer, spec), seconds=None, may_have_children=True
        )

    def __enter__(self) -> StepProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def step(self) -> tuple[float, float]:
        """See `TrainingStep.run`.

        Raises:
            ClusterError: the process dies or the step fails, for lack of memory, say.
        """
        return self._ask("step")

    def matmul_rates(self) -> tuple[float, float]:
        """Return operations per second of a large product, by torch and by our linear layer."""
        return self._ask("matmul")

    def peak_bytes(self) -> int:
        """Return the bytes that the process needed at most for weights, optimizer and steps."""
        return int(self._ask("memory")[0])

    def _ask(self, request: str) -> tuple[float, float]:
        try:
            return self._process(request)
        except (RuntimeError, CrashedError) as error:  # torch's lack of memory is a RuntimeError
            found, advice = str(error).splitlines()[0], "try a smaller --batch-size or --size"
            raise ClusterError("Benchmark step failed", self._name, found, advice) from error


@dataclasses.dataclass
class _ProcessState:
    """State of a step process between two requests."""

    resident: int  # bytes before the first step
    training: TrainingStep | None = None
    peak: int = 0


@functools.cache
def _state(spec: StepSpec) -> _ProcessState:
    """Set this process up for a variant, once."""
    is_cpu = spec.device == "cpu"
    if spec.straightforward:
        use_convolutions(False)
    elif is_cpu:
        keep_freed_memory()  # as the engine does
    return _ProcessState(_resident_bytes("VmRSS") if is_cpu else 0)


def _answer(spec: StepSpec, request: str) -> tuple[float, float]:
    """Serve a request of `StepProcess` in its process."""
    state, is_cpu = _state(spec), spec.device == "cpu"
    if request == "memory":
        return state.peak, 0.0
    if request == "matmul":
        rates = _matmul_rates(spec)
        if not is_cpu:
            torch.cuda.reset_peak_memory_stats()
        return rates
    state.training = state.training or TrainingStep(spec)
    answer = state.training.run()
    # Read after steps only: the factors of the products are not part of the model's memory.
    if is_cpu:
        state.peak = max(state.peak, _resident_bytes("VmHWM") - state.resident)
    else:
        state.peak = max(state.peak, torch.cuda.max_memory_allocated())
    return answer


def _matmul_rates(spec: StepSpec) -> tuple[float, float]:
    n = MATMUL_SIZE[torch.device(spec.device).type]
    a, b = (
        torch.randn(n, n, device=spec.device, dtype=getattr(torch, spec.dtype)) for _ in range(2)
    )
    factors, threads = {"a": a, "b": b, "linear": linear}, torch.get_num_threads()
    with torch.no_grad():
        plain, ours = (
            Timer(product, globals=factors, num_threads=threads).blocked_autorange(
                min_run_time=_MATMUL_SECONDS
            )
            for product in ("a @ b", "linear(a, b)")
        )
    return 2 * n**3 / plain.median, 2 * n**3 / ours.median


def _resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith(field)]
    return int(line.split()[1]) * 1024
