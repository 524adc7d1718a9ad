"""Freed memory stays in the process: told by page faults, in a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from svfap_dist.train import allocator
if sys.argv[1] == "keep":
    assert allocator.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# At first small blocks settle where a large one was, which then goes elsewhere.
print(sorted(faults() for _ in range(60))[30])
"""


def _faults(how: str) -> int:
    command = [sys.executable, "-c", _FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_a_block_freed_and_asked_for_again_costs_no_page_faults() -> None:
    assert _faults("keep") < 100
    assert _faults("leave") > 1000  # 16384 pages of 4 KiB, fewer where pages are larger
