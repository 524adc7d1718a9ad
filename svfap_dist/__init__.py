"""SVFAP (arXiv 2401.00416): pre-training, fine-tuning and use of facial-affect video models.

`load` and `extract` are what most programs want; importing this package alone imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svfap_dist.inference.extract import extract
    from svfap_dist.inference.load import load

__all__ = ["extract", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from svfap_dist.inference.load import load

        return load
    if name == "extract":
        from svfap_dist.inference.extract import extract

        return extract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
