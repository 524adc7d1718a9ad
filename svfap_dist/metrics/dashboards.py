"""The files of monitoring/ that are made from tables: Grafana boards and Prometheus rules.

In: `boards` and `alerts`. Out: JSON that Grafana provisions, built by Grafana's own SDK, and the
rule file. `svfap dashboards` writes them; they are checked in, and a test compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from svfap_dist import bundled
from svfap_dist.errors import ConfigError
from svfap_dist.metrics import alerts
from svfap_dist.metrics.boards import BOARDS, Board, Panel

_DATASOURCE = "svfap-prometheus"  # uid, as provisioned
_NOTE = "# Written by `svfap dashboards` from svfap_dist/metrics/alerts.py.\n"
_BIG, _SMALL = 8, 4  # heights, in Grafana's rows


def files() -> dict[str, str]:
    """Content of each made file, by its path below monitoring/.

    Raises: ConfigError if Grafana's SDK is not installed.
    """
    rules = yaml.safe_dump(alerts.rules(), sort_keys=False, width=120, allow_unicode=True)
    boards = {f"grafana/dashboards/{board.name}.json": _json(board) for board in BOARDS}
    return {"prometheus/rules.yml": _NOTE + rules, **boards}


def write(folder: Path | None = None) -> list[Path]:
    """Write all made files; those whose content changed are returned."""
    changed = []
    for path, text in _paths(folder).items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(path)
    return changed


def stale(folder: Path | None = None) -> list[Path]:
    """Files that are missing or are not what would be written now."""
    found = _paths(folder).items()
    return [path for path, text in found if not path.exists() or path.read_text() != text]


def _paths(folder: Path | None) -> dict[Path, str]:
    root = folder or bundled.folder("monitoring")
    return {root / name: text for name, text in files().items()}


def _sdk() -> Any:
    try:
        from grafana_foundation_sdk import builders  # noqa: F401 - its parts are imported below
    except ImportError as error:
        raise ConfigError(
            "Grafana's SDK is not installed",
            found=str(error),
            do="pip install 'svfap_dist[dev]'; only those who change the boards need it",
        ) from error


def _json(board: Board) -> str:
    _sdk()
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
    from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
    from grafana_foundation_sdk.models.common import StackingMode

    if panel.kind == "number":
        made = stat.Panel().height(_SMALL)
    else:
        made = timeseries.Panel().height(_BIG).line_width(1).fill_opacity(10)
        if panel.kind == "stacked":
            stacking = common.StackingConfig().mode(StackingMode.NORMAL)
            made = made.stacking(stacking).fill_opacity(60)
    made = made.title(panel.title).description(panel.text).unit(panel.unit).span(panel.width)
    made = made.datasource(_source())
    for query, legend in panel.queries:
        made = made.with_target(prometheus.Dataquery().expr(query).legend_format(legend))
    return made
