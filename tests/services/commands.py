"""Commands of real servers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence


def output_of(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """Standard output of a command, which must succeed.

    Args:
        command: Program and arguments.
        variables: Added to the environment.
    """
    done = subprocess.run(
        command,
        env=os.environ | dict(variables or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
