"""Checks of GPUs: CUDA as torch sees it, the video decoding units, decode backends."""

from __future__ import annotations

import ctypes
import os

from svfap_dist.config import Config
from svfap_dist.doctor.finding import Finding, fail, ok, warn
from svfap_dist.video.backends import BACKENDS, DEFAULT, capabilities

_NVDEC = "libnvcuvid.so.1"


def examine(config: Config | None) -> list[Finding]:
    """Return findings on CUDA, NVDEC and optional decode backends, needed by the recipe or not."""
    import torch

    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    built = torch.version.cuda or ""
    is_needed = config is not None and config.cluster.use_gpu
    backend = config.decode.backend if config else "auto"
    wants_units = is_needed and capabilities(backend).decodes_on == "device"
    found = [cuda(devices, built, is_needed, "RAY_ADDRESS" in os.environ)]
    found.append(nvdec(_loads(_NVDEC), bool(devices), wants_units))
    for name, row in BACKENDS.items():
        if row.module:  # the others need nothing besides the project's dependencies
            found.append(decode_backend(name, row.is_installed, is_needed and name == backend))
    return found


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


def decode_backend(name: str, is_installed: bool, is_needed: bool) -> Finding:
    """Check an optional decode backend.

    Args:
        name: its row in `BACKENDS`.
        is_installed: whether it is.
        is_needed: whether the recipe names it.
    """
    title = f"decoder {name}"
    if is_installed:
        return ok(title, "installed")
    if is_needed:
        return fail(
            title, "not installed", f"{BACKENDS[name].install}, or set decode.backend={DEFAULT}"
        )
    return ok(title, "not installed; not needed")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
