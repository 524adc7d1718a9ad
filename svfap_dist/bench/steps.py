"""A training step to be timed, in a process of its own.

In: what to train and how (`Spec`). Out, step by step: how long it took, and at the end how much
memory the process has needed. Each variant has its own process, so that one's memory, threads and
compiled programs say nothing about another's; only one of them works at a time. A step is what an
optimizer step of a run is, without its data, DeepSpeed and other ranks: forward, loss, backward,
clipping, AdamW. In bfloat16 the optimizer works on float32 copies of the weights, as DeepSpeed's
does. The straightforward variant has torch's linear layers, C library and AdamW as they are unless
one asks for more; `means` tells what a side has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.bench import baseline
from svfap_dist.config import OptimConfig
from svfap_dist.data import masking
from svfap_dist.errors import ClusterError
from svfap_dist.model import autoencoder, loss, patches
from svfap_dist.model.layers import linear, use_convolutions, uses_convolutions
from svfap_dist.model.sizes import Size
from svfap_dist.rng import Stream
from svfap_dist.train import optim

MASK_RATIO = 0.9  # paper
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the two factors
_PRODUCTS = 5
_CLIP_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is timed.

    straightforward: by `baseline` instead of our own way through the model.
    """

    size: str
    encoder: str
    batch_size: int
    dtype: str
    device: str
    compile: bool = False
    straightforward: bool = False


def means(spec: Spec) -> str:
    """What a variant makes use of besides its way through the model, in words."""
    on_cpu = spec.device == "cpu"
    if spec.straightforward:
        memory = "freed memory handed back, " if on_cpu else ""
        return f"linear layers by torch's linear, {memory}AdamW not fused"
    fast = on_cpu and spec.dtype == "float32" and not spec.compile and uses_convolutions()
    linears = "convolutions (oneDNN)" if fast else "torch's linear"
    memory = "freed memory kept, " if on_cpu else ""
    return f"linear layers by {linears}, {memory}AdamW fused"


def token_splits(size: Size, clips: int) -> tuple[Tensor, Tensor]:
    """Tube masks: visible [B, V] and masked [B, M] tokens of each clip."""
    splits = [
        masking.tube(Stream("bench", i), size.num_tubelets, size.patches_per_frame, MASK_RATIO)
        for i in range(clips)
    ]
    return (
        torch.stack([torch.from_numpy(split.visible) for split in splits]),
        torch.stack([torch.from_numpy(split.masked) for split in splits]),
    )


class TrainingStep:
    """A model with its optimizer and one batch, on a device."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._device = spec, torch.device(spec.device)
        torch.manual_seed(0)
        model = autoencoder.build(spec.size, encoder=spec.encoder)
        self._size = model.size
        frames = torch.randint(0, 256, self._frames_shape(), dtype=torch.uint8)
        visible, masked = token_splits(model.size, spec.batch_size)
        model.to(self._device, getattr(torch, spec.dtype))
        self._model: nn.Module = baseline.Straightforward(model) if spec.straightforward else model
        if spec.straightforward:  # whose loader normalises, and gives a boolean mask
            mask = torch.ones(len(frames), model.size.num_tokens, dtype=torch.bool)
            batch = patches.normalize(frames), mask.scatter(1, visible, False)
        else:
            batch = frames, visible, masked
        self._batch = tuple(tensor.to(self._device) for tensor in batch)
        if spec.compile:
            self._model.compile(dynamic=False)
        self._optimizer, self._pairs = self._make_optimizer()

    def _frames_shape(self) -> tuple[int, ...]:
        size = self._size
        return (self._spec.batch_size, size.num_frames, size.frame_size, size.frame_size, 3)

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
        """AdamW, and (weight, float32 copy) where it works on copies."""
        pairs: list[tuple[Tensor, Tensor]] = []
        if self._spec.dtype != "float32":
            pairs = [(p, nn.Parameter(p.detach().float())) for p in self._model.parameters()]
        parameters = [copy for _, copy in pairs] or list(self._model.parameters())
        owner, settings = nn.ParameterList(parameters), OptimConfig()
        if not self._spec.straightforward:
            return optim.adamw(owner, settings), pairs
        groups = optim.parameter_groups(owner, settings.weight_decay)
        # The same, but not fused: what torch does unless told.
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas), pairs

    def _loss(self) -> Tensor:
        shape = self._size.tubelet_size, self._size.patch_size
        if self._spec.straightforward:
            clips, mask = self._batch
            target = baseline.targets(clips, mask, *shape)
        else:
            frames, _, masked = self._batch
            target = loss.targets(frames, masked, *shape)
        return loss.masked_patch_loss(self._model(*self._batch), target)

    def run(self) -> tuple[float, float]:
        """Take a step: seconds, and the loss before it."""
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


def product_rates(spec: Spec) -> tuple[float, float]:
    """Floating-point operations per second of a large square product of the type's factors, by
    `torch.matmul` and by our linear layer, which may know a faster way on CPUs."""
    n = MATMUL_SIZE[torch.device(spec.device).type]
    a, b = (
        torch.randn(n, n, device=spec.device, dtype=getattr(torch, spec.dtype)) for _ in range(2)
    )
    with torch.no_grad():
        return _rate(lambda: a @ b, 2 * n**3), _rate(lambda: linear(a, b), 2 * n**3)


def _rate(product: Callable[[], Tensor], operations: int) -> float:
    _seconds(product)  # the first one warms up
    return operations / statistics.median(_seconds(product) for _ in range(_PRODUCTS))


def _seconds(product: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    if product().is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Worker:
    """A process that takes a variant's steps when told to."""

    def __init__(self, name: str, spec: Spec) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")  # nothing inherited: no threads, no memory
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, wish: str) -> Any:
        """The answer to "step", "products" or "memory".

        Raises: ClusterError if the process dies or its step goes wrong (no memory, say).
        """
        try:
            self._pipe.send(wish)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            answer = RuntimeError(f"its process ended with code {self._process.exitcode}")
        if isinstance(answer, RuntimeError):
            raise ClusterError(
                "Benchmark step failed",
                where=self._name,
                found=str(answer).splitlines()[0],
                do="try a smaller --batch-size or --size",
            )
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


@contextlib.contextmanager
def workers(specs: dict[str, Spec]) -> Iterator[dict[str, Worker]]:
    """A process for each variant, ended when the block is left."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Worker] = {}
        for name, spec in specs.items():
            started[name] = Worker(name, spec)
            stack.callback(started[name].close)
        yield started


def _serve(spec: Spec, pipe: Connection) -> None:
    """What the process does until its pipe is closed."""
    is_cpu = spec.device == "cpu"
    if spec.straightforward:
        use_convolutions(False)
    elif is_cpu:
        keep_freed_memory()  # as the engine does
    before = _resident("VmRSS") if is_cpu else 0
    step: TrainingStep | None = None
    peak = 0
    while True:
        try:
            wish = pipe.recv()
        except EOFError:
            return
        try:
            if wish == "step":
                step = step or TrainingStep(spec)
                answer: Any = step.run()
                # Taken after steps only: the products' factors are none of the model's memory.
                peak = max(peak, _peak(is_cpu, before))
            elif wish == "products":
                answer = product_rates(spec)
                if not is_cpu:
                    torch.cuda.reset_peak_memory_stats()
            else:
                answer = peak
        except RuntimeError as error:  # torch's, of which running out of memory is one
            answer = RuntimeError(str(error))
        pipe.send(answer)


def _peak(is_cpu: bool, before: int) -> int:
    """Bytes that this process has needed at most since it began with `before` of them."""
    return _resident("VmHWM") - before if is_cpu else torch.cuda.max_memory_allocated()


def _resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith(field)]
    return int(line.split()[1]) * 1024
