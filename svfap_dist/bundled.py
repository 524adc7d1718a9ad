"""The files of launch/ and monitoring/, wherever the package runs from.

A wheel carries both folders as `svfap_dist/_bundled/`; in a checkout or an editable install they
lie beside the package.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Path of a bundled folder such as "launch/recipes"."""
    inside = _PACKAGE / "_bundled" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
