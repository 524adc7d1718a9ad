"""Checks of this machine: versions, cores, files, shared memory, ports, a compiler, GPUs, disks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.metadata
import importlib.util
import mmap
import os
import re
import resource
import shutil
import socket
import sysconfig
import tempfile
from collections.abc import Iterable

from packaging.requirements import Requirement

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.config.sections import ClusterConfig, MetricsConfig, TrainConfig
from svfap_dist.doctor.finding import Finding, catch_errors, fail, ok, warn
from svfap_dist.parallel import cpus
from svfap_dist.video.backends import BACKENDS, DEFAULT, capabilities

_PROJECT = "svfap-dist"
_EVERYTHING = "all"  # the extra that repeats the packages of other extras
_CHECKED_PACKAGES = (
    *("torch", "deepspeed", "ray", "webdataset", "s3fs", "av"),
    *("nvidia-dali-cuda130", "nvidia-ml-py"),
)
_MIN_FILES, _ENOUGH_FILES = 256, 4096
_SHM = "/dev/shm"  # noqa: S108 - NCCL's choice, and Ray's
_ENOUGH_SHM = 1 << 30  # for NCCL between the GPUs of a machine
_RDMA = "/sys/class/infiniband"
_CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")  # packages of torch's wheels
_MAX_PORTS = 16
_NVDEC = "libnvcuvid.so.1"
_CHECKPOINTS, _RUN, _CACHE = "disk for checkpoints", "disk of run.url", "disk of data.cache_dir"


def examine(config: Config | None) -> list[Finding]:
    """Check this machine without its GPUs.

    Args:
        config: the recipe; None: only what every run needs.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    gpu_ranks = config.cluster.num_workers if config and config.cluster.on_gpu else 0
    found = [
        *_check_versions(_requirements()),
        _check_open_files(limit),
        _check_memfd(),
        _check_shared_memory(gpu_ranks > 1),
        _check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], os.path.exists(_RDMA)),
    ]
    if config is None:
        return [*found, ok("CPU cores", f"{_usable_cores():g}")]
    return [
        *found,
        _check_cores(config, _usable_cores()),
        *([] if config.cluster.on_gpu else [_check_load()]),
        *_check_ports(config.metrics, config.cluster),
        _check_compiler(config.train, config.cluster.on_gpu),
        _check_decoding(config),
    ]


def examine_gpus(config: Config | None) -> list[Finding]:
    """Check CUDA, cuDNN, the decoding units and the optional decode backends.

    Args:
        config: the recipe, which may need them; None: none is needed.
    """
    import torch

    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    is_needed = config is not None and config.cluster.on_gpu
    backend = config.decode.backend if config else "auto"
    needs_nvdec = is_needed and capabilities(backend).decodes_on == "device"
    built = torch.version.cuda or ""
    return [
        _check_cuda(devices, built, is_needed, "RAY_ADDRESS" in os.environ),
        _check_cudnn(_loaded_cudnn(), _packaged_cudnn(), bool(devices)),
        _check_nvdec(_can_load(_NVDEC), bool(devices), needs_nvdec),
        *(
            _check_backend(name, row.is_installed, is_needed and name == backend)
            for name, row in BACKENDS.items()
            if row.module  # the others need nothing besides the project's dependencies
        ),
    ]


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires(_PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _check_versions(requirements: Iterable[str]) -> list[Finding]:
    """Compare installed packages with the ranges of pyproject.toml."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.name not in _CHECKED_PACKAGES:
            continue
        name, wanted = f"version of {requirement.name}", str(requirement.specifier)
        advice = f"pip install '{requirement.name}{wanted}'"
        extra = re.search(r"extra == ['\"](\w+)", str(requirement.marker or ""))
        if extra and extra[1] == _EVERYTHING:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if extra is None:
                found.append(fail(name, "not installed", advice))
            elif extra[1] == "gpu":
                found.append(ok(name, "not installed; needed on GPUs only"))
            else:
                advice = f"pip install '{_PROJECT}[{extra[1]}]' for the verbs that need it"
                found.append(warn(name, "not installed", advice))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            found.append(ok(name, version))
        else:
            found.append(fail(name, f"{version}, which is not {wanted}", advice))
    missing = fail("versions", f"{_PROJECT} is not installed", "pip install -e . in its folder")
    return found or [missing]


def _usable_cores() -> float:
    """Return the cores of this process's affinity mask, limited by a container's quota."""
    quota = cpus.cpu_quota()
    return float(cpus.visible_cpus()) if quota is None else min(cpus.visible_cpus(), quota)


def _check_load() -> Finding:
    """Check whether other processes keep the CPUs busy.

    torch's threads synchronize after each operation, so one that waits for a core delays all.
    """
    load, cores = cpus.load_average(), cpus.machine_cpus()
    found = f"load average {load:.1f} over the last minute, {cores} CPUs"
    if not cpus.is_machine_busy():
        return ok("load", found)
    advice = "stop other work, or set train.threads_per_rank=1 and start more ranks "
    return warn("load", found, advice + "(torchrun, or --on ray)")


def _check_cores(config: Config, usable: float) -> Finding:
    """Compare the usable cores with those that a rank of the recipe needs."""
    name, data, cluster = "CPU cores", config.data, config.cluster
    visible = cpus.visible_cpus()
    if usable < visible:
        return warn(
            name,
            f"{visible} are visible, but the container may use {usable:g} of them",
            "lower train.threads_per_rank and data.decode_workers, or raise its limit",
        )
    threads = 1 if cluster.on_gpu else max(config.train.threads_per_rank, 1)
    needed = threads + data.decode_workers + bool(data.feeders)  # feeders wait most of the time
    text = f"{needed} by a rank ({threads} for training, {data.decode_workers} decode workers"
    text += f", 1 for {data.feeders} feeders)" if data.feeders else ")"
    if needed > cluster.cpus_per_worker and data.decode_workers:
        return warn(
            name,
            f"{text}, but cluster.cpus_per_worker = {cluster.cpus_per_worker} are reserved",
            f"set cluster.cpus_per_worker={needed} or lower data.decode_workers",
        )
    if needed > usable:
        advice = "lower data.decode_workers or train.threads_per_rank, or train on a larger machine"
        return warn(name, f"{usable:g}, needed: {text}", advice)
    return ok(name, f"{usable:g}, needed: {text}")


def _check_decoding(config: Config) -> Finding:
    """Check whether a video that hangs or crashes its decoder ends more than its own process."""
    name, workers = "decoding", config.data.decode_workers
    backend = config.decode.backend
    if capabilities(backend).decodes_on == "device":
        return warn(
            name,
            f"on the GPU, in the rank: a video that hangs or crashes {backend} ends the run",
            f"if that happens, set decode.backend={DEFAULT}",
        )
    if not workers:
        return warn(
            name,
            "in the rank's own threads: a video that hangs or crashes the decoder ends the rank",
            "set data.decode_workers to 1 or more",
        )
    return ok(name, f"in {workers} processes beside each rank")


def _check_open_files(limit: int) -> Finding:
    """Check the limit of files and connections, which ranks, workers and Ray open."""
    name, advice = "open files", "raise it: `ulimit -n 65536`, or LimitNOFILE= of the service"
    if 0 <= limit < _MIN_FILES:
        return fail(name, f"a process may open {limit}", advice)
    if 0 <= limit < _ENOUGH_FILES:
        return warn(name, f"a process may open {limit}; large Ray clusters need more", advice)
    return ok(name, "no limit" if limit < 0 else f"a process may open {limit}")


def _check_shared_memory(is_needed: bool, folder: str = _SHM) -> Finding:
    """Check the folder that NCCL uses between GPUs, and Ray for its objects; batches do not."""
    name, little = _SHM, "; batches are not kept there, and Ray's objects are few"
    advice = "start the container with --shm-size=8g: NCCL uses it between the GPUs of a machine"
    try:
        space = shutil.disk_usage(folder)
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        return warn(name, found, advice) if is_needed else ok(name, found + little)
    text = f"{space.free / 2**30:.1f} of {space.total / 2**30:.1f} GiB free"
    if space.free >= _ENOUGH_SHM:
        return ok(name, text)
    return warn(name, text, advice) if is_needed else ok(name, text + little)


def _check_locked_memory(limit: int, has_rdma: bool) -> Finding:
    """Check the limit of memory that a process may lock, as InfiniBand's transfers need it."""
    name = "locked memory"
    if limit < 0:
        return ok(name, "no limit")
    text = f"a process may lock {limit >> 10} KiB"
    if not has_rdma:
        return ok(name, f"{text}; only InfiniBand needs more, and there is none")
    advice = "raise it: `ulimit -l unlimited`, LimitMEMLOCK=infinity of the service, or in a "
    advice += "container --ulimit memlock=-1 or the capability IPC_LOCK"
    return warn(name, f"{text}, and NCCL needs more for InfiniBand", advice)


def _check_memfd() -> Finding:
    name = "shared memory (batches)"
    try:
        descriptor = os.memfd_create("svfap-doctor")
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            with mmap.mmap(descriptor, mmap.PAGESIZE) as memory:
                memory[0] = 1
        finally:
            os.close(descriptor)
    except OSError as error:
        return fail(name, f"memfd_create: {error.strerror}", "allow memfd_create in the sandbox")
    return ok(name, "memfd works")


def _check_ports(metrics: MetricsConfig, cluster: ClusterConfig) -> list[Finding]:
    """Check whether the ports for metrics are free on this machine."""
    if not metrics.enabled:
        return [ok("metrics ports", "metrics.enabled = false")]
    wanted: list[tuple[str, int]] = []
    if metrics.port:
        ranks = min(cluster.num_workers, _MAX_PORTS)
        wanted += [("metrics.port", metrics.port + rank) for rank in range(ranks)]
    if metrics.discovery_port:
        wanted.append(("metrics.discovery_port", metrics.discovery_port))
    if not wanted:
        return [ok("metrics ports", f"any free ones of {metrics.host}")]
    return [_check_port(key, metrics.host, port) for key, port in wanted]


def _check_port(key: str, host: str, port: int) -> Finding:
    name = f"port {port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return fail(name, f"in use on {host}", f"choose another {key}, or 0 for any free one")
        advice = "set metrics.host to an address of this machine, or a port above 1023"
        return fail(name, f"{host}: {error.strerror or error}", advice)
    return ok(name, f"free on {host}")


def _check_compiler(train: TrainConfig, use_gpu: bool) -> Finding:
    """Check what train.compile needs, and on a GPU the kernel that makes patches from planes."""
    name = "compiler"
    if use_gpu:
        return _check_triton(train.compile)
    if not train.compile:
        return ok(name, "not needed: train.compile = false")
    command = os.environ.get("CXX", "g++")
    path = shutil.which(command)
    if path:
        return ok(name, path)
    return fail(name, f"no {command}", "install g++ (or set CXX), or set train.compile=false")


def _check_triton(is_needed: bool) -> Finding:
    """Check Triton, and the C compiler and headers with which it builds what starts its kernels."""
    name = "compiler"
    commands = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    compilers = [path for path in map(shutil.which, commands) if path]
    headers = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if importlib.util.find_spec("triton") is None:
        found, advice = "no Triton", "install a torch with CUDA"
    elif not compilers:
        found = f"Triton finds no {' or '.join(commands)}"
        advice = "install gcc (apt-get install gcc), or set CC"
    elif not os.path.exists(headers):
        found, advice = f"Triton needs {headers}", "install Python's headers (python3-dev)"
    else:
        return ok(name, f"Triton, {compilers[0]}")
    if is_needed:
        return fail(name, f"{found}: train.compile fails", f"{advice}, or set train.compile=false")
    return warn(name, f"{found}: patches are made by many small operations, slowly", advice)


def _check_cudnn(loaded: int | None, packaged: str, has_gpu: bool) -> Finding:
    """Compare the cuDNN that is loaded, as torch writes its version, with that of torch's wheel."""
    name = "cuDNN"
    if not has_gpu:
        return ok(name, "not needed without a GPU")
    if loaded is None:
        advice = "install a torch with CUDA, and its package nvidia-cudnn"
        return warn(name, "torch finds none: attention uses slower kernels", advice)
    version = f"{loaded // 10000}.{loaded // 100 % 100}.{loaded % 100}"
    if packaged and packaged.split(".")[:3] != version.split("."):
        found = f"{version} is loaded, but {packaged} is installed for torch"
        advice = "remove the folder of another cuDNN from LD_LIBRARY_PATH"
        return warn(name, found, advice)
    return ok(name, version)


def _loaded_cudnn() -> int | None:
    import torch

    try:
        return torch.backends.cudnn.version()
    except RuntimeError:  # a version that torch refuses; CUDA's check has the message
        return None


def _packaged_cudnn() -> str:
    """Return the version of the package, "" if torch brings its own."""
    for package in _CUDNN:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return ""


def _check_cuda(devices: list[str], built: str, is_needed: bool, is_elsewhere: bool) -> Finding:
    """Check CUDA as torch, `built` for this version, sees it; `is_elsewhere`: on a Ray cluster."""
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


def _check_nvdec(is_there: bool, has_gpu: bool, is_needed: bool) -> Finding:
    """Check the driver's library for the decoding units."""
    name = "NVDEC"
    if is_there:
        return ok(name, _NVDEC)
    if is_needed or has_gpu:
        advice = "start containers with NVIDIA_DRIVER_CAPABILITIES=compute,video,utility"
        status = fail if is_needed else warn
        return status(name, f"no {_NVDEC}: videos cannot be decoded on the GPU", advice)
    return ok(name, "none; not needed")


def _check_backend(name: str, is_installed: bool, is_needed: bool) -> Finding:
    """Check an optional decode backend."""
    title = f"decoder {name}"
    if is_installed:
        return ok(title, "installed")
    if is_needed:
        advice = f"{BACKENDS[name].install}, or set decode.backend={DEFAULT}"
        return fail(title, "not installed", advice)
    return ok(title, "not installed; not needed")


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def examine_disks(config: Config) -> list[Finding]:
    """Check the folder that checkpoints are staged in, a local run's, and the cache's.

    Args:
        config: the recipe.
    """
    import torch

    from svfap_dist.model import autoencoder
    from svfap_dist.profiling.memory import checkpoint_bytes
    from svfap_dist.train.objective import build_arguments

    with torch.device("meta"):
        model = autoencoder.build(**build_arguments(config))
    size = checkpoint_bytes(model, config.train)
    staging = tempfile.gettempdir()
    found = [catch_errors(_CHECKPOINTS, lambda: _check_staging(_free(staging), size, staging))]
    if config.run.url and not storage.is_remote(config.run.url):
        path = storage.local_path(config.run.url)
        kept = (config.train.keep_last + 1) * size
        found.append(catch_errors(_RUN, lambda: _check_run(_free(path), kept, path)))
    if config.data.cache_dir:
        cache = storage.local_path(config.data.cache_dir)
        limit = config.data.cache_bytes
        found.append(catch_errors(_CACHE, lambda: _check_cache(_free(cache), limit, cache)))
    return found


def _free(path: str) -> int:
    """Return the free bytes where a folder is, or will be."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _check_staging(free: int, checkpoint: int, folder: str) -> Finding:
    """Check the room for all ranks' files on this machine; two checkpoints overlap for a moment."""
    text = f"{_gib(free)} free in {folder}, a checkpoint of all ranks takes {_gib(checkpoint)}"
    if free >= 2 * checkpoint:
        return ok(_CHECKPOINTS, text)
    status = fail if free < checkpoint else warn
    return status(_CHECKPOINTS, text, "free space, or set TMPDIR to a larger disk")


def _check_run(free: int, kept: int, folder: str) -> Finding:
    text = f"{_gib(free)} free for {folder}, the checkpoints that are kept take {_gib(kept)}"
    if free < kept:
        return fail(_RUN, text, "free space, or lower train.keep_last")
    return ok(_RUN, text)


def _check_cache(free: int, limit: int, folder: str) -> Finding:
    text = f"{_gib(free)} free for {folder}, data.cache_bytes allows {_gib(limit)}"
    if free < limit:
        return warn(_CACHE, text, "lower data.cache_bytes; existing copies already count")
    return ok(_CACHE, text)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
