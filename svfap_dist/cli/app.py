"""What the verbs share: the applications they hang in, common options, how a result is printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from svfap_dist import logs

# As a newcomer meets them; verbs of one step stand together.
VERBS = (
    *("demo", "doctor", "faces", "shard", "shards"),
    *("plan", "pretrain", "sweep", "launch", "reconstruct", "report", "audit", "checkpoint"),
    *("finetune", "evaluate", "extract", "predict", "import", "export"),
    *("dashboards", "files", "bench"),
)


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order of VERBS."""
        return sorted(super().list_commands(ctx), key=VERBS.index)


app = typer.Typer(
    name="svfap",
    cls=_InOrder,
    help="Pre-train and fine-tune facial-affect video models (SVFAP) on shards of face clips.\n\n"
    "First steps: `svfap demo`. Then: `svfap shard`, `svfap pretrain`, `svfap finetune`.\n\n"
    "Each verb's --help has an example. SVFAP_LOG sets the log level (debug, info, warning, error) "
    "and `json` lines, e.g. SVFAP_LOG=debug,json.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _set_up_logs(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log at level debug.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log warnings and errors only.")] = False,
) -> None:
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other")
    logs.set_up("debug" if verbose else "warning" if quiet else "")


shards_app = typer.Typer(help="Look after shards.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="Look after checkpoints.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")

On = Annotated[
    str, typer.Option(help="local: this process, or torchrun's ranks; ray: a Ray cluster")
]
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A .toml file or a bundled name: tiny_cpu, svfap_base_voxceleb2; to fine-tune: "
        "finetune_dfew, finetune_synthetic, ... (`svfap files launch` copies them all out)",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.max_steps=100")
]


def print_result(result: Any, as_json: bool) -> None:
    """A result object on standard output: as JSON, or as the lines it has for people."""
    import dataclasses

    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print("\n".join(result.lines()))
