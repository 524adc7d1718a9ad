"""The curves of a transfer table: a score against labels per class, by method."""

from __future__ import annotations

import io
import math

from svfap_dist.bench.transfer_table import TransferTable, labels_text
from svfap_dist.evaluate.results import title_of

_SIZE = (7.0, 4.5)  # inches
_SHIFT = 0.03  # between methods, so that their bars do not cover each other


def draw(table: TransferTable) -> bytes:
    """Return a picture as the bytes of a PNG; bars are standard errors over seeds.

    Args:
        table: with results.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = {(row.method, row.labels): row for row in table.rows()}
    for number, method in enumerate(table.methods):
        shift = _SHIFT * (number - (len(table.methods) - 1) / 2)
        there = [
            (place + shift, rows[method, labels])
            for place, labels in enumerate(table.labels)
            if (method, labels) in rows
        ]
        axes.errorbar(
            [place for place, _ in there],
            [row.mean for _, row in there],
            [0.0 if math.isnan(row.standard_error) else row.standard_error for _, row in there],
            label=method,
            marker="o",
            markersize=4,
            capsize=3,
        )
    if table.metric == "uar" and table.power is not None:
        chance = 100 / len(table.power.of_classes)
        axes.axhline(chance, color="gray", linestyle=":", label="chance")
    axes.set_xticks(range(len(table.labels)), list(map(labels_text, table.labels)))
    axes.set_xlabel("Labels per class")
    axes.set_ylabel(title_of(table.metric))
    axes.set_title(f"{table.set}, {table.label}: mean and standard error of {table.seeds} seeds")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()
