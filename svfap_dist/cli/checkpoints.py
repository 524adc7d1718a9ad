"""`svfap checkpoint`: look after checkpoints."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, checkpoint_app, print_result


@checkpoint_app.command("ls")
def checkpoint_ls(run_url: str, as_json: AsJson = False) -> None:
    """Committed checkpoints of a run, oldest first.

    Example: svfap checkpoint ls runs/a
    """
    from svfap_dist.checkpoint import load, store

    steps = store.committed_steps(run_url)
    if not steps:
        load.locate_weights(run_url)  # says that there is none, and where it looked
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
    from svfap_dist.checkpoint import load, store

    if step is None:
        steps = store.committed_steps(run_url)
        if not steps:
            load.locate_weights(run_url)  # says that there is none, and where it looked
        step = steps[-1]
    store.verify(run_url, step)
    print(
        json.dumps({"step": step, "ok": True}) if as_json else f"step {step}: every file is whole"
    )


@checkpoint_app.command("gc")
def checkpoint_gc(
    run_url: str,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Newest to keep; default: the recipe's.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=0, help="Keep multiples of this, too; default: the recipe's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints that were never committed, and those that retention lets go.

    The newest one stays in any case, and a run that may be alive is refused.

    Example: svfap checkpoint gc runs/a --keep-last 2 --keep-every 10000
    """
    import sys

    from svfap_dist.checkpoint import gc
    from svfap_dist.errors import ConfigError
    from svfap_dist.progress import say

    found = gc.plan_gc(run_url, keep_last, keep_every)
    print_result(found, as_json)
    if dry_run or not found.steps:
        return
    if not yes:
        if not sys.stdin.isatty():
            advice = "give --yes to delete, or --dry-run to look only"
            raise ConfigError(
                "Nobody to ask", where="standard input", found="no terminal", do=advice
            )
        typer.confirm("Delete them?", abort=True, err=True)
    gc.run_gc(found, lambda step: say(f"deleted step {step}"))


@checkpoint_app.command("reshape")
def checkpoint_reshape(
    url: Annotated[str, typer.Argument(help="A run (its newest checkpoint) or a checkpoint.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of a new run.")],
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Check that so many ranks can go on with it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a checkpoint ahead of time into the form that any number of ranks loads.

    A run does so by itself when it resumes with other ranks; on a large model that takes minutes,
    in which all ranks wait. Resume with run.url=OUTPUT.

    Example: svfap checkpoint reshape runs/a --world-size 16 -o runs/a-on-16
    """
    from svfap_dist.checkpoint import reshard

    print_result(reshard.reshard_checkpoint(url, output, world_size), as_json)
