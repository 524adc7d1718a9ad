"""List and parse the Python files that the checks of this folder read."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("svfap_dist", "data_sharding")


@dataclass(frozen=True)
class SourceFile:
    """A Python file: its path relative to the root, dotted module name, text and syntax tree."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder that the file is counted under, at most two levels deep."""
        return "/".join(self.path.split("/")[:-1][:2])

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


def python_files(root: Path, *folders: str) -> Iterator[SourceFile]:
    """Yield the Python files below `folders` of `root` in the order of their paths."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            yield SourceFile(relative.as_posix(), module, text, ast.parse(text))


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with what all checks take: the root of the tree to read."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to read (default: this one)")
    return parser
