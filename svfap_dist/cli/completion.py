"""`svfap completion`: shell completion of verbs, options, recipes and values, by typer.

When Tab is pressed, the printed script calls `svfap` with _SVFAP_COMPLETE set.
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
    """Set up typer's completion if a completion script started this process."""
    if _VARIABLE in os.environ:
        _register_shells()


def _register_shells() -> None:
    """Register typer's own completion classes, which it does as a side effect of this call."""
    from typer import completion as typers

    typers.get_completion_inspect_parameters()


@app.command()
def completion(
    shell: Annotated[
        str,
        typer.Argument(help="Shell: bash, zsh or fish.", autocompletion=complete_with(*_SHELLS)),
    ],
) -> None:
    """Print the shell completion script.

    bash: add `source <(svfap completion bash)` to ~/.bashrc. zsh: add `source <(svfap completion
    zsh)` to ~/.zshrc, after compinit. fish: `svfap completion fish | source`.

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
    print(script.getvalue().strip())  # zsh requires #compdef on the first line
