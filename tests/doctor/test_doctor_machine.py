"""Checks of a machine, with each failure provoked."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from svfap_dist.config import recipe
from svfap_dist.doctor import machine
from svfap_dist.doctor.finding import Finding


def _config(*overrides: str):
    return recipe.load("tiny_cpu", overrides)


def _ports(*overrides: str) -> list[Finding]:
    config = _config(*overrides)
    return machine._check_ports(config.metrics, config.cluster)


def _compiler(*overrides: str) -> Finding:
    config = _config(*overrides)
    return machine._check_compiler(config.train, config.cluster.use_gpu)


def _only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_installed_versions_fit_the_project() -> None:
    findings = machine._check_versions(machine._requirements())
    names = [finding.name for finding in findings]
    assert set(names) >= {"version of torch", "version of ray"}
    assert len(names) == len(set(names))
    assert {finding.status for finding in findings} == {"ok"}


@pytest.mark.parametrize(
    ("requirement", "status", "words"),
    [
        ("torch>=1", "ok", ""),
        ("torch<1", "fail", "not <1"),
        ("webdataset>=99; extra == 'gpu'", "fail", "not >=99"),
        ("not-a-checked-package>=1", None, ""),
    ],
)
def test_versions_out_of_range(requirement: str, status: str | None, words: str) -> None:
    finding = _only(machine._check_versions([requirement]))
    if status is None:  # an unchecked package: the project seems missing
        assert finding.status == "fail"
        assert "pip install" in finding.do
        return
    assert finding.status == status
    assert words in finding.found
    assert ("pip install" in finding.do) == (status == "fail")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CHECKED_PACKAGES", ("no-such-package",))
    assert _only(machine._check_versions(["no-such-package>=1"])).status == "fail"
    assert _only(machine._check_versions(["no-such-package>=1; extra == 'gpu'"])).status == "ok"
    missing = _only(machine._check_versions(["no-such-package>=1; extra == 'train'"]))
    assert missing.status == "warn"
    assert "[train]" in missing.do


def test_a_package_of_several_extras_is_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel's metadata list the packages of `all` beside those of the extras that it names."""
    monkeypatch.setattr(machine, "_CHECKED_PACKAGES", ("no-such-package",))
    rows = [f"no-such-package>=1; extra == '{extra}'" for extra in ("all", "ray")]
    assert "[ray]" in _only(machine._check_versions(rows)).do


def test_open_files() -> None:
    statuses = [machine._check_open_files(limit).status for limit in (100, 1024, 65536, -1)]
    assert statuses == ["fail", "warn", "ok", "ok"]


def test_shared_memory_matters_to_several_gpus_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are in anonymous memory, so a container's 64 MB are enough without NCCL."""
    missing = str(tmp_path / "no-shm")
    assert machine._check_shared_memory(True, missing).status == "warn"
    assert machine._check_shared_memory(False, missing).status == "ok"
    assert machine._check_shared_memory(True, str(tmp_path)).status == "ok"
    monkeypatch.setattr(machine, "_ENOUGH_SHM", 1 << 60)
    assert "--shm-size" in machine._check_shared_memory(True, str(tmp_path)).do
    small = machine._check_shared_memory(False, str(tmp_path))
    assert (small.status, small.do) == ("ok", "")
    assert "batches are not kept there" in small.found


def test_batches_need_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._check_memfd().status == "ok"

    def refused(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(machine.os, "memfd_create", refused)
    assert machine._check_memfd().status == "fail"


def test_locked_memory_matters_to_infiniband_only() -> None:
    assert machine._check_locked_memory(-1, True).status == "ok"
    assert machine._check_locked_memory(8 << 20, False).status == "ok"
    finding = machine._check_locked_memory(8 << 20, True)
    assert finding.status == "warn"
    assert "8192 KiB" in finding.found
    assert "IPC_LOCK" in finding.do


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = _only(_ports(f"metrics.port={port}", "cluster.num_workers=1"))
        assert finding.status == "fail"
        assert str(port) in finding.name
        assert "metrics.port" in finding.do
        findings = _ports(f"metrics.discovery_port={port}")
        assert "metrics.discovery_port" in _only(findings).do
    both = _ports(f"metrics.port={port}", "cluster.num_workers=1")
    assert _only(both).status == "ok"
    elsewhere = _ports("metrics.host='192.0.2.1'", "metrics.discovery_port=9390")
    assert _only(elsewhere).status == "fail"
    assert _only(_ports("metrics.enabled=false")).status == "ok"


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    many = "cluster.cpus_per_worker=64"
    assert machine._check_cores(_config(), 512).status == "ok"
    assert "reserved" in machine._check_cores(_config("data.decode_workers=3"), 512).found
    of_feeders = _config("data.decode_workers=3", "data.feeders=2", "cluster.cpus_per_worker=4")
    assert "1 for 2 feeders), but" in machine._check_cores(of_feeders, 512).found
    workers = ("data.decode_workers=40", many)
    visible = len(machine.os.sched_getaffinity(0))
    assert machine._check_cores(_config(*workers), visible).status == "warn"
    monkeypatch.setattr(machine.cpus, "cpu_quota", lambda: 0.5)
    assert machine._usable_cores() == 0.5
    assert "container" in machine._check_cores(_config(), machine._usable_cores()).found
    monkeypatch.setattr(machine.cpus, "cpu_quota", lambda: None)
    assert machine._usable_cores() == visible


def test_load_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.cpus, "machine_cpus", lambda: 4)
    monkeypatch.setattr(machine.cpus, "usable_cpus", lambda: 4)
    monkeypatch.setattr(machine.cpus, "load_average", lambda: 1.5)
    assert machine._check_load().status == "ok"
    monkeypatch.setattr(machine.cpus, "load_average", lambda: 3.2)
    assert machine._check_load().found == "load average 3.2 over the last minute, 4 CPUs"
    assert "train.threads_per_rank=1" in machine._check_load().do


def test_decoders() -> None:
    assert machine._check_decoding(_config("data.decode_workers=2")).status == "ok"
    assert "threads" in machine._check_decoding(_config("data.decode_workers=0")).found
    alone = machine._check_decoding(_config("data.decode_workers=2", "decode.backend=dali"))
    assert alone.status == "warn"
    assert "ends the run" in alone.found


def test_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _compiler().status == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = _compiler("train.compile=true")
    assert finding.status == "fail"
    assert "no-such-compiler" in finding.found
    monkeypatch.setenv("CXX", "sh")
    assert _compiler("train.compile=true").status == "ok"


@pytest.mark.parametrize(
    ("triton", "command", "headers", "words"),
    [
        (False, "sh", True, "no Triton"),
        (True, "no-such-compiler", True, "no no-such-compiler"),
        (True, "sh", False, "Python.h"),
        (True, "sh", True, ""),
    ],
)
def test_triton_needs_a_c_compiler_and_headers(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    triton: bool,
    command: str,
    headers: bool,
    words: str,
) -> None:
    """Triton alone is not enough: it compiles a little C at the first launch of each kernel."""
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _: object() if triton else None)
    monkeypatch.setenv("CC", command)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    if headers:
        (tmp_path / "Python.h").touch()
    eager, compiled = (
        _compiler("cluster.use_gpu=true", f"train.compile={flag}") for flag in ("false", "true")
    )
    if not words:
        assert (eager.status, compiled.status) == ("ok", "ok")
        return
    assert (eager.status, compiled.status) == ("warn", "fail")
    assert words in eager.found
    assert words in compiled.found
    assert "train.compile=false" in compiled.do
    assert "install" in eager.do


def test_cudnn_is_that_of_torch() -> None:
    assert machine._check_cudnn(None, "", False).status == "ok"
    assert "nvidia-cudnn" in machine._check_cudnn(None, "9.15.0.57", True).do
    assert machine._check_cudnn(91500, "9.15.0.57", True).status == "ok"
    assert machine._check_cudnn(91500, "", True).found == "9.15.0"
    other = machine._check_cudnn(90100, "9.15.0.57", True)
    assert other.status == "warn"
    assert "9.1.0 is loaded" in other.found
    assert "LD_LIBRARY_PATH" in other.do


def test_gpus() -> None:
    assert machine._check_cuda(["A", "B", "A"], "13.0", True, False).found.startswith(
        "2 x A, 1 x B"
    )
    assert machine._check_cuda([], "", False, False).status == "ok"
    assert machine._check_cuda([], "", True, False).status == "fail"
    assert machine._check_cuda([], "", True, True).status == "warn"
    statuses = [
        machine._check_nvdec(False, *rest).status for rest in ((False, False), (True, False))
    ]
    assert [*statuses, machine._check_nvdec(False, True, True).status] == ["ok", "warn", "fail"]
    assert machine._check_backend("dali", False, True).status == "fail"
    assert machine._check_backend("dali", False, False).status == "ok"


def test_disks(tmp_path: Path) -> None:
    statuses = [machine._check_staging(free, 100, "/x").status for free in (99, 100, 200)]
    assert statuses == ["fail", "warn", "ok"]
    assert [machine._check_run(free, 100, "/x").status for free in (99, 100)] == ["fail", "ok"]
    assert [machine._check_cache(free, 100, "/x").status for free in (99, 100)] == ["warn", "ok"]
    deep = f"run.url={tmp_path}/not/there/yet"
    findings = machine.examine_disks(
        _config("model.size=nano", deep, f"data.cache_dir={tmp_path}/c")
    )
    assert [finding.name for finding in findings] == [
        "disk for checkpoints",
        "disk of run.url",
        "disk of data.cache_dir",
    ]
    assert list(tmp_path.iterdir()) == []
