"""`svfap checkpoint`: look after checkpoints."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, checkpoint_app


@checkpoint_app.command("ls")
def checkpoint_ls(run_url: str, as_json: AsJson = False) -> None:
    """Committed checkpoints of a run, oldest first.

    Example: svfap checkpoint ls runs/a
    """
    from svfap_dist.train import checkpoint, trained

    steps = checkpoint.committed_steps(run_url)
    if not steps:
        trained.locate(run_url)  # says that there is none, and where it looked
    print(json.dumps({"steps": steps}) if as_json else "\n".join(f"step {step}" for step in steps))


@checkpoint_app.command("verify")
def checkpoint_verify(
    run_url: str,
    step: Annotated[int | None, typer.Argument(help="Default: the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint again and check every file's digest.

    Example: svfap checkpoint verify runs/a 1000
    """
    from svfap_dist.train import checkpoint, trained

    if step is None:
        steps = checkpoint.committed_steps(run_url)
        if not steps:
            trained.locate(run_url)  # says that there is none, and where it looked
        step = steps[-1]
    checkpoint.verify(run_url, step)
    print(
        json.dumps({"step": step, "ok": True}) if as_json else f"step {step}: every file is whole"
    )
