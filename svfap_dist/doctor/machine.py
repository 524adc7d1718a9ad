"""What this machine has: versions, cores, files, memory to share, ports, a compiler."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import mmap
import os
import re
import resource
import shutil
import socket
from collections.abc import Iterable

from packaging.requirements import Requirement

from svfap_dist.config import Config
from svfap_dist.doctor.finding import Finding, fail, ok, warn
from svfap_dist.video.backends import DEFAULT, capabilities

_PROJECT = "svfap-dist"
_WATCHED = ("torch", "deepspeed", "ray", "webdataset", "nvidia-dali-cuda130", "s3fs", "av")
_FEW_FILES, _ENOUGH_FILES = 256, 4096
_CGROUP_CPUS = "/sys/fs/cgroup/cpu.max"
_SHM = "/dev/shm"  # noqa: S108 - Ray's choice
_LITTLE_SHM = 2 << 30
_MOST_PORTS = 16


def examine(config: Config | None) -> list[Finding]:
    """All that is found on this machine itself; without a recipe, what every run needs."""
    found = [*versions(_requirements()), open_files(_file_limit()), *shared_memory()]
    if config is None:
        return [*found, ok("CPU cores", f"{usable_cores():g}")]
    return [
        *found,
        cores(config, usable_cores()),
        *ports(config),
        compiler(config),
        decoders(config),
    ]


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires(_PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def versions(requirements: Iterable[str]) -> list[Finding]:
    """What is installed of the packages that matter, against the ranges of pyproject.toml."""
    found = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name not in _WATCHED:
            continue
        name, wanted = f"version of {requirement.name}", str(requirement.specifier)
        extra = re.search(r"extra == ['\"](\w+)", str(requirement.marker or ""))
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            advice = f"pip install -c constraints.txt '{requirement.name}{wanted}'"
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
            advice = f"pip install -c constraints.txt '{requirement.name}{wanted}'"
            found.append(fail(name, f"{version}, which is not {wanted}", advice))
    if not found:
        found.append(
            fail("versions", f"{_PROJECT} is not installed", "pip install -e . in its folder")
        )
    return found


def usable_cores() -> float:
    """Cores that this process may use: those it may run on, and no more than a container's
    share."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        with open(_CGROUP_CPUS) as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def cores(config: Config, usable: float) -> Finding:
    """Whether the recipe's ranks on this machine find the cores that they count on."""
    name, data, cluster = "CPU cores", config.data, config.cluster
    visible = len(os.sched_getaffinity(0))
    if usable < visible:
        return warn(
            name,
            f"{visible} are seen, but the container may use {usable:g} of them",
            "set train.threads_per_rank and data.decode_workers to what it may use, or raise its "
            "limit",
        )
    threads = 1 if cluster.use_gpu else max(config.train.threads_per_rank, 1)
    needed = threads + data.decode_workers
    text = f"{needed} by a rank ({threads} for training, {data.decode_workers} decode workers)"
    if needed > cluster.cpus_per_worker and data.decode_workers:
        return warn(
            name,
            f"{text}, but cluster.cpus_per_worker = {cluster.cpus_per_worker} are reserved",
            f"set cluster.cpus_per_worker={needed} or lower data.decode_workers",
        )
    if needed > usable:
        advice = "lower data.decode_workers or train.threads_per_rank, or train on a larger machine"
        return warn(name, f"{usable:g}, wanted: {text}", advice)
    return ok(name, f"{usable:g}, wanted: {text}")


def decoders(config: Config) -> Finding:
    """Whether a video that hangs or crashes its decoder costs more than itself."""
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
            "in the rank's own threads: a video that hangs or crashes the decoder takes it along",
            "set data.decode_workers to 1 or more",
        )
    return ok(name, f"in {workers} processes beside each rank")


def _file_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def open_files(limit: int) -> Finding:
    """Whether a process may open the files and connections that ranks, workers and Ray need."""
    name, advice = "open files", "raise it: `ulimit -n 65536`, or LimitNOFILE= of the service"
    if 0 <= limit < _FEW_FILES:
        return fail(name, f"a process may open {limit}", advice)
    if 0 <= limit < _ENOUGH_FILES:
        return warn(name, f"a process may open {limit}; large Ray clusters need more", advice)
    return ok(name, "no limit" if limit < 0 else f"a process may open {limit}")


def shared_memory(folder: str = _SHM) -> list[Finding]:
    """Ray's place for objects, and the anonymous memory that our batches lie in."""
    name = f"{folder} (Ray)"
    try:
        space = shutil.disk_usage(folder)
    except OSError as error:
        place = warn(name, error.strerror or "", "mount a tmpfs there; Ray falls back to the disk")
    else:
        text = f"{space.free / 2**30:.1f} of {space.total / 2**30:.1f} GiB free"
        advice = "start the container with --shm-size=8g; Ray otherwise keeps objects on the disk"
        place = ok(name, text) if space.free >= _LITTLE_SHM else warn(name, text, advice)
    return [place, _memfd()]


def _memfd() -> Finding:
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


def ports(config: Config) -> list[Finding]:
    """Whether the ports that the recipe names for metrics are free here."""
    metrics = config.metrics
    if not metrics.enabled:
        return [ok("metrics ports", "metrics.enabled = false")]
    wanted: list[tuple[str, int]] = []
    if metrics.port:
        ranks = min(config.cluster.num_workers, _MOST_PORTS)
        wanted += [("metrics.port", metrics.port + rank) for rank in range(ranks)]
    if metrics.discovery_port:
        wanted.append(("metrics.discovery_port", metrics.discovery_port))
    if not wanted:
        return [ok("metrics ports", f"any free ones of {metrics.host}")]
    return [_port(key, metrics.host, port) for key, port in wanted]


def _port(key: str, host: str, port: int) -> Finding:
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


def compiler(config: Config) -> Finding:
    """What train.compile needs."""
    name = "compiler"
    if not config.train.compile:
        return ok(name, "not needed: train.compile = false")
    if config.cluster.use_gpu:
        if importlib.util.find_spec("triton"):
            return ok(name, "Triton")
        return fail(name, "no Triton", "install a torch with CUDA, or set train.compile=false")
    command = os.environ.get("CXX", "g++")
    path = shutil.which(command)
    if path:
        return ok(name, path)
    return fail(name, f"no {command}", "install g++ (or set CXX), or set train.compile=false")
