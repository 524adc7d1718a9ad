"""`svfap checkpoint`: list, verify, delete and reshard checkpoints."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, RunUrl, checkpoint_app, print_result
from svfap_dist.progress import say, waiting


@checkpoint_app.command("ls")
def checkpoint_ls(run_url: RunUrl, as_json: AsJson = False) -> None:
    """List the committed checkpoints of a run, oldest first, and mark the best one.

    Example: svfap checkpoint ls runs/a
    """
    from svfap_dist.checkpoint.best import read_best

    steps, best = _committed_steps(run_url), read_best(run_url)
    if as_json:
        marked = {"best": {"step": best.step, best.metric: best.score}} if best else {}
        print(json.dumps({"steps": steps, **marked}))
        return
    marks = {best.step: f" (best by {best.judged_by}, {best.score_text})"} if best else {}
    for step in steps:
        print(f"step {step}{marks.get(step, '')}")


@checkpoint_app.command("verify")
def checkpoint_verify(
    run_url: RunUrl,
    step: Annotated[
        int | None, typer.Argument(help="Step of the checkpoint (default: the newest).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint and check every file's SHA-256.

    Example: svfap checkpoint verify runs/a 1000
    """
    from svfap_dist.checkpoint import store

    step = _committed_steps(run_url)[-1] if step is None else step
    with waiting(f"Verifying step {step}"):
        store.verify(run_url, step)
    text = f"step {step}: every file is intact"
    print(json.dumps({"step": step, "ok": True}) if as_json else text)


def _committed_steps(run_url: str) -> list[int]:
    from svfap_dist.checkpoint import load, store
    from svfap_dist.errors import ConfigError

    if not (steps := store.committed_steps(run_url)):
        load.locate_weights(run_url)  # raises if there is no checkpoint at all
        advice = "give the run.url of its run, then the step"
        raise ConfigError("Not the URL of a run", run_url, "it is one checkpoint", advice)
    return steps


@checkpoint_app.command("gc")
def checkpoint_gc(
    run_url: RunUrl,
    keep_last: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of newest checkpoints to keep (default: the recipe's train.keep_last).",
        ),
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(
            min=0, help="Also keep multiples of this step (default: the recipe's train.keep_every)."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be deleted (default: off).")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete without confirmation (default: ask).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints that were never committed or that retention does not keep.

    The newest one is always kept, and a run that may be alive is refused.

    Example: svfap checkpoint gc runs/a --keep-last 2 --keep-every 10000
    """
    import sys

    from svfap_dist.checkpoint import gc
    from svfap_dist.errors import ConfigError

    with waiting(f"Looking at {run_url}"):
        found = gc.plan_gc(run_url, keep_last, keep_every)
    print_result(found, as_json)
    if dry_run or not found.steps:
        return
    if not yes:
        if not sys.stdin.isatty():
            advice = "give --yes to delete, or --dry-run to print only"
            title, found = "Confirmation required", "standard input is not a terminal"
            raise ConfigError(title, "svfap checkpoint gc", found, advice)
        typer.confirm("Delete them?", abort=True, err=True)
    with waiting("Deleting"):
        gc.run_gc(found, lambda step: say(f"deleted step {step}"))


@checkpoint_app.command("reshape")
def checkpoint_reshape(
    url: Annotated[
        str, typer.Argument(help="URL of a run (its newest checkpoint) or of a checkpoint.")
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="URL of the new run to write to.")],
    world_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Check that this number of ranks can resume (default: unchecked)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint into DeepSpeed's universal form, one file for any number of ranks.

    A run does not need it: it resumes from any checkpoint with any ZeRO stage and number of ranks.
    Resume from the new one with run.url=OUTPUT.

    Example: svfap checkpoint reshape runs/a --world-size 16 -o runs/a-on-16
    """
    from svfap_dist.checkpoint import reshard

    with waiting(f"Converting into {output}"):
        result = reshard.reshard_checkpoint(url, output, world_size)
    print_result(result, as_json)
