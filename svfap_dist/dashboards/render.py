"""Generate the files of monitoring/: Grafana boards and Prometheus rules.

In: `boards` and `alerts`. Out: JSON that Grafana provisions, built by Grafana's own SDK, and the
rule file. `svfap dashboards` writes them; they are checked in, and a test compares.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import yaml

from svfap_dist import bundled
from svfap_dist.dashboards import alerts
from svfap_dist.dashboards.boards import BOARDS, Board, Panel

_DATASOURCE = "svfap-prometheus"  # uid, as provisioned
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
        folder: To write to; None: the bundled monitoring/.
    """
    changed = []
    for path, text in _paths(folder).items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(path)
    return changed


def stale_files(folder: Path | None = None) -> list[Path]:
    """Return the files that are missing or differ from what would be written now.

    Args:
        folder: Where they are; None: the bundled monitoring/.
    """
    found = _paths(folder).items()
    return [path for path, text in found if not path.exists() or path.read_text() != text]


def _paths(folder: Path | None) -> dict[Path, str]:
    root = folder or bundled.folder("monitoring")
    return {root / name: text for name, text in render_files().items()}


def _json(board: Board) -> str:
    from grafana_foundation_sdk.builders import dashboard as builders
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import dashboard as models

    run = (
        builders.QueryVariable("run")
        .label("Run")
        .datasource(_source())
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


def _source() -> Any:
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    return DataSourceRef(type_val="prometheus", uid=_DATASOURCE)


def _panel(panel: Panel) -> Any:
    from grafana_foundation_sdk.builders import prometheus

    made = _number(panel) if panel.kind == "number" else _chart(panel)
    made = made.title(panel.title).description(panel.text).unit(panel.unit).span(panel.width)
    made = made.datasource(_source())
    if panel.decimals is not None:
        made = made.decimals(panel.decimals)
    if panel.limits:
        made = made.thresholds(_limits(panel))
    for name, color in panel.colors:
        made = made.override_by_name(name, [_color(color)])
    for refers, (query, legend) in zip(string.ascii_uppercase, panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query).legend_format(legend).ref_id(refers)
        made = made.with_target(target.range())
    return made


def _number(panel: Panel) -> Any:
    from grafana_foundation_sdk.builders import common, stat
    from grafana_foundation_sdk.models import common as models

    colored = models.BigValueColorMode.VALUE if panel.limits else models.BigValueColorMode.NONE
    newest = common.ReduceDataOptions().calcs(["lastNotNull"])
    made = stat.Panel().height(_SMALL).color_mode(colored).reduce_options(newest)
    return made.graph_mode(models.BigValueGraphMode.AREA)


def _chart(panel: Panel) -> Any:
    """Build a chart whose legend has the newest values."""
    from grafana_foundation_sdk.builders import common, timeseries
    from grafana_foundation_sdk.models import common as models

    legend = common.VizLegendOptions().show_legend(True).calcs(["lastNotNull"])
    legend = legend.display_mode(models.LegendDisplayMode.LIST)
    legend = legend.placement(models.LegendPlacement.BOTTOM)
    made = timeseries.Panel().height(_BIG).line_width(1).fill_opacity(10).legend(legend)
    if panel.zero:
        made = made.axis_soft_min(0)
    if panel.kind in ("stacked", "bars"):
        stacking = common.StackingConfig().mode(models.StackingMode.NORMAL).group("A")
        made = made.stacking(stacking).fill_opacity(60)
    if panel.kind == "bars":
        made = made.draw_style(models.GraphDrawStyle.BARS)
    if panel.top is not None:
        made = made.min(0).max(panel.top)
    if panel.limits:
        dashed = models.GraphTresholdsStyleMode.DASHED  # their spelling
        made = made.thresholds_style(common.GraphThresholdsStyleConfig().mode(dashed))
    return made


def _limits(panel: Panel) -> Any:
    from grafana_foundation_sdk.builders import dashboard as builders
    from grafana_foundation_sdk.models import dashboard as models

    steps = [models.Threshold(value=value, color=color) for value, color in panel.limits]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _color(color: str) -> Any:
    from grafana_foundation_sdk.models.dashboard import DynamicConfigValue

    return DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": color})
