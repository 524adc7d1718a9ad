"""The command line: `svfap <verb>`.

Start in `app`, which the verbs share; each other module has some of the verbs. They only translate
arguments into calls and errors into exit codes, and import heavy modules inside, which keeps
`svfap --help` fast.
"""

from __future__ import annotations

import io
import logging
import sys

from svfap_dist import logs
from svfap_dist.cli import (  # noqa: F401 - their verbs
    bench,
    checkpoints,
    completion,
    downstream,
    launch,
    models,
    monitoring,
    planning,
    serving,
    shards,
    training,
    use,
)
from svfap_dist.cli.app import app
from svfap_dist.cli.extras import missing_extra
from svfap_dist.errors import ConfigError, SvfapError
from svfap_dist.storage.credentials import refuse_credentials

log = logging.getLogger(__name__)


def main() -> None:
    """Run the command line and exit with the code of its error, if any."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    completion.answer_shells()
    try:
        _check_arguments()
        app()
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        log.error("%s", missing)
        sys.exit(missing.exit_code)
    except SvfapError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


def _check_arguments() -> None:
    """Refuse credentials before any verb or parser shows its arguments."""
    for number, argument in enumerate(sys.argv[1:], start=1):
        try:
            refuse_credentials(argument, f"argument {number}")
        except ConfigError:
            logs.set_up()  # which otherwise the verbs' group does
            raise
