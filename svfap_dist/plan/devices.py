"""Data sheets of the devices that can be planned, and default rates from measurements.

Peak rates of matrix products are in `model.flops`; this table has the memory of a device, its links
to the other GPUs of its node, and the node's network. Link and network rates are for one direction,
in bytes per second, and assumed to be reached in full.
"""

from __future__ import annotations

import dataclasses

from svfap_dist.errors import ConfigError

CPU = "cpu"
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of GPU."""

    cuda_name: str  # as CUDA and `flops.peak_rate` call it
    memory_bytes: float  # of one GPU
    link_rate: float  # to the other GPUs of a node, bytes per second
    network_rate: float  # share of one GPU in its node's network, bytes per second
    source: str  # of these numbers


_SHEET = "NVIDIA's data sheets of the GPU"
_DGX = "NVIDIA's data sheets of the GPU and its DGX"
_PCIE = f"{_SHEET}; network: assumed, 100 Gbit/s"
_FAST, _SLOW, _PLAIN = 50 * _GB, 25 * _GB, 12.5 * _GB  # networks of 400, 200 and 100 Gbit/s

# NVLink: half of the sheets' figure for both directions together; PCIe x16 likewise. The NVL kinds
# have NVLink between pairs or fours only, so that a larger ring goes over PCIe.
_DEVICES = {
    "b200": Device("NVIDIA B200", 180 * _GB, 900 * _GB, _FAST, _DGX),
    "h200": Device("NVIDIA H200", 141 * _GB, 450 * _GB, _FAST, _DGX),
    "h200-nvl": Device("NVIDIA H200 NVL", 141 * _GB, 64 * _GB, _PLAIN, _PCIE),
    "h100": Device("NVIDIA H100 80GB HBM3", 80 * _GB, 450 * _GB, _FAST, _DGX),
    "h100-nvl": Device("NVIDIA H100 NVL", 94 * _GB, 64 * _GB, _PLAIN, _PCIE),
    "h100-pcie": Device("NVIDIA H100 PCIe", 80 * _GB, 64 * _GB, _PLAIN, _PCIE),
    "a100": Device("NVIDIA A100-SXM4-80GB", 80 * _GB, 300 * _GB, _SLOW, _DGX),
    "a100-40gb": Device("NVIDIA A100-SXM4-40GB", 40 * _GB, 300 * _GB, _SLOW, _DGX),
    "a100-pcie": Device("NVIDIA A100 80GB PCIe", 80 * _GB, 32 * _GB, _PLAIN, _PCIE),
    "l40s": Device("NVIDIA L40S", 48 * _GB, 32 * _GB, _PLAIN, _PCIE),
    "l4": Device("NVIDIA L4", 24 * _GB, 32 * _GB, _PLAIN, _PCIE),
    "a10": Device("NVIDIA A10", 24 * _GB, 32 * _GB, _PLAIN, _PCIE),
}
NAMES = (*_DEVICES, CPU)

CPU_NETWORK_RATE = 1.25 * _GB  # between nodes without GPUs: 10 Gbit/s

# Default share of the peak rate that a GPU reaches while it computes. Eager: SVFAP-B with 256 clips
# on an H200 (docs/benchmarks/h200.md). Compiled: sums of the time of matrix products and of memory
# traffic on paper.
MEASURED_MFU = 0.233
MEASURED_WITH = "SVFAP-B, 256 clips and bfloat16 on an H200, docs/benchmarks.md"
ASSUMED_COMPILED_MFU = 0.4

# Launches. A CUDA launch took an H200's host 9 microseconds by torch's profiler, including the
# profiler's own work. torch.compile fuses about three operations into a kernel and runs no Python
# between the kernels of a block; a CUDA graph ("reduce-overhead") is one launch: both assumed.
LAUNCH_SECONDS = 9e-6
OPERATIONS_PER_COMPILED_KERNEL = 3.0
GRAPHS_OF_A_BLOCK = 2.0  # forward and backward pass
# Python around a compiled block, both passes: `svfap bench step --compile default` of base on a
# busy CPU, 25 to 29 ms, less the 22 ms that the same network took when it was compiled as a whole.
COMPILED_BLOCK_SECONDS = 0.2e-3

# Counted and measured by `svfap bench step` on a CPU, at stage 2.
UPDATE_OPERATIONS = 35  # with the vote of all ranks
LOADER_SECONDS = 2.5e-6  # of the training thread, per clip, with feeders

# Clips per CPU-second from shards of the profile `train` to planes in ready batches, from
# docs/benchmarks/loading.md; for plans without data.
MEASURED_DECODE_RATE = 736.0


def find_device(name: str) -> Device:
    """Return the GPU of a name.

    Args:
        name: of the table.

    Raises:
        ConfigError: if it is not in the table.
    """
    if name not in _DEVICES:
        raise ConfigError("Unknown device", "--gpu", name, f"use one of {', '.join(NAMES)}")
    return _DEVICES[name]
