"""The boards on a live run: every query gives data, and Grafana's components draw every panel."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_boards import dashboard, render
from prometheus import Prometheus, wait_until
from watched_runs import WatchedRun

from svfap_dist.dashboards.boards import BOARDS, GPU_ONLY, Panel
from svfap_dist.telemetry.goodput import CLASSES

pytestmark = pytest.mark.services

# What the watched run, a pre-training on one data set and on CPUs, has nothing to show for.
_OTHER_RUNS = (GPU_ONLY, "absent without a mixture", "absent without finetune.validation")


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[WatchedRun]:
    run = WatchedRun(tmp_path_factory.mktemp("watched"))
    query = run.prometheus.query
    try:
        wait_until(lambda: len(query('up{job="svfap_ranks"} == 1')) == 2, 120)
        wait_until(lambda: query("svfap_checkpoint_step >= 10"), 120)
        # Rates need two scrapes, and the recorded rates five minutes' worth of a moment.
        wait_until(lambda: query("svfap:data_wait:share5m"), 60)
        # Charts want a few steps of the boards, which are of five seconds.
        wait_until(lambda: query('count_over_time(svfap_loss{rank="0"}[1m]) >= 40'), 60)
        yield run
    finally:
        run.stop()


def test_every_query_of_every_board_gives_data(watched) -> None:
    wait_until(lambda: not empty_panels(watched.prometheus), 60)
    seconds = {row["metric"]["class"]: row for row in watched.prometheus.query("svfap_run_seconds")}
    assert set(seconds) == set(CLASSES)
    # Both move while the run continues, and are not read at the same moment.
    wait_until(lambda: goodput_shown(watched.prometheus) == goodput_by_hand(watched.url), 60)


def empty_panels(prometheus: Prometheus) -> list[str]:
    """Panels of which a query gives nothing, but for those of other kinds of runs."""
    return [
        panel.title
        for board in BOARDS
        for panel in board.panels
        if not is_of_other_runs(panel)
        for query, _ in panel.queries
        if not prometheus.query(query.replace("$run", ".*").replace("$__rate_interval", "30s"))
    ]


def is_of_other_runs(panel: Panel) -> bool:
    return any(kind in panel.text for kind in _OTHER_RUNS)


def goodput_shown(prometheus: Prometheus) -> Any:
    (series,) = prometheus.query("svfap_goodput_ratio")
    return pytest.approx(float(series["value"][1]), rel=0.01)


def goodput_by_hand(run: Path) -> float:
    """Productive share of the wall time of an undisturbed run, from its events alone."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    windows = [event for event in events if event["event"] == "window"]
    (ready,) = [event for event in events if event["event"] == "ready"]
    waits = ("data_wait_seconds", "checkpoint_seconds", "evaluation_seconds", "probe_seconds")
    lost = sum(window[wait] for window in windows for wait in waits)
    end = windows[-1]["time"]
    return (end - ready["time"] - lost) / (end - events[0]["time"])


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_grafana_s_components_draw_every_panel(board, watched, tmp_path) -> None:
    wait_until(lambda: not empty_panels(watched.prometheus), 60)
    picture = tmp_path / "board.png"
    found = dashboard(board.name)
    shown = render(found, watched.prometheus.url, watched.began, time.time(), picture)
    assert [panel.title for panel in shown] == [panel.title for panel in board.panels]
    for panel, of_board in zip(shown, board.panels, strict=True):
        assert not panel.error, panel
        assert panel.title in panel.text
        if is_of_other_runs(of_board):
            assert (panel.series == 0) == ("No data" in panel.text), panel
            continue
        assert panel.points, panel
        assert "No data" not in panel.text, panel
        if panel.type == "stat":  # its number
            assert any(sign.isdigit() for sign in panel.text.removeprefix(panel.title)), panel
        else:
            assert panel.drawn > 10, panel
    assert picture.stat().st_size > 20_000


def test_a_broken_panel_is_told_from_a_good_one(watched, tmp_path) -> None:
    """What the tests above rely on: each way to break a panel is seen."""
    board = dashboard("training")
    (good,) = [panel for panel in board["panels"] if panel["title"] == "Loss"]
    board["panels"] = [copy.deepcopy(good) for _ in range(6)]
    _, query, empty, unit, kind, names = board["panels"]
    query["targets"][0]["expr"] = "rate(svfap_loss["
    empty["targets"] = [empty["targets"][0] | {"expr": "svfap_no_such_metric"}]
    unit["fieldConfig"]["defaults"]["unit"] = "clipz"
    kind["type"] = "no-such-panel"
    names["targets"] = [names["targets"][0]] * 2
    for number, panel in enumerate(board["panels"]):
        panel["gridPos"] = {"x": 0, "y": 8 * number, "w": 12, "h": 8}
    url = watched.prometheus.url
    shown = render(board, url, watched.began, time.time(), tmp_path / "board.png")
    errors = [panel.error for panel in shown]
    assert errors[0] == ""
    assert shown[0].drawn > 10
    assert "parse error" in errors[1]
    assert (errors[2], shown[2].series, shown[2].drawn) == ("", 0, 0)
    assert "unit clipz" in errors[3]
    assert "no-such-panel" in errors[4]
    assert "names of their own" in errors[5]
