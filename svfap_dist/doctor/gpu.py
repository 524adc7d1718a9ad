"""What there is of GPUs: CUDA as torch sees it, the video decoding units, DALI."""

from __future__ import annotations

import ctypes
import importlib.util
import os

from svfap_dist.config import Config
from svfap_dist.doctor.finding import Finding, fail, ok, warn

_NVDEC = "libnvcuvid.so.1"


def examine(config: Config | None) -> list[Finding]:
    """CUDA, NVDEC and DALI, and whether the recipe needs them."""
    import torch

    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    built = torch.version.cuda or ""
    is_needed = config is not None and config.cluster.use_gpu
    wants_dali = is_needed and config is not None and config.decode.backend == "dali"
    found = [cuda(devices, built, is_needed, "RAY_ADDRESS" in os.environ)]
    dali = importlib.util.find_spec("nvidia") is not None and bool(
        importlib.util.find_spec("nvidia.dali")
    )
    return [*found, nvdec(_loads(_NVDEC), bool(devices), wants_dali), dali_found(dali, wants_dali)]


def cuda(devices: list[str], built: str, is_needed: bool, is_elsewhere: bool) -> Finding:
    """devices: names of those that torch sees. built: CUDA version of torch. is_elsewhere: the
    ranks run on a cluster that this machine may not be of."""
    name = "CUDA"
    if devices:
        kinds = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
        return ok(name, f"{kinds}; torch built for CUDA {built}")
    text = f"torch sees no device{'' if built else ', and is built without CUDA'}"
    if not is_needed:
        return ok(name, f"{text}; not needed")
    if is_elsewhere:
        advice = "run `svfap doctor` on a node that trains, too"
        return warn(name, f"{text} on this machine; RAY_ADDRESS names a cluster", advice)
    advice = "check `nvidia-smi` and that torch is built for CUDA, or set cluster.use_gpu=false"
    return fail(name, text, advice)


def nvdec(is_there: bool, has_gpu: bool, is_needed: bool) -> Finding:
    """The driver's library for the decoding units."""
    name = "NVDEC"
    if is_there:
        return ok(name, _NVDEC)
    if is_needed or has_gpu:
        advice = "start containers with NVIDIA_DRIVER_CAPABILITIES=compute,video,utility"
        status = fail if is_needed else warn
        return status(name, f"no {_NVDEC}: videos cannot be decoded on the GPU", advice)
    return ok(name, "none; not needed")


def dali_found(is_there: bool, is_needed: bool) -> Finding:
    """The package that decodes on GPUs."""
    name = "DALI"
    if is_there:
        return ok(name, "installed")
    if is_needed:
        return fail(name, "not installed", "pip install -e '.[gpu]', or set decode.backend=pyav")
    return ok(name, "not installed; not needed")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
