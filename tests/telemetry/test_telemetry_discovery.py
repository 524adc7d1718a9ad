from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from svfap_dist.config import MetricsConfig
from svfap_dist.errors import ClusterError
from svfap_dist.telemetry.discovery import Discovery


def test_the_list_is_that_of_the_live_ranks() -> None:
    with Discovery(MetricsConfig(), run="r") as discovery:
        url = f"http://{discovery.address}/sd"

        def listed() -> object:
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.headers["Content-Type"] == "application/json"
                return json.load(answer)

        assert listed() == []
        discovery.show(["127.0.0.1:1", "127.0.0.1:2"])
        assert listed() == [{"targets": ["127.0.0.1:1", "127.0.0.1:2"], "labels": {"run": "r"}}]
        discovery.show([])
        assert listed() == []
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url.removesuffix("sd"), timeout=10)


def test_a_port_in_use_is_an_error_with_advice() -> None:
    with Discovery(MetricsConfig(), run="r") as discovery:
        port = int(discovery.address.rpartition(":")[2])
        with pytest.raises(ClusterError, match=r"metrics\.discovery_port"):
            Discovery(MetricsConfig(discovery_port=port), run="s")


def test_nothing_is_served_when_switched_off() -> None:
    assert Discovery(MetricsConfig(enabled=False), run="r").address == ""
