"""Panels of a Grafana board as plain values, and the queries that they are made of.

In: the metrics of `names`. Out: `Panel`, which `boards` puts into tables and `dashboards` turns
into Grafana's JSON. Queries give one series per run, or per run and rank, on whatever port a
restart put it: or a board would show the dead beside the living.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from svfap_dist.dashboards import alerts
from svfap_dist.telemetry.metrics import Metric

GPU_ONLY = "Only on GPUs."
Kind = Literal["lines", "stacked", "bars", "number"]
Limits = tuple[tuple[float | None, str], ...]  # (from this value on, colour); None: from the bottom


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel: queries are (PromQL, legend); the unit is one of Grafana's; width is of 24.

    limits colour a number and are lines in a chart. zero, top: whether the axis begins at zero, and
    its end. colours: of series, by legend.
    """

    title: str
    kind: Kind
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str
    width: int = 12
    limits: Limits = ()
    zero: bool = True
    top: float | None = None
    decimals: int | None = None
    colours: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Board:
    """A dashboard and the name of its file."""

    name: str
    title: str
    panels: tuple[Panel, ...]


def high_is_bad(limit: float) -> Limits:
    """Colours of a number that alerts from `limit` on."""
    return ((None, "green"), (limit / 2, "yellow"), (limit, "red"))


def of(metric: Metric, matchers: str = "") -> str:
    """A metric of the chosen runs."""
    return f'{metric.name}{{run=~"$run"{matchers}}}'


def on_main(metric: Metric) -> str:
    """What rank 0 tells for the whole run; one series, on whatever port a restart put it."""
    matcher = ', rank="0"'
    return f"max by (run) ({of(metric, matcher)})"


def newest(metric: Metric, by: str) -> str:
    """A counter's rate or a gauge's value; one series, whatever restarts there were."""
    return rate(metric, by) if metric.is_counter else f"max by ({by}) ({of(metric)})"


def rate(metric: Metric, by: str) -> str:
    """A counter's increase per second, summed by labels."""
    return f"sum by ({by}) (rate({of(metric)}[$__rate_interval]))"


def share(part: Metric, whole: Metric, by: str) -> str:
    """Of what is above zero: 0 / 0 would be NaN, and a chart with a NaN in it stays empty."""
    return f"{rate(part, by)} / ({rate(whole, by)} > 0)"


def recorded(recording: alerts.Recording) -> str:
    """A recorded query of the chosen runs."""
    return f'{recording.record}{{run=~"$run"}}'


def number(title: str, unit: str, query: str, text: str, width: int = 4, **more) -> Panel:
    """A number that begins a board."""
    return Panel(title, "number", unit, ((query, "{{run}}"),), text, width, **more)


def now(title: str, unit: str, metric: Metric, note: str = "", **more) -> Panel:
    """The newest value of a metric that rank 0 tells."""
    return number(title, unit, on_main(metric), f"{metric.help} {note}".strip(), **more)


def main(title: str, unit: str, *metrics: tuple[Metric, str], **more) -> Panel:
    """Curves of (metric, legend), as rank 0 tells them."""
    queries = ((on_main(metric), f"{{{{run}}}} {legend}".strip()) for metric, legend in metrics)
    return Panel(title, "lines", unit, tuple(queries), " ".join(m.help for m, _ in metrics), **more)


def each_rank(title: str, unit: str, metric: Metric, note: str = "", **more) -> Panel:
    """A curve for each rank: a counter's rate, or a gauge."""
    query = newest(metric, "run, rank")
    text = f"{metric.help} {note}".strip()
    return Panel(title, "lines", unit, ((query, "{{run}} rank {{rank}}"),), text, **more)


def by_label(title: str, unit: str, metric: Metric, label: str, **more) -> Panel:
    """Curves of a metric by one of its own labels."""
    query = newest(metric, f"run, {label}")
    return Panel(title, "lines", unit, ((query, f"{{{{{label}}}}}"),), metric.help, **more)
