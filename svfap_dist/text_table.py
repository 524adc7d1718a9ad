"""Plain-text tables: aligned by rich, without borders, for terminals, logs and files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_UNLIMITED = 100_000  # characters, so that nothing is wrapped or cut


def format_table(
    rows: Iterable[Sequence[str]], header: Sequence[str] = (), right: Iterable[int] = ()
) -> list[str]:
    """Return a table's lines.

    Args:
        rows: Cells of each row.
        header: Column titles; empty: none.
        right: Numbers of the columns that are aligned to the right.
    """
    import io

    from rich.console import Console
    from rich.table import Table

    rows, on_right = list(rows), set(right)
    table = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
    for number in range(len(header or rows[0])):
        title = header[number] if header else ""
        table.add_column(title, justify="right" if number in on_right else "left")
    for row in rows:
        table.add_row(*row)
    file = io.StringIO()
    # Brackets and colons in cells are text, not markup or emoji; in a notebook rich would show the
    # table instead of writing it.
    Console(
        file=file,
        width=_UNLIMITED,
        color_system=None,
        markup=False,
        emoji=False,
        highlight=False,
        force_jupyter=False,
    ).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]
