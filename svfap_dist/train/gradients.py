"""Reduce gradients of all ranks by the bucket, while the backward pass is running.

In: parameters, and which part of them, laid end to end, this rank updates. Out: the gradient of
that part, float32 and flat, so that its norm, clipping and update take a few operations whatever
the number of parameters.

A bucket holds parameters whose gradients are ready one after the other, which is observed in the
first backward pass. Only the last one of each has a hook: Python runs once per bucket. There all
gradients of the bucket are laid end to end and freed, and their reduction over the ranks starts.
DeepSpeed's own hooks run once per parameter, which costs a host more time than the rest of the
backward pass.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from svfap_dist import distributed
from svfap_dist.telemetry.meter import Phases

REDUCE_BUCKET = 12_500_000  # parameters whose gradients are reduced together
BUCKETS_IN_FLIGHT = 2  # buckets that wait for their reduction
_ROW = 4096  # numbers whose squares are added in float32


@dataclasses.dataclass(frozen=True)
class FlatGroup:
    """Trained parameters of an optimizer group, end to end, of which a rank keeps an interval."""

    parameters: Sequence[nn.Parameter]
    begin: int  # first number of the interval
    end: int


@dataclasses.dataclass(frozen=True)
class _Run:
    """Numbers that follow each other both in a bucket and in the kept gradient."""

    source: int  # first of them in the bucket
    target: int  # first of them in the kept gradient
    length: int


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter is: its group, and its first number there."""

    group: int
    offset: int


class GradientReducer:
    """Gradients of one step, from the parameters' `grad` to the flat gradient that a rank keeps.

    Args:
        groups: All parameters; the kept intervals are concatenated in this order.
        every_micro_batch: Whether each micro batch is reduced, so that no rank ever holds all
            gradients (ZeRO-2); otherwise only the sum of a step is.
        phases: Count the time of waiting for other ranks, inside "backward"; None: nothing does.
    """

    def __init__(
        self, groups: Sequence[FlatGroup], every_micro_batch: bool, phases: Phases | None = None
    ) -> None:
        self._groups, self._every_micro_batch, self._phases = groups, every_micro_batch, phases
        self._places: dict[nn.Parameter, _Place] = {}
        for number, group in enumerate(groups):
            offset = 0
            for parameter in group.parameters:
                self._places[parameter] = _Place(number, offset)
                offset += parameter.numel()
        self.sizes = [group.end - group.begin for group in groups]
        self._buckets: list[list[nn.Parameter]] = []
        self._runs: list[list[_Run]] = []
        self._order: list[nn.Parameter] = []  # of the first backward pass
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._order.append)
            for parameter in self._places
        ]
        self._kept: Tensor | None = None
        self._held: dict[int, Tensor] = {}  # sums of micro batches that are not reduced yet
        self._reducing: collections.deque[tuple[int, Tensor, Any]] = collections.deque()
        self._is_first = self._is_last = True
        self._next = 0  # first bucket whose gradients are still with the parameters

    def begin(self, is_first: bool, is_last: bool) -> None:
        """Prepare for the backward pass of a micro batch.

        Args:
            is_first: Whether it is the first one of its step.
            is_last: Whether it is the last one.
        """
        self._is_first, self._is_last, self._next = is_first, is_last, 0
        if is_first:
            self._held.clear()
            rows = -(-sum(self.sizes) // _ROW)
            device = next(iter(self._places)).device
            self._kept = torch.zeros(rows * _ROW, dtype=torch.float32, device=device)

    def finish(self) -> None:
        """Complete the buckets of a backward pass that has ended."""
        if not self._buckets:
            self._make_buckets()
        while self._next < len(self._buckets):
            self._start(self._next)
        while self._reducing:
            self._keep(*self._reducing.popleft())

    def take(self) -> tuple[list[Tensor], Tensor]:
        """Return the gradient of the kept interval of each group, and the sum of all squares."""
        kept, self._kept = self._kept, None
        assert kept is not None
        # A sum of all squares in float32 would be wrong by 0.1 % on a CPU.
        norms = torch.linalg.vector_norm(kept.view(-1, _ROW), dim=1)
        squares = norms.double().square_().sum()
        return list(kept[: sum(self.sizes)].split(self.sizes)), squares

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _make_buckets(self) -> None:
        """Divide the parameters into buckets, in the order of rank 0's first backward pass."""
        self.close()
        numbers = {parameter: number for number, parameter in enumerate(self._places)}
        order = distributed.broadcast_object([numbers[parameter] for parameter in self._order])
        self._order.clear()
        every, size = list(self._places), 0
        for number in dict.fromkeys([*order, *range(len(every))]):
            if not self._buckets or size + every[number].numel() > REDUCE_BUCKET:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(every[number])
            size += every[number].numel()
        for number, bucket in enumerate(self._buckets):
            last = bucket[-1]
            bucket.sort(key=lambda parameter: numbers[parameter])
            self._runs.append(self._kept_runs(bucket))

            def ready(_: Tensor, number: int = number) -> None:
                self._advance(number)

            self._hooks.append(last.register_post_accumulate_grad_hook(ready))

    def _kept_runs(self, bucket: list[nn.Parameter]) -> list[_Run]:
        """Return where the kept numbers of a bucket go."""
        runs: list[_Run] = []
        source = 0
        for parameter in bucket:
            place, count = self._places[parameter], parameter.numel()
            group = self._groups[place.group]
            first = max(place.offset, group.begin)
            length = min(place.offset + count, group.end) - first
            if length > 0:
                start = source + first - place.offset
                target = sum(self.sizes[: place.group]) + first - group.begin
                before = runs[-1] if runs else _Run(-1, -1, 0)
                end = before.source + before.length, before.target + before.length
                if end == (start, target):
                    runs[-1] = dataclasses.replace(before, length=before.length + length)
                else:
                    runs.append(_Run(start, target, length))
            source += count
        return runs

    def _advance(self, number: int) -> None:
        """Start the reduction of a bucket and those before it, as soon as all are complete.

        All ranks reduce the buckets in the same order. One that misses gradients, since they came
        in another order than observed, has to wait for the end of the backward pass.
        """
        if number == self._next and all(p.grad is not None for p in self._buckets[number]):
            self._start(number)

    @torch.no_grad()
    def _start(self, number: int) -> None:
        """Take the gradients of the next bucket, and start their reduction if it is time."""
        self._next = number + 1
        bucket = self._buckets[number]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat: Tensor = _flatten_dense_tensors(gradients)
        for parameter in bucket:
            parameter.grad = None
        if not self._every_micro_batch and not (self._is_first and self._is_last):
            if not self._is_first:
                flat = self._held.pop(number).add_(flat)
            if not self._is_last:
                # A bucket of one is that gradient itself, which a CUDA graph writes again.
                self._held[number] = flat.to(torch.float32, copy=len(bucket) == 1)
                return
            flat = flat.to(bucket[0].dtype)
        work = dist.all_reduce(flat, async_op=True) if dist.get_world_size() > 1 else None
        self._reducing.append((number, flat, work))
        while len(self._reducing) > BUCKETS_IN_FLIGHT:
            self._keep(*self._reducing.popleft())

    @torch.no_grad()
    def _keep(self, number: int, flat: Tensor, work: Any) -> None:
        """Wait for the reduction of a bucket, in the device's queue, and keep this rank's part."""
        if work is not None and self._phases is not None:
            with self._phases.measured("exchange", inside="backward"):
                work.wait()
        elif work is not None:
            work.wait()
        assert self._kept is not None
        for run in self._runs[number]:
            kept = self._kept[run.target : run.target + run.length]
            part = flat[run.source : run.source + run.length]
            if self._every_micro_batch and not self._is_first:
                kept.add_(part)
            else:
                kept.copy_(part)
