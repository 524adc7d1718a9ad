"""SVFAP (arXiv 2401.00416): pre-training, fine-tuning and use of facial-affect video models.

Most programs need `load` and `extract` only; `HubNetwork` has Hugging Face's `from_pretrained`. All
are imported on first use, so that importing the package is fast. `__version__` is that of the
installed distribution. docs/architecture.md describes the subpackages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svfap_dist.inference.extract import extract
    from svfap_dist.inference.hub import HubNetwork
    from svfap_dist.inference.load import load

    __version__: str

__all__ = ["HubNetwork", "extract", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from svfap_dist.inference.load import load

        return load
    if name == "extract":
        from svfap_dist.inference.extract import extract

        return extract
    if name == "HubNetwork":
        from svfap_dist.inference.hub import HubNetwork

        return HubNetwork
    if name == "__version__":
        from importlib import metadata

        return metadata.version("svfap-dist")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
