"""What this rank's GPU says of itself; nothing where there is none."""

from __future__ import annotations

import contextlib

import torch

from svfap_dist.telemetry import metrics


def readings() -> dict[metrics.Metric, float]:
    """Memory in bytes and, where NVML can be asked, utilization from 0 to 1."""
    if not torch.cuda.is_available():
        return {}
    found: dict[metrics.Metric, float] = {metrics.GPU_MEMORY: torch.cuda.memory_reserved()}
    # Without nvidia-ml-py, or where NVML does not answer, the memory is all there is to tell.
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):
        found[metrics.GPU_UTILIZATION] = torch.cuda.utilization() / 100
    return found
