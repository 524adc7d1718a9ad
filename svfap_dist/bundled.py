"""Locate the files of launch/ and monitoring/, in a wheel or a checkout.

A wheel has both folders in `svfap_dist/_bundled/`; in a checkout or an editable install they are
beside the package.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

FOLDERS = ("launch", "monitoring")

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Return the path of a bundled folder.

    Args:
        name: Relative path, such as "launch/recipes".
    """
    inside = _PACKAGE / "_bundled" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def copy(out: Path, folders: Iterable[str] = FOLDERS) -> list[Path]:
    """Copy bundled folders to `out`/<folder>, without overwriting, and return the new files.

    Args:
        out: Target folder.
        folders: Relative paths of bundled folders.
    """
    written = []
    for name in folders:
        for source in sorted(folder(name).rglob("*")):
            target = out / name / source.relative_to(folder(name))
            if source.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
                written.append(target)
    return written
