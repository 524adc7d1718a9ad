"""The application and its groups, options that verbs share, and printing of results."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import svfap_dist
from svfap_dist import bundled, json_text, logs
from svfap_dist.errors import EXIT_CODES, SIGNAL_EXIT_CODE, SIGNAL_EXIT_MEANING

log = logging.getLogger(__name__)

# In the order of --help: as a new user needs them.
VERBS = (
    *("demo", "doctor", "faces", "shard", "shards"),
    *("plan", "pretrain", "sweep", "launch", "reconstruct", "report", "audit", "checkpoint"),
    *("finetune", "evaluate", "extract", "predict", "serve", "import", "export"),
    *("dashboards", "files", "bench", "completion"),
)


class _InOrder(TyperGroup):
    """A group that lists its verbs in the order of VERBS."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order of VERBS."""
        return sorted(super().list_commands(ctx), key=VERBS.index)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; Ctrl-C is reported here, since typer itself only exits with 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            log.warning("Interrupted. Partial outputs are ignored; rerun to resume.")
            raise typer.Exit(130) from None


def _list_of_exit_codes() -> str:
    """Return the table of exit codes, shown at the end of `svfap --help`."""
    rows = [*EXIT_CODES.items(), (SIGNAL_EXIT_CODE, SIGNAL_EXIT_MEANING)]
    return "\b\n" + "\n".join(["Exit codes:", *(f"  {code!s:9} {text}" for code, text in rows)])


app = typer.Typer(
    name="svfap",
    cls=_InOrder,
    help="Pre-train and fine-tune facial-affect video models (SVFAP) on shards of face clips.\n\n"
    "First steps: `svfap demo`. Then: `svfap shard`, `svfap pretrain`, `svfap finetune`.\n\n"
    "Each verb's --help has an example. Results are written to standard output (as one JSON object "
    "with --json), progress and errors to standard error. SVFAP_LOG sets the log level (debug, "
    "info, warning, error) and `json` lines, e.g. SVFAP_LOG=debug,json.",
    epilog=_list_of_exit_codes(),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(is_wanted: bool) -> None:
    """Print the installed version and exit, if the option is given."""
    if is_wanted:
        print(f"svfap {svfap_dist.__version__}")
        raise typer.Exit


@app.callback()
def _set_up_logs(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log level debug (default: info).")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Log level warning: no progress lines.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other")
    logs.set_up("debug" if verbose else "warning" if quiet else "")


def _group(name: str, help: str) -> typer.Typer:
    group = typer.Typer(help=help, no_args_is_help=True)
    app.add_typer(group, name=name)
    return group


shards_app = _group("shards", "Verify or show existing shards (`svfap shard` makes them).")
checkpoint_app = _group("checkpoint", "List, verify, delete or convert checkpoints.")
bench_app = _group("bench", "Measure models, decoders, loaders and checkpoints on this machine.")


def complete_with(*words: str) -> Callable[[str], list[str]]:
    """Return a completion callback that offers fixed choices.

    Args:
        *words: Values of the argument or option.
    """

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def _complete_recipe(incomplete: str) -> list[str]:
    """Return matching names of bundled recipes; with no match the shell completes file names."""
    names = sorted(path.stem for path in bundled.folder("launch/recipes").glob("*.toml"))
    return [name for name in names if name.startswith(incomplete)]


On = Annotated[
    str,
    typer.Option(
        help="Where ranks run. local: this process, or those of torchrun; ray: Ray Train.",
        autocompletion=complete_with("local", "ray"),
    ),
]
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        autocompletion=_complete_recipe,
        help="Path of a .toml file, or a bundled name: tiny_cpu, svfap_base_voxceleb2, "
        "finetune_dfew, ... (`svfap files launch` copies all of them out).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
RunUrl = Annotated[str, typer.Argument(help="Folder or s3:// prefix of a run (its run.url).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Recipe keys to override, e.g. train.max_steps=100."
    ),
]


def print_result(result: Any, as_json: bool) -> None:
    """Print a result on standard output.

    Args:
        result: Dataclass with a method `lines`.
        as_json: Whether to print one JSON object instead of these lines.
    """
    print(json_text.dumps(dataclasses.asdict(result)) if as_json else "\n".join(result.lines()))
