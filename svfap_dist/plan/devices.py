"""What data sheets say of the devices that a plan may name, and what was measured elsewhere.

Peak rates of products are in `metrics.flops`; here is what else bounds a run: memory of a device,
its links to the others of its node, the node's network. Links and networks are told for one
direction, in bytes per second, as if they were reached in full.
"""

from __future__ import annotations

import dataclasses

from svfap_dist.errors import ConfigError

CPU = "cpu"
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of GPU.

    cuda_name: as CUDA and `flops.peak_rate` call it. memory_bytes: of one. link_rate: to the other
    GPUs of a node. network_rate: share of one GPU of its node's network.
    """

    cuda_name: str
    memory_bytes: float
    link_rate: float
    network_rate: float
    source: str


_SHEET = "NVIDIA's data sheets of the GPU"
_DGX = "NVIDIA's data sheets of the GPU and its DGX"
_PCIE = f"{_SHEET}; network: assumed, 100 Gbit/s"
_FAST, _SLOW, _PLAIN = 50 * _GB, 25 * _GB, 12.5 * _GB  # networks of 400, 200 and 100 Gbit/s

# NVLink: half of what the sheets add up over both directions; PCIe x16 likewise. The NVL kinds
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

# Where nothing is said of the network between nodes of CPUs.
CPU_NETWORK_RATE = 1.25 * _GB  # 10 Gbit/s

# Share of the peak rate that training steps reach, unless told or measured: no GPU stood at hand.
ASSUMED_MFU = 0.3

# Clips per CPU-second from shards of the profile `train` to planes in ready batches, as
# docs/benchmarks.md has it ("From shards to ready batches"); for plans without data.
MEASURED_DECODE_RATE = 736.0


def device(name: str) -> Device:
    """The GPU of a name.

    Raises: ConfigError if there is none in the table.
    """
    if name not in _DEVICES:
        raise ConfigError(
            "Nothing is known of this device",
            where="--gpu",
            found=name,
            do=f"use one of {', '.join(NAMES)}",
        )
    return _DEVICES[name]
