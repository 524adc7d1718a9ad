"""Plain-text tables: aligned, and cells unchanged."""

from __future__ import annotations

import pytest
import rich.console

from svfap_dist.text_table import format_table


def test_columns_are_aligned() -> None:
    rows = [("a", "1.5", "first"), ("long name", "10", "")]
    assert format_table(rows, ("name", "value", "note"), right=[1]) == [
        "name       value  note",
        "a            1.5  first",
        "long name     10",
    ]


def test_cells_are_neither_cut_nor_interpreted() -> None:
    (line,) = format_table([("[bold]x[/bold] :smile:", "y" * 500)])
    assert line == f"[bold]x[/bold] :smile:  {'y' * 500}"


def test_it_is_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert format_table([("a", "b")]) == ["a  b"]
