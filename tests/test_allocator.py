"""Freed memory stays in the process, measured by page faults in a new process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from svfap_dist import allocator

_FAULTS = """
import resource, sys, threading, torch
from svfap_dist import allocator
if sys.argv[1] == "keep":
    assert allocator.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(24 << 20)  # 96 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def median():
    # At first small blocks settle where a large one was, which then goes elsewhere.
    print(sorted(faults() for _ in range(24))[12])

if sys.argv[2] == "thread":
    thread = threading.Thread(target=median)
    thread.start()
    thread.join()
else:
    median()
"""


def _faults(how: str, where: str = "first", **variables: str) -> int:
    command = [sys.executable, "-c", _FAULTS, how, where]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment | variables
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_a_block_freed_and_asked_for_again_costs_no_page_faults() -> None:
    assert _faults("keep") < 100
    assert _faults("leave") > 1000  # 24576 pages of 4 KiB, fewer where pages are larger


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_so_it_is_in_a_thread_of_a_process_with_one_arena() -> None:
    assert _faults("keep", "thread", **allocator.ONE_ARENA) < 100
    assert _faults("keep", "thread") > 1000  # why it takes the variable
