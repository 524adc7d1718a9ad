"""`svfap serve` as a command: what it prints."""

from __future__ import annotations

import re
import types

import pytest
from typer.testing import CliRunner

from svfap_dist import cli
from svfap_dist.serving import command, web


def test_the_address_is_on_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log line is not enough: with --quiet and --port 0 the address would be unknown."""
    analyzer = types.SimpleNamespace(info=None, close=lambda: None)
    server = types.SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr(command, "Analyzer", lambda *_: analyzer)
    monkeypatch.setattr(web, "build_app", lambda service: None)
    monkeypatch.setattr(web, "build_server", lambda app: server)
    words = ["serve", "runs/a", "--detector=none", "--port=0"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exception is None
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+\n", done.stdout)
