"""CPUs that a process may use, with and without a quota of its control group."""

from __future__ import annotations

from pathlib import Path

import pytest

from svfap_dist.parallel import cpus


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a\n", {"a/cpu.max": "400000 100000\n", "cpu.max": "100000 100000\n"}, 1.0),
        (
            "5:cpu,cpuacct:/docker/1\n1:memory:/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        (
            "5:cpu:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("", {}, None),
        ("not\na list: of groups\n0::/\n", {"cpu.max": "100000 0\n"}, None),
    ],
)
def test_quota_of_the_control_group(groups, files, quota, tmp_path):
    write(tmp_path / "self", groups)
    for name, text in files.items():
        write(tmp_path / "mount" / name, text)
    assert cpus.cpu_quota(tmp_path / "self", tmp_path / "mount") == quota


def test_no_control_groups_no_quota(tmp_path):
    assert cpus.cpu_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (2.5, 2), (0.5, 1), (64.0, 8)])
def test_usable_cpus(quota, usable, monkeypatch):
    monkeypatch.setattr(cpus, "visible_cpus", lambda: 8)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert cpus.usable_cpus() == usable


@pytest.mark.parametrize(
    ("load", "usable", "is_busy"),
    [(70.0, 128, True), (60.0, 128, False), (70.0, 8, False)],  # 8: of a job or a container
)
def test_a_machine_is_busy_if_all_of_it_may_be_used(load, usable, is_busy, monkeypatch):
    monkeypatch.setattr(cpus, "machine_cpus", lambda: 128)
    monkeypatch.setattr(cpus, "usable_cpus", lambda: usable)
    monkeypatch.setattr(cpus, "load_average", lambda: load)
    assert cpus.is_machine_busy() == is_busy
