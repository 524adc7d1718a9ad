"""`svfap dashboards`: the files of monitoring/ that are made from the list of metrics."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import app


@app.command()
def dashboards(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is out of date.")
    ] = False,
) -> None:
    """Write the Grafana boards and the Prometheus rules again, from the list of metrics.

    Example: svfap dashboards --check
    """
    from svfap_dist.metrics import dashboards as boards

    found = boards.stale() if check else boards.write()
    for path in found:
        print(f"{'out of date' if check else 'written'}: {path}")
    if not found:
        print("All files are up to date.")
    elif check:
        raise typer.Exit(1)
