"""`svfap launch`: submit a recipe to a scheduler, show the job's state, stop it; `svfap files`.

The verbs `svfap launch NAME` follow from the rows of `cluster.schedulers.SCHEDULERS`: a scheduler's
docstring is its help, its fields are its options.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from svfap_dist.cli.app import AsJson, Overrides, Recipe, app, print_result
from svfap_dist.progress import waiting

log = logging.getLogger(__name__)

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be submitted, and submit nothing.")
]
Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="Address of Ray's dashboard, e.g. http://head:8265 (Ray jobs only).",
    ),
]
JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="As `svfap launch` printed it, e.g. slurm:4711.")
]


class _Schedulers(TyperGroup):
    """The group `launch`, with one verb for each scheduler."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the schedulers, then the verbs for jobs."""
        from svfap_dist.cluster.schedulers import SCHEDULERS

        return [*SCHEDULERS, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb; that of a scheduler is made from its class."""
        from svfap_dist.cluster.schedulers import SCHEDULERS

        if cmd_name not in SCHEDULERS:
            return super().get_command(ctx, cmd_name)
        maker = typer.Typer(add_completion=False, rich_markup_mode=None)
        maker.command(cmd_name)(_verb_of(cmd_name))
        return typer.main.get_command(maker)


launch_app = typer.Typer(
    cls=_Schedulers, help="Submit a run to a cluster's scheduler.", no_args_is_help=True
)
app.add_typer(launch_app, name="launch")


def _verb_of(scheduler: str) -> Any:
    """Return the function of `svfap launch NAME`, with the scheduler's fields as options."""
    from svfap_dist.cluster.schedulers import scheduler_class

    made = scheduler_class(scheduler)

    def launch(
        name: str, overrides: list[str] | None = None, dry_run: bool = False, **options: Any
    ) -> None:
        chosen = made(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
        with waiting("Preparing the job"):
            submission = chosen.prepare(name, overrides or [])
        if dry_run:
            print(submission.text)
            return
        with waiting("Submitting the job"):
            job = chosen.submit(submission)
        print(job, flush=True)
        if options.get("follow"):
            _follow(chosen, job)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("name", keyword, annotation=Recipe),
        inspect.Parameter("overrides", keyword, annotation=Overrides, default=None),
    ]
    types = typing.get_type_hints(made)
    for field in dataclasses.fields(made):
        repeated = typing.get_origin(types[field.name]) is tuple
        of = list[str] if repeated else types[field.name]
        flag = typer.Option(f"--{field.name.replace('_', '-')}", **field.metadata)
        default = [] if repeated else field.default
        parameters.append(
            inspect.Parameter(field.name, keyword, annotation=Annotated[of, flag], default=default)
        )
    parameters.append(inspect.Parameter("dry_run", keyword, annotation=DryRun, default=False))
    launch.__doc__ = made.__doc__
    launch.__annotations__ = {each.name: each.annotation for each in parameters}
    launch.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return launch


def _follow(scheduler: Any, job: Any) -> None:
    """Show a job's output, then exit with its code."""
    try:
        code = scheduler.follow_job(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        log.info("%s keeps running. `svfap launch stop %s` makes it save and end.", job, job)
        code = 130
    sys.exit(code)


def _scheduler_of(text: str, **options: Any) -> tuple[Any, Any]:
    """Return a job and its scheduler, made with those options that its class has."""
    from svfap_dist.cluster.schedulers import parse_job, scheduler_class

    job = parse_job(text)
    made = scheduler_class(job.scheduler)
    known = {field.name for field in dataclasses.fields(made)}
    return job, made(**{name: value for name, value in options.items() if name in known})


@launch_app.command("status")
def launch_status(
    name: JobName, address: Address = "http://127.0.0.1:8265", as_json: AsJson = False
) -> None:
    """Print a job's state, as its scheduler reports it.

    Example: svfap launch status slurm:4711
    """
    job, scheduler = _scheduler_of(name, address=address)
    with waiting(f"Asking for the state of {job}"):
        status = scheduler.status(job)
    print_result(status, as_json)


@launch_app.command("stop")
def launch_stop(
    name: JobName, address: Address = "http://127.0.0.1:8265", as_json: AsJson = False
) -> None:
    """Stop a job: let it save a checkpoint, and wait until it has ended.

    Example: svfap launch stop ray:base-1a2b3c4d --address http://head:8265
    """
    job, scheduler = _scheduler_of(name, address=address)
    title = f"Waiting for {job} to save a checkpoint and end"
    log.info("%s ...", title)
    with waiting(title):
        status = scheduler.stop(job)
    print_result(status, as_json)


@app.command()
def files(
    folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="[launch] [monitoring]", help="Folders to copy (default: both)."),
    ] = None,
    out: Annotated[str, typer.Option("-o", "--out", help="Folder to copy into.")] = ".",
) -> None:
    """Copy the bundled recipes and the launch and monitoring files into a folder.

    Existing files are not overwritten.

    Example: svfap files launch -o my-cluster
    """
    from svfap_dist import bundled
    from svfap_dist.errors import ConfigError

    for folder in folders or ():
        if folder not in bundled.FOLDERS:
            raise ConfigError("No such folder", folder, "not bundled", "use launch or monitoring")
    written = bundled.copy(Path(out), folders or bundled.FOLDERS)
    print("\n".join(map(str, written)) or "Nothing new to copy.")
