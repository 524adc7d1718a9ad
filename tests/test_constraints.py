"""The pinned environment installs on the oldest Python that README names, as Debian 12 has it."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from packaging.specifiers import SpecifierSet

PINS = Path(__file__).parents[1] / "constraints.txt"
OLDEST = "3.11.2"  # pip refuses releases that need a later one, and then the whole installation


def test_every_pin_installs_on_the_oldest_python():
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", PINS.read_text(), re.MULTILINE))
    checked, too_new = 0, []
    for installed in importlib.metadata.distributions():
        if pins.get(installed.name) == installed.version:
            checked += 1
            needs = installed.metadata.get("Requires-Python") or ""
            if not SpecifierSet(needs).contains(OLDEST):
                too_new.append(f"{installed.name} {installed.version} needs Python {needs}")
    assert checked > 100
    assert too_new == []
