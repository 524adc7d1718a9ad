"""Run many `svfap` commands in one process, in order, as a shell script would.

Importing torch and DeepSpeed takes longer than most commands, so `run` starts one process in a
folder and gives each command its own exit code and output. Only the command line of svfap_dist is
used, so this works with any version: `make_data` records the old version's results with it, and the
tests compare the current version's with them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Finished:
    """Exit code and output of one command."""

    code: int
    stdout: str
    stderr: str


def run(
    commands: Mapping[str, Sequence[str]], folder: Path, environment: Mapping[str, str]
) -> dict[str, Finished]:
    """Run `svfap` in `folder` with each list of arguments; return the results by name."""
    with tempfile.TemporaryDirectory() as log:
        given, taken = Path(log, "commands.json"), Path(log, "finished.json")
        given.write_text(json.dumps(list(commands.values())))
        with open(Path(log, "process.log"), "w+") as output:
            process = subprocess.run(
                [sys.executable, __file__, str(given), str(taken)],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=280,
                check=False,
            )
            output.seek(0)
            assert process.returncode == 0, output.read()
        rows = json.loads(taken.read_text())
    return {name: Finished(*row) for name, row in zip(commands, rows, strict=True)}


def _one(arguments: Sequence[str]) -> Finished:
    """Run one command in this process with its standard streams redirected to files."""
    from svfap_dist import cli

    kept, environment = [os.dup(1), os.dup(2)], dict(os.environ)
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        try:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.argv = ["svfap", *arguments]
            try:
                cli.main()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            # A command sets RANK and MASTER_PORT for itself; the next one must not inherit them.
            os.environ.clear()
            os.environ |= environment
        stdout.seek(0)
        stderr.seek(0)
        return Finished(code, stdout.read(), stderr.read())


def main() -> None:
    """Run the commands listed in one JSON file and write their results to another."""
    given, taken = sys.argv[1:]
    rows = [dataclasses.astuple(_one(each)) for each in json.loads(Path(given).read_text())]
    Path(taken).write_text(json.dumps(rows))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo sometimes aborts at interpreter exit


if __name__ == "__main__":
    main()
