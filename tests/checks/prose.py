"""Count turns of phrase that engineers do not use, per 10,000 words of docstrings and comments.

The check fails above `LIMIT` in the docstrings and comments of the two packages; the other rows
(strings of errors, help and log lines, documents, comments of recipes, tests) are printed beside
it. At commit f84d50d the packages had 76 per 10,000; model codebases of the field have 0 to 8.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from project_files import PACKAGES, arguments, python_files

LIMIT = 5.0
GATED = "docstrings and comments"
_PHRASES = (
    r"(?:no|any|some|every)body|whoever|tells?|told|telling|ask(?:s|ed|ing)? for|anew|"
    r"mend(?:s|ed|ing)?|of no use|(?:go|goes|going|went|gone) on|lets? (?:\w+ )?go|so many|"
    r"by (?:itself|themselves)|"
    r"lies?|lay|lain|lying|hand(?:s|ed|ing)? (?:in|out|over|on)|at hand|tak(?:e|es|en|ing) for|"
    r"foretells?|foretold|stands?|stood|standing|of (?:our|your|their)s"
)
# Between the words of a phrase a line may end, a paragraph may not.
PHRASE = re.compile(rf"\b(?:{_PHRASES})\b".replace(" ", r"(?: +| *\n *)"), re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_SENTENCE_WORDS = 3  # a string of fewer words is a name or a key, not prose


@dataclass(frozen=True)
class Passage:
    """A stretch of prose: which row it counts for, where it begins, its lines."""

    row: str
    path: str
    line: int
    text: str


def _of_python(root: Path, folder: str, row: str, strings_row: str | None) -> Iterator[Passage]:
    for file in python_files(root, folder):
        docstrings = set()
        for node in ast.walk(file.tree):
            if not isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                continue
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(id(first.value))
                if isinstance(first.value.value, str):
                    yield Passage(row, file.path, first.value.lineno, first.value.value)
        # All comments as one text, each on its line of the file.
        comments = [""] * (file.text.count("\n") + 1)
        for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0] - 1] = token.string.lstrip("# ")
        yield Passage(row, file.path, 1, "\n".join(comments))
        for node in ast.walk(file.tree):
            if (
                strings_row
                and isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in docstrings
                and len(_WORD.findall(node.value)) >= _SENTENCE_WORDS
            ):
                yield Passage(strings_row, file.path, node.lineno, node.value)


def _of_documents(root: Path) -> Iterator[Passage]:
    folders = ("docs", "launch", "monitoring", ".github")
    paths = [
        *root.glob("*.md"),
        *(path for name in folders for path in (root / name).rglob("*.md")),
    ]
    for path in sorted(paths):
        yield Passage("documents", path.relative_to(root).as_posix(), 1, path.read_text("utf-8"))
    for path in sorted((root / "docs").rglob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        yield Passage("documents", path.relative_to(root).as_posix(), 1, text)


def _of_recipes(root: Path) -> Iterator[Passage]:
    for path in sorted((root / "launch").rglob("*.toml")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if "#" in line:
                name = path.relative_to(root).as_posix()
                yield Passage("recipes", name, number, line.partition("#")[2])


def passages(root: Path) -> Iterator[Passage]:
    """Yield all prose of the tree, in the order in which the rows are printed."""
    for package in PACKAGES:
        yield from _of_python(root, package, GATED, "strings")
    yield from _of_documents(root)
    yield from _of_recipes(root)
    yield from _of_python(root, "tests", "tests", None)


def _rate(hits: int, words: int) -> float:
    return 1e4 * hits / words if words else 0.0


def _folder(path: str) -> str:
    return "/".join(path.split("/")[:-1][:2]) or "."


def main(argv: list[str] | None = None) -> int:
    """Print the rates of all rows and return the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="print the lines, by folder")
    parser.add_argument("--row", help="print lines and folders of this row only, as 'documents'")
    options = parser.parse_args(argv)
    words: dict[str, Counter[str]] = defaultdict(Counter)
    hits: dict[str, Counter[str]] = defaultdict(Counter)
    phrases: Counter[str] = Counter()
    lines: list[str] = []
    for passage in passages(options.root):
        folder = _folder(passage.path)
        words[passage.row][folder] += len(_WORD.findall(passage.text))
        for match in PHRASE.finditer(passage.text):
            hits[passage.row][folder] += 1
            phrase = " ".join(match.group().lower().split())
            phrases[phrase] += passage.row == GATED
            line = passage.line + passage.text.count("\n", 0, match.start())
            shown = passage.text.splitlines()[line - passage.line].strip()
            if options.row in (None, passage.row):
                lines.append(f"{passage.path}:{line}: [{phrase}] {shown}")
    if options.verbose:
        print("\n".join(sorted(lines)))
    for row, counts in words.items():
        if options.verbose and options.row in (None, row):
            for folder in sorted(counts, key=lambda f: -hits[row][f]):
                print(f"  {row:24}{folder:34}{hits[row][folder]:5} in {counts[folder]:6} words")
    for row, counts in words.items():
        total, found = counts.total(), hits[row].total()
        print(
            f"prose: {row:24}{found:5} in {total:6} words = {_rate(found, total):5.1f} per 10,000"
        )
    if options.verbose:
        print("prose: most frequent: " + ", ".join(f"{p} {n}" for p, n in phrases.most_common(12)))
    rate = _rate(hits[GATED].total(), words[GATED].total())
    if rate > LIMIT:
        print(f"prose: more than {LIMIT:g} per 10,000 in {GATED}; -v prints the lines")
    return int(rate > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
