"""The files of launch/ and monitoring/, wherever the package runs from.

A wheel carries both folders as `svfap_dist/_bundled/`; in a checkout or an editable install they
lie beside the package.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

FOLDERS = ("launch", "monitoring")

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Path of a bundled folder such as "launch/recipes"."""
    inside = _PACKAGE / "_bundled" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def copy(out: Path, folders: Iterable[str] = FOLDERS) -> list[Path]:
    """Copy bundled folders to `out`/<folder>, leaving alone what is there; the files written."""
    written = []
    for name in folders:
        for source in sorted(folder(name).rglob("*")):
            target = out / name / source.relative_to(folder(name))
            if source.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
                written.append(target)
    return written
