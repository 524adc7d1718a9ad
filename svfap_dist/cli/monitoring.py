"""`svfap dashboards`, the files of monitoring/ that are made from the list of metrics, and `svfap
audit`, the proof that a run used what it should."""

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
    """Write Grafana boards and Prometheus rules again.

    From the list of metrics.

    Example: svfap dashboards --check
    """
    from svfap_dist.dashboards import render as boards

    found = boards.stale() if check else boards.write()
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
