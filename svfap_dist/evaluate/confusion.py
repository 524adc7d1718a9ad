"""The confusion matrix of a classification: counted, and drawn.

A row is what is true, a column what was said. Colours and the large numbers are per cent of a row,
so that a rare class is as visible as a frequent one; the small numbers are samples.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INCHES_PER_CLASS = 0.75
_MARGIN_INCHES = 2.2  # names and titles
_DARK = 60.0  # per cent above which a cell's text is white


def count(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many samples of each class [rows] were taken for each class [columns]: int64 [C, C]."""
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def recalls(matrix: np.ndarray) -> np.ndarray:
    """Share of each class' samples that were recognised, [C]; NaN for a class without samples."""
    return np.diagonal(_shares(matrix))


def draw(matrix: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """A picture of a matrix of counts [C, C]: the bytes of a PNG."""
    side = _INCHES_PER_CLASS * len(names) + _MARGIN_INCHES
    figure = Figure(figsize=(side, side), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    percent = 100 * np.nan_to_num(_shares(matrix))
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.ndindex(*matrix.shape):
        colour = "white" if percent[row, column] > _DARK else "black"
        shown = (
            ("bottom", 11, f"{percent[row, column]:.1f}"),
            ("top", 8, f"{matrix[row, column]}"),
        )
        for side, size, text in shown:
            axes.text(column, row, text, ha="center", va=side, fontsize=size, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    totals = matrix.sum(axis=1)
    axes.set_yticks(range(len(names)), [f"{n} ({k})" for n, k in zip(names, totals, strict=True)])
    axes.set_xlabel("said")
    axes.set_ylabel("true (samples)")
    axes.set_title(f"{title}\nper cent of the row, and samples", fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _shares(matrix: np.ndarray) -> np.ndarray:
    totals = matrix.sum(axis=1, keepdims=True)
    return np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)
