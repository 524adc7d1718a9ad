"""The command line: `svfap <verb>`.

Start in `app`, which the verbs share; each other module has some of the verbs. They only translate
arguments into calls and errors into exit codes, and import heavy modules inside, which keeps
`svfap --help` fast.
"""

from __future__ import annotations

import logging
import sys

from svfap_dist.cli import (  # noqa: F401 - their verbs
    bench,
    checkpoints,
    downstream,
    launch,
    models,
    monitoring,
    planning,
    shards,
    training,
    use,
)
from svfap_dist.cli.app import app
from svfap_dist.cli.extras import missing_extra
from svfap_dist.errors import SvfapError

log = logging.getLogger(__name__)


def main() -> None:
    """Run the command line and exit with the code of its error, if any."""
    try:
        app()
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        log.error("%s", missing)
        sys.exit(missing.exit_code)
    except SvfapError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)
