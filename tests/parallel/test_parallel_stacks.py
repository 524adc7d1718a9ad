"""Stacks of this process and of one that hangs."""

from __future__ import annotations

import os
import threading

import pytest
from child_calls import behave

from svfap_dist.parallel import stacks
from svfap_dist.parallel.processes import ChildProcess, CrashedError


def test_a_frame_of_this_package_is_found_in_the_own_stacks() -> None:
    text = stacks.own_stacks()
    here = [f for f in stacks.frames(text) if f.thread == threading.get_ident()]
    assert [(frame.function, str(frame).split(":")[0]) for frame in here] == [
        ("own_stacks", "parallel/stacks.py")
    ]
    assert "MainThread" in text


def test_a_child_tells_where_it_hangs() -> None:
    with ChildProcess(behave, seconds=60) as child:
        pid = child("pid")

        def hang() -> None:
            with pytest.raises(CrashedError):
                child("hang")

        thread = threading.Thread(target=hang, daemon=True)
        thread.start()
        text = ""
        while "in behave" not in text:  # it may not have begun yet
            text = stacks.stacks_of_children()
        assert f"Process {pid}," in text
        assert "child_calls.py" in text
        child.kill()
        thread.join()


def test_the_state_of_a_process() -> None:
    assert stacks.state_of(os.getpid()) in ("R", "S")
    assert stacks.state_of(2**22 + 1) == ""
