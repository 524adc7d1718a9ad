"""Memory, threads and descriptors of a run do not grow with its steps.

The full form is 10,000 steps by hand, see flat_run.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 1500
# Growth from the middle to the end: of what is in use, far less than a batch per step, which are
# 12 KB; a heap also grows by fragments (data/flat_memory.py).
IN_USE, RESIDENT, CHILDREN_RESIDENT = 2 << 20, 16 << 20, 32 << 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_of_many_steps_keeps_its_size() -> None:
    here = Path(__file__).parent
    paths = [str(here.parent), str(here.parent / "data"), *sys.path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(here / "flat_run.py"), str(STEPS)]
    text = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    rows = [json.loads(line) for line in text.decode().splitlines() if line.startswith("{")]
    middle, last = rows[len(rows) // 2], rows[-1]
    assert last["step"] > 0.9 * STEPS
    for name in ("threads", "descriptors", "children", "children_threads", "children_descriptors"):
        assert last[name] == middle[name], name
    for name, limit in (
        ("in_use", IN_USE),
        ("resident", RESIDENT),
        ("children_resident", CHILDREN_RESIDENT),
    ):
        assert last[name] - middle[name] < limit, name
