"""`svfap dashboards` generates the files of monitoring/; `svfap audit` checks what a run used."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, app, print_result


@app.command()
def dashboards(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is out of date.")
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
    run_url: str,
    data: Annotated[
        str, typer.Option(help="Where the shards are now; empty: where the recipe says.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Prove that each sample was used once per epoch.

    From the ledger that a run with run.ledger=true keeps.
    Exit code 1 if one was lost, duplicated or misplaced.

    Example: svfap audit s3://bucket/runs/a
    """
    from svfap_dist.train import audit as proof

    found = proof.audit(run_url, data)
    print_result(found, as_json)
    if not found.is_exact:
        raise typer.Exit(1)
