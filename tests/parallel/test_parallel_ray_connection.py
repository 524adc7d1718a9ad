"""A wrong address is an error soon; one that answers, and those that only Ray knows, pass."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import pytest
import ray

from svfap_dist.distributed import free_port
from svfap_dist.doctor import cluster
from svfap_dist.errors import ClusterError, ConfigError
from svfap_dist.parallel.ray_connection import LOCAL, check_answers, connected_to_ray


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "a..b:6379"])
def test_where_nothing_listens(address: str) -> None:
    with pytest.raises(ClusterError, match=r"Cannot connect to Ray.*nothing answers.*check it"):
        check_answers(address.format(free_port()), "check it", seconds=0.2)


def test_what_listens_a_little_later_is_waited_for() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        threading.Timer(0.7, server.listen).start()
        began = time.monotonic()
        check_answers(f"127.0.0.1:{server.getsockname()[1]}", "", seconds=10)
        assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("address", ["auto", "local", "/tmp/ray/session", "head"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    check_answers(address, "")


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_named_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Slurm and test runners give such folders; Ray's own error was a traceback."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = "/tmp/" + "x" * 55
    monkeypatch.setenv(variable, folder)
    with (
        pytest.raises(ConfigError, match="set RAY_TMPDIR to a shorter path") as caught,
        connected_to_ray(LOCAL, num_cpus=1, fix=""),
    ):
        pass
    assert caught.value.where == variable
    assert caught.value.found.startswith(folder)
    (found,) = cluster.examine(None)
    assert (found.status, folder in found.found) == ("fail", True)
    assert "RAY_TMPDIR" in found.do
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    (found,) = cluster.examine(None)
    assert found.status == "ok"


@pytest.mark.parametrize(
    ("is_terminal", "no_color", "expected"),
    [(True, None, None), (True, "1", "0"), (False, None, "0")],
)
def test_ray_colors_its_messages_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, no_color: str | None, expected: str | None
) -> None:
    for name, value in (("RAY_COLOR_PREFIX", None), ("NO_COLOR", no_color)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with connected_to_ray("auto", num_cpus=1, fix=""):
        assert os.environ.get("RAY_COLOR_PREFIX") == expected
