"""Training steps of another checkout of this repository, to take turns with this one's.

Python finds the other checkout's modules by PYTHONPATH, in a new process. Only names that have not
changed since the first comparisons are used of it: `bench.steps.TrainingStep` and its description.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from svfap_dist.errors import ClusterError, ConfigError

_SERVE_STEPS = """
import json, sys
from svfap_dist.allocator import keep_freed_memory
from svfap_dist.bench import steps

options = json.loads(sys.argv[1])
if options["device"] == "cpu":
    keep_freed_memory()
describe = getattr(steps, "StepSpec", None) or steps.Spec
step = steps.TrainingStep(describe(**options))
for _ in sys.stdin:
    print(json.dumps(step.run()), flush=True)
"""


class CheckoutSteps:
    """A process that takes steps with the modules of another checkout; a context manager.

    Args:
        checkout: its folder.
        options: fields of `bench.steps.StepSpec`.

    Raises:
        ConfigError: there is no checkout of this repository.
    """

    def __init__(self, checkout: str, options: dict[str, Any]) -> None:
        if not os.path.isdir(os.path.join(checkout, "svfap_dist")):
            advice = "make one with `git worktree add FOLDER COMMIT`"
            raise ConfigError("Not a checkout of this repository", "--against", checkout, advice)
        self._checkout = checkout
        # -P: without the current folder, which may hold this checkout's modules.
        self._process = subprocess.Popen(  # noqa: S603 - the user's own code
            [sys.executable, "-P", "-c", _SERVE_STEPS, json.dumps(options)],
            env=os.environ | {"PYTHONPATH": os.path.abspath(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> CheckoutSteps:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def step(self) -> tuple[float, float]:
        """Take a step; return its seconds, and the loss before it.

        Raises:
            ClusterError: its process dies.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            print(file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = self._process.communicate()[1].strip()
            found = said.splitlines()[-1] if said else f"exit code {self._process.returncode}"
            do = "run `svfap bench model` in that checkout to see the whole error"
            raise ClusterError("Benchmark step failed", self._checkout, found, do)
        seconds, loss = json.loads(answer)
        return seconds, loss
