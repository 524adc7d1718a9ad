"""A wrong address is told soon; one that answers, and those that only Ray knows, are passed."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from svfap_dist.distributed import free_port
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.ray_connection import check_answers


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
