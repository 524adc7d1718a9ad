"""Boards and rules: checked in as written, and about metrics that there are."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from svfap_dist import bundled
from svfap_dist.dashboards import alerts, render
from svfap_dist.dashboards.boards import BOARDS
from svfap_dist.telemetry import metrics
from svfap_dist.telemetry.goodput import CLASSES

KNOWN = set(metrics.PROMETHEUS_METRICS)
RECORDED = {recording.record for recording in alerts.RECORDINGS}
QUERIES = [query for board in BOARDS for panel in board.panels for query, _ in panel.queries]
RULES = [alert.expr for alert in alerts.ALERTS] + [r.expr for r in alerts.RECORDINGS]


def test_checked_in_files_are_what_would_be_written_now(tmp_path) -> None:
    assert render.stale_files() == []
    written = render.write_files(tmp_path)
    assert len(written) == 1 + len(BOARDS)
    assert render.stale_files(tmp_path) == []
    written[0].write_text(written[0].read_text().replace("600", "601"))
    assert render.stale_files(tmp_path) == [written[0]]


def test_queries_name_metrics_that_there_are_and_no_metric_is_forgotten() -> None:
    named = {name for text in QUERIES + RULES for name in re.findall(r"svfap_[a-z_]+", text)}
    assert named - {"svfap_ranks"} == KNOWN  # svfap_ranks: the job
    recorded = {name for text in QUERIES + RULES for name in re.findall(r"svfap:[a-z_0-9:]+", text)}
    assert recorded <= RECORDED


def test_every_alert_tells_cause_and_remedy() -> None:
    groups = yaml.safe_load((bundled.folder("monitoring") / "prometheus/rules.yml").read_text())
    found = [rule for group in groups["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(found) == len(alerts.ALERTS) == len({rule["alert"] for rule in found})
    for rule in found:
        for part in ("summary", "cause", "remedy"):
            assert rule["annotations"][part].endswith(".")


def test_provisioning_and_boards_agree_on_the_data_source() -> None:
    folder = bundled.folder("monitoring") / "grafana"
    (source,) = yaml.safe_load((folder / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    for board in BOARDS:
        text = (folder / f"dashboards/{board.name}.json").read_text()
        assert f'"uid": "{source["uid"]}"' in text


def told(alert: alerts.Alert) -> str:
    """What docs/monitoring.md has to say of an alert; a failing test shows it, to be copied."""
    words = {
        "{{ $labels.run }}": "R",
        "{{ $labels.rank }}": "N",
        "{{ $labels.instance }}": "HOST:PORT",
        "{{ $value | humanizePercentage }}": "X %",
    }
    summary = alert.summary
    for word, plain in words.items():
        summary = summary.replace(word, plain)
    when = "at once" if alert.hold == "0m" else f"after {alert.hold}"
    return (
        f"### {alert.name}\n\n"
        f"{summary} A {alert.severity}, {when}.\n\n"
        f"- Cause: {alert.cause}\n- Remedy: {alert.remedy}\n"
    )


def test_the_on_call_s_page_tells_every_alert_as_the_rules_do() -> None:
    page = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
    assert page.split("## Alerts\n\n")[1] == "\n".join(told(alert) for alert in alerts.ALERTS)
    for board in BOARDS:
        assert f"## {board.title}:" in page


def test_the_on_call_s_page_names_panels_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
    titles = [panel.title for board in BOARDS for panel in board.panels]
    classes = [*CLASSES, "page", "ticket"]
    for named in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", " ".join(page.split())):
        assert named in classes or any(title.startswith(named) for title in titles), named
