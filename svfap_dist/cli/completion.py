"""`svfap completion`: make a shell complete verbs, options, recipes and names.

Typer does the work: the printed script calls `svfap` with _SVFAP_COMPLETE set when Tab is pressed.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Annotated

import typer

from svfap_dist.cli.app import app, complete_with

_SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_SVFAP_COMPLETE"


def answer_shells() -> None:
    """Let the command line answer the requests of completion scripts."""
    if _VARIABLE in os.environ:
        _register_shells()


def _register_shells() -> None:
    from typer import completion as typers

    typers.get_completion_inspect_parameters()


@app.command()
def completion(
    shell: Annotated[
        str,
        typer.Argument(help="Shell: bash, zsh or fish.", autocompletion=complete_with(*_SHELLS)),
    ],
) -> None:
    """Print the script that makes a shell complete this command.

    In bash and zsh: `source <(svfap completion bash)` at the end of ~/.bashrc, or with zsh of
    ~/.zshrc, after compinit. In fish: `svfap completion fish | source`.

    Example: svfap completion bash
    """
    from typer.completion import shell_complete

    from svfap_dist.errors import ConfigError

    if shell not in _SHELLS:
        raise ConfigError("Unknown shell", "SHELL", shell, f"use one of {', '.join(_SHELLS)}")
    _register_shells()
    with contextlib.redirect_stdout(io.StringIO()) as script:
        command = typer.main.get_command(app)
        shell_complete(command, {}, "svfap", _VARIABLE, f"source_{shell}")
    print(script.getvalue().strip())  # in a file of zsh's, #compdef has to be the first line
