"""`svfap dashboards` generates the files of monitoring/; `svfap audit` checks what a run used."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, RunUrl, app, print_result
from svfap_dist.progress import waiting


@app.command()
def dashboards(
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Only compare; exit with 1 if a file is out of date (default: write)."
        ),
    ] = False,
) -> None:
    """Generate Grafana boards and Prometheus rules from the table of metrics.

    Example: svfap dashboards --check
    """
    from svfap_dist.dashboards import render

    found = render.stale_files() if check else render.write_files()
    for path in found:
        print(f"{'out of date' if check else 'written'}: {path}")
    if not found:
        print("All files are up to date.")
    elif check:
        raise typer.Exit(1)


@app.command()
def audit(
    run_url: RunUrl,
    data: Annotated[
        str,
        typer.Option(
            help="URL of the shards (default: the recipe's); of a mixture, one for each source, "
            "separated by commas."
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Check that each sample was used exactly once per epoch, of each source of a mixture.

    Compares the ledger that a run with run.ledger=true writes with the order of samples.
    Exit code 1 if a sample was lost, duplicated or misplaced.

    Example: svfap audit s3://bucket/runs/a
    """
    with waiting(f"Reading {run_url}"):  # then a bar
        from svfap_dist.train import audit as auditing

        found = auditing.audit(run_url, data)
    print_result(found, as_json)
    if not found.is_exact:
        raise typer.Exit(1)
