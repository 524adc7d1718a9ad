"""Where log lines go, by flag and by SVFAP_LOG."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from svfap_dist import logs
from svfap_dist.errors import ConfigError
from svfap_dist.progress import Progress, say


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("svfap_dist", "data_sharding")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)


def _lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    log = logging.getLogger("svfap_dist.train.loop")
    log.debug("detail")
    log.info("step %d", 3)
    logging.getLogger("data_sharding.pipeline").warning("slow", extra={"once": True})
    logging.getLogger("data_sharding.pipeline").warning("slow", extra={"once": True})
    say("said")
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.parametrize(
    ("variable", "level", "lines"),
    [
        ("", "", ["step 3", "warning: slow", "said"]),
        ("debug", "", ["debug: detail", "step 3", "warning: slow", "said"]),
        ("debug", "warning", ["warning: slow"]),
        ("error", "", []),
    ],
)
def test_plain_lines(variable, level, lines, monkeypatch, capsys):
    monkeypatch.setenv("SVFAP_LOG", variable)
    logs.set_up(level)
    assert _lines(capsys) == lines


def test_json_lines_carry_level_logger_and_rank(monkeypatch, capsys):
    monkeypatch.setenv("SVFAP_LOG", "json")
    monkeypatch.setenv("RANK", "1")
    logs.set_up("debug")
    rows = [json.loads(line) for line in _lines(capsys)]
    assert [row["message"] for row in rows] == ["detail", "step 3", "slow", "said"]
    assert [row["level"] for row in rows] == ["debug", "info", "warning", "info"]
    assert rows[1]["logger"] == "svfap_dist.train.loop"
    assert {row["rank"] for row in rows} == {"1"}
    assert logs.os.environ["SVFAP_LOG"] == "debug,json", "children inherit it"
    assert not logs.allow_bars()


def test_quiet_work_shows_no_progress(monkeypatch, capsys):
    monkeypatch.delenv("SVFAP_LOG", raising=False)
    logs.set_up("warning")
    with Progress("Training"):
        pass
    assert capsys.readouterr().err == ""


def test_an_unknown_word_is_an_error(monkeypatch):
    monkeypatch.setenv("SVFAP_LOG", "loud")
    with pytest.raises(ConfigError, match=r"SVFAP_LOG.*loud.*debug, info"):
        logs.set_up()
