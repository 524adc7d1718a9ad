"""The run report: one self-contained HTML page from the files of a run.

In: metrics.jsonl, events.jsonl, quarantine.jsonl, config.toml and pictures/ under a run's URL. Out:
a page with loss, throughput and data-wait charts, a table of the sources of a mixture, the
pictures, what happened when, and the recipe; it needs no network and no server.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import jinja2

from svfap_dist import storage
from svfap_dist.checkpoint.best import read_best
from svfap_dist.errors import ConfigError
from svfap_dist.profiling import trace
from svfap_dist.report import sources
from svfap_dist.report.series import mean_of_tenth
from svfap_dist.telemetry.goodput import WINDOW, Goodput
from svfap_dist.telemetry.journal import QUARANTINE_FILE
from svfap_dist.telemetry.restart import restarts

_LOSSES = ("loss", "held_out_loss")
_CLASSIFIERS = {"logistic": "logistic regression", "knn": "nearest neighbors"}
_COLOR, _SECOND_COLOR = "#2b5c8a", "#c0562f"
_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }
 h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
 .figures { display: flex; flex-wrap: wrap; gap: 1rem }
 .figure { border: 1px solid #ddd; border-radius: 6px; padding: .6rem 1rem; min-width: 9rem }
 .figure b { display: block; font-size: 1.3rem }
 img, svg { max-width: 100%; height: auto } table { border-collapse: collapse }
 td, th { padding: .15rem .8rem .15rem 0; vertical-align: top; text-align: left }
 pre { background: #f6f6f6; padding: 1rem }
</style>
<h1>{{ title }}</h1>
<div class="figures">
{% for name, value in figures %}<div class="figure">{{ name }}<b>{{ value }}</b></div>
{% endfor %}</div>
<h2>Training</h2>
{{ charts | safe }}
{% if sources %}<h2>Sources of the mixture</h2>
<table><tr>{% for name in columns %}<th>{{ name }}{% endfor %}
{% for row in sources %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}
{% endfor %}</table>
{% endif %}
{% for name, data in pictures %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
{% if profiles %}<h2>Traced steps</h2>
<p>Open <code>.trace.json.gz</code> at ui.perfetto.dev, <code>.memory.pickle</code> at
docs.pytorch.org/memory_viz; both pages compute in the browser.</p>
<ul>{% for name, url in profiles %}<li><a href="{{ url }}">{{ name }}</a>
{% endfor %}</ul>
<pre>{{ operations }}</pre>
{% endif %}<h2>What happened</h2>
<table>{% for when, event, details in events %}<tr><td>{{ when }}<td>{{ event }}<td>{{ details }}
{% endfor %}</table>
<h2>Recipe</h2>
<pre>{{ recipe }}</pre>
</html>
"""


def make(run_url: str, output: str) -> None:
    """Write the report of a run to an HTML file.

    Args:
        run_url: the run, or one fold of a fine-tuning.
        output: path or URL of the file.

    Raises:
        ConfigError: There is no run under the URL.
        StorageError: The store fails.
    """
    rows = read_lines(storage.join(run_url, "metrics.jsonl"))
    events = read_lines(storage.join(run_url, "events.jsonl"))
    if not rows:
        raise ConfigError(
            "No run under this URL",
            where=run_url,
            found="no line in metrics.jsonl",
            do="give the run.url of a run that has logged a step; of a fine-tuning, a fold-...",
        )
    recipe = storage.read_bytes(storage.join(run_url, "config.toml")).decode()
    bad = read_lines(storage.join(run_url, QUARANTINE_FILE))
    profiles = _profiles(run_url)
    html = (
        jinja2.Environment(autoescape=True)
        .from_string(_TEMPLATE)
        .render(
            title=f"Run {run_url}",
            figures=[*_figures(rows, events), *_probe_figures(events), *_best_figures(run_url)],
            charts=_charts(rows, events),
            columns=sources.COLUMNS,
            sources=sources.source_rows(rows, events, bad, tomllib.loads(recipe)),
            pictures=_pictures(run_url),
            profiles=[(name, _link(url)) for name, url in profiles.items()],
            operations=_operations(profiles),
            events=[_event_row(event) for event in events if event["event"] != WINDOW],
            recipe=recipe,
        )
    )
    storage.write_bytes(output, html.encode(errors="backslashreplace"))


def read_lines(url: str) -> list[dict[str, Any]]:
    """Return the complete JSON lines of a run's file; none if there is no file.

    Args:
        url: of the file.
    """
    try:
        data = storage.read_bytes(url)
    except storage.StorageMissingError:
        return []
    rows = [json.loads(line) for line in data.split(b"\n")[:-1]]
    # A loss that is not finite is null in JSON.
    return [{**row, **{k: math.nan for k in _LOSSES if row.get(k, 0) is None}} for row in rows]


def _figures(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    losses = [row["loss"] for row in rows]
    first, last = mean_of_tenth(losses, last=False), mean_of_tenth(losses, last=True)
    waits = sum(row["data_wait_share"] for row in rows) / len(rows)
    rates = sorted(row["clips_per_second"] for row in rows)
    found = [
        ("steps", f"{rows[-1]['step']}"),
        ("loss, first → last tenth", f"{first:.3f} → {last:.3f}"),
        ("clips/s, median", f"{rates[len(rates) // 2]:.1f}"),
        ("waiting for data", f"{100 * waits:.1f} %"),
        ("goodput", f"{100 * Goodput(events).ratio():.1f} %"),
    ]
    if slow := _slow_ranks(rows):
        text = ", ".join(f"{rank}: {100 * cost:.1f} %" for rank, cost in slow)
        found.append(("cost of the slowest ranks", text))
    held_out = [event["held_out_loss"] for event in events if event["event"] == "eval"]
    if held_out:
        found.insert(2, ("held-out loss, start → end", f"{held_out[0]:.3f} → {held_out[-1]:.3f}"))
    recovered = sorted(each.total for each in restarts(events))
    if recovered:
        median, worst = recovered[len(recovered) // 2], recovered[-1]
        found.append(("restarts", f"{len(recovered)}, median {median:.1f} s, worst {worst:.1f} s"))
    return found


def _by_step(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the events of a name in order of steps; of a repeated step, the last event."""
    found = {event["step"]: event for event in events if event["event"] == name}
    return [found[step] for step in sorted(found)]


def _probe_figures(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    probes = _by_step(events, "probe")
    if not probes:
        return []
    shown = [f"{100 * probe['uar']['logistic']:.1f}" for probe in (probes[0], probes[-1])]
    costs = sorted(probe["feature_seconds"] + probe["score_seconds"] for probe in probes)
    return [
        ("probe UAR, start → end", f"{' → '.join(shown)} %"),
        ("cost of a probe, median", f"{costs[len(costs) // 2]:.1f} s"),
    ]


def _best_figures(run_url: str) -> list[tuple[str, str]]:
    best = read_best(run_url)
    if best is None:
        return []
    return [(f"best checkpoint by {best.judged_by}", f"step {best.step}, {best.score_text}")]


def _slow_ranks(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return the three ranks that cost most of the steps' time, and their mean cost."""
    costs: dict[int, float] = {}
    for row in rows:
        for rank, cost in row.get("slowest_ranks", ()):  # not in files of older versions
            costs[rank] = costs.get(rank, 0.0) + cost / len(rows)
    return sorted(costs.items(), key=lambda item: -item[1])[:3]


def _charts(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    """Return charts over steps as one inline SVG.

    Three charts, then those of probes, validations of a fine-tuning, and sources, if there are any.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    titles = ["loss", "clips per second", "share of time waiting for data, %"]
    probes, validations = _by_step(events, "probe"), _by_step(events, "validation")
    if probes:
        titles.append("probes: UAR of frozen features, %")
    if validations:
        titles.append(f"validation: {validations[-1]['metric'].upper()}")
    names = list(dict.fromkeys(name for row in rows for name in row.get("source_clips", ())))
    if names:
        titles.append("loss by source")
    figure = Figure(figsize=(4 * len(titles), 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, len(titles))
    steps = [row["step"] for row in rows]
    axes[0].plot(steps, [row["loss"] for row in rows], color=_COLOR, label="training")
    held_out = [(e["step"], e["held_out_loss"]) for e in events if e["event"] == "eval"]
    if held_out:
        axes[0].plot(*zip(*held_out, strict=True), "o-", color=_SECOND_COLOR, label="held out")
    axes[0].legend(frameon=False)
    axes[1].plot(steps, [row["clips_per_second"] for row in rows], color=_COLOR)
    shares = [100 * row["data_wait_share"] for row in rows]
    axes[2].plot(steps, shares, color=_COLOR)
    if probes:
        _draw_probes(axes[3], probes)
    if validations:
        scores = [math.nan if e["score"] is None else e["score"] for e in validations]
        axes[3 + bool(probes)].plot([e["step"] for e in validations], scores, "o-", color=_COLOR)
    for name in names:
        if curve := sources.source_losses(rows, name):
            axes[-1].plot(*zip(*curve, strict=True), label=name)
            axes[-1].legend(frameon=False)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        if "loss" not in title:
            axis.set_ylim(bottom=0)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _draw_probes(axis: Any, probes: list[dict[str, Any]]) -> None:
    """Draw the curve of each classifier and the level of chance."""
    steps = [probe["step"] for probe in probes]
    for (name, label), color in zip(_CLASSIFIERS.items(), (_COLOR, _SECOND_COLOR), strict=True):
        uar = [100 * probe["uar"][name] for probe in probes]
        axis.plot(steps, uar, "o-", color=color, label=label)
    chance = 100 / probes[-1]["classes"]
    axis.axhline(chance, color="#999", linestyle=":", label="chance")
    axis.legend(frameon=False)


def _pictures(run_url: str) -> list[tuple[str, str]]:
    folder = storage.join(run_url, "pictures")
    names = [name for name in storage.list_files(folder) if name.endswith(".png")]
    read = [storage.read_bytes(storage.join(folder, name)) for name in names]
    return [
        (name.removesuffix(".png").capitalize(), base64.b64encode(data).decode())
        for name, data in zip(names, read, strict=True)
    ]


def _profiles(run_url: str) -> dict[str, str]:
    """Return the URLs of the files of traced steps, by name."""
    folder = storage.join(run_url, trace.FOLDER)
    return {name: storage.join(folder, name) for name in sorted(storage.list_files(folder))}


def _link(url: str) -> str:
    return url if storage.is_remote(url) else Path(storage.local_path(url)).resolve().as_uri()


def _operations(profiles: dict[str, str]) -> str:
    """Return what took most time on rank 0 in the last traced steps."""
    found = [url for name, url in profiles.items() if name.endswith("rank-0000.operations.txt")]
    return storage.read_bytes(found[-1]).decode() if found else ""


def _event_row(event: dict[str, Any]) -> tuple[str, str, str]:
    when = datetime.datetime.fromtimestamp(event["time"], datetime.UTC)
    rest = {name: value for name, value in event.items() if name not in ("event", "time")}
    details = ", ".join(f"{name} {_short(value)}" for name, value in rest.items())
    return f"{when:%Y-%m-%d %H:%M:%S}", event["event"], details


def _short(value: Any) -> str:
    if isinstance(value, dict):  # seconds by phase
        return " ".join(f"{name} {_short(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
