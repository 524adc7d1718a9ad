"""Generate the files of monitoring/: Grafana boards and Prometheus rules.

In: `boards` and `alerts`. Out: JSON that Grafana provisions, built by Grafana's own SDK, and the
rule file. `svfap dashboards` writes them; they are checked in, and a test compares.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

from svfap_dist import bundled
from svfap_dist.dashboards import alerts
from svfap_dist.dashboards.boards import BOARDS, Board, Panel

_SOURCE = models.DataSourceRef(type_val="prometheus", uid="svfap-prometheus")  # as provisioned
_NOTE = "# Written by `svfap dashboards` from svfap_dist/dashboards/alerts.py.\n"
_BIG, _SMALL = 8, 4  # heights, in Grafana's rows


def render_files() -> dict[str, str]:
    """Return the content of each generated file, by its path below monitoring/."""
    rules = yaml.safe_dump(alerts.rules(), sort_keys=False, width=120, allow_unicode=True)
    boards = {f"grafana/dashboards/{board.name}.json": _json(board) for board in BOARDS}
    return {"prometheus/rules.yml": _NOTE + rules, **boards}


def write_files(folder: Path | None = None) -> list[Path]:
    """Write all generated files and return those whose content changed.

    Args:
        folder: Folder to write to; None: the bundled monitoring/.
    """
    changed = _stale_files(folder)
    for path, text in changed.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(changed)


def stale_files(folder: Path | None = None) -> list[Path]:
    """Return the files that are missing or differ from what would be written now.

    Args:
        folder: Folder of the files; None: the bundled monitoring/.
    """
    return list(_stale_files(folder))


def _stale_files(folder: Path | None) -> dict[Path, str]:
    root = folder or bundled.folder("monitoring")
    files = {root / name: text for name, text in render_files().items()}
    return {p: text for p, text in files.items() if not p.exists() or p.read_text() != text}


def _json(board: Board) -> str:
    run = (
        builders.QueryVariable("run")
        .label("Run")
        .datasource(_SOURCE)
        .query("label_values(svfap_step, run)")
        .include_all(True)
        .multi(True)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    )
    made = (
        builders.Dashboard(f"svfap: {board.title}")
        .uid(f"svfap-{board.name}")
        .tags(["svfap"])
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(run)
    )
    for panel in board.panels:
        made = made.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(panel: Panel) -> Any:
    made: Any = _number(panel) if panel.kind == "number" else _chart(panel)
    made = made.title(panel.title).description(panel.text).unit(panel.unit).span(panel.width)
    made = made.datasource(_SOURCE)
    if panel.decimals is not None:
        made = made.decimals(panel.decimals)
    if panel.limits:
        steps = [models.Threshold(value=value, color=color) for value, color in panel.limits]
        limits = builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
        made = made.thresholds(limits)
    for name, color in panel.colors:
        fixed = {"mode": "fixed", "fixedColor": color}
        made = made.override_by_name(name, [models.DynamicConfigValue("color", fixed)])
    for ref, (query, legend) in zip(string.ascii_uppercase, panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query).legend_format(legend).ref_id(ref)
        made = made.with_target(target.range())
    return made


def _number(panel: Panel) -> stat.Panel:
    modes = common_models.BigValueColorMode
    newest = common.ReduceDataOptions().calcs(["lastNotNull"])
    made = stat.Panel().height(_SMALL).reduce_options(newest)
    made = made.color_mode(modes.VALUE if panel.limits else modes.NONE)
    return made.graph_mode(common_models.BigValueGraphMode.AREA)


def _chart(panel: Panel) -> timeseries.Panel:
    """Build a chart whose legend has the newest values."""
    legend = common.VizLegendOptions().show_legend(True).calcs(["lastNotNull"])
    legend = legend.display_mode(common_models.LegendDisplayMode.LIST)
    legend = legend.placement(common_models.LegendPlacement.BOTTOM)
    made = timeseries.Panel().height(_BIG).line_width(1).fill_opacity(10).legend(legend)
    if panel.zero:
        made = made.axis_soft_min(0)
    if panel.kind in ("stacked", "bars"):
        stacking = common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A")
        made = made.stacking(stacking).fill_opacity(60)
    if panel.kind == "bars":
        made = made.draw_style(common_models.GraphDrawStyle.BARS)
    if panel.top is not None:
        made = made.min(0).max(panel.top)
    if panel.limits:
        dashed = common_models.GraphTresholdsStyleMode.DASHED  # their spelling
        made = made.thresholds_style(common.GraphThresholdsStyleConfig().mode(dashed))
    return made
