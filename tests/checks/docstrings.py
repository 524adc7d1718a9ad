"""Find public functions whose parameters are not documented, and packages without a docstring.

Public is what has no leading underscore in its own name or its class's. Each such function or
method with parameters needs an `Args:` section (google convention) with one entry per parameter,
and no entry for a parameter that it does not have. Exempt are commands of the command line (their
help documents them), properties, overloads, functions inside functions, parameters that begin with
an underscore, and implementations of a documented base, whose docstring begins with "See `".
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from project_files import PACKAGES, SourceFile, arguments, python_files

_EXEMPT = {"command", "callback", "overload", "property", "cached_property", "setter"}
_ENTRY = re.compile(r"(\s+)\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*\S")  # an empty one says nothing
_SECTION = re.compile(r"\s*(?:Args|Arguments):\s*$")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Finding:
    """One function or package that lacks something."""

    room: str
    place: str
    text: str


def _decorators(function: Function) -> set[str]:
    nodes = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {ast.unparse(node).split(".")[-1] for node in nodes}


def _parameters(function: Function, in_class: bool) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    if in_class and "staticmethod" not in _decorators(function):
        names = names[1:]
    names += [argument.arg for argument in given.kwonlyargs]
    names += [argument.arg for argument in (given.vararg, given.kwarg) if argument]
    return [name for name in names if not name.startswith("_")]


def documented(docstring: str) -> list[str]:
    """Return the names of the entries of a docstring's `Args:` section.

    Args:
        docstring: Its text without the indentation of the code around it.
    """
    lines = docstring.splitlines()
    start = next((n for n, line in enumerate(lines, 1) if _SECTION.match(line)), len(lines))
    found: list[str] = []
    indent = ""
    for line in lines[start:]:
        if line.strip() and not line.startswith(" "):
            break  # the next section
        entry = _ENTRY.match(line)
        if entry and entry[1] == (indent or entry[1]):
            indent = entry[1]
            found.append(entry[2])
    return found


def functions(file: SourceFile) -> Iterator[tuple[Function, str, bool]]:
    """Yield public functions of a file with their qualified name and whether they are methods.

    Args:
        file: A Python file.
    """
    classes: list[tuple[ast.Module | ast.ClassDef, str]] = [(file.tree, "")]
    while classes:
        owner, prefix = classes.pop(0)
        # Functions under `if` or `try` at the top of a module or class are its functions too.
        nodes: list[ast.AST] = list(owner.body)
        while nodes:
            node = nodes.pop(0)
            if isinstance(node, Function):
                if not node.name.startswith("_"):
                    yield node, prefix + node.name, isinstance(owner, ast.ClassDef)
            elif isinstance(node, ast.ClassDef):
                if not node.name.startswith("_"):
                    classes.append((node, f"{prefix}{node.name}."))
            elif isinstance(node, ast.stmt | ast.ExceptHandler):
                nodes += ast.iter_child_nodes(node)


def examine(file: SourceFile) -> tuple[int, list[Finding]]:
    """Return how many functions of a file need documented parameters, and what is missing.

    Args:
        file: A Python file.
    """
    count, found = 0, []
    if file.is_package and not ast.get_docstring(file.tree):
        found.append(Finding(file.room, f"{file.path}:1", "package without a docstring"))
    for function, name, in_class in sorted(functions(file), key=lambda found: found[0].lineno):
        parameters = _parameters(function, in_class)
        docstring = ast.get_docstring(function) or ""
        if not parameters or _decorators(function) & _EXEMPT or docstring.startswith("See `"):
            continue
        count += 1
        entries = documented(docstring)
        missing = [f"no entry for {p}" for p in parameters if p not in entries]
        stale = [f"entry for unknown {e}" for e in entries if e not in parameters]
        problem = "; ".join(["no docstring"] if not docstring else missing + stale)
        if problem:
            found.append(Finding(file.room, f"{file.path}:{function.lineno}", f"{name}: {problem}"))
    return count, found


def main(argv: list[str] | None = None) -> int:
    """Print what was found and return the exit code.

    Args:
        argv: Arguments of the command line.
    """
    parser = arguments(__doc__)
    parser.add_argument("--by-room", action="store_true", help="print counts per folder only")
    parser.add_argument("--under", default="", help="print findings below this path only")
    options = parser.parse_args(argv)
    total: Counter[str] = Counter()
    findings: dict[str, list[Finding]] = defaultdict(list)
    for file in python_files(options.root, *PACKAGES):
        count, found = examine(file)
        total[file.room] += count
        findings[file.room] += found
    if options.by_room:
        for room in sorted(total):
            print(f"  {room:40}{len(findings[room]):5} findings, {total[room]:4} functions")
    else:
        for finding in (finding for room in sorted(findings) for finding in findings[room]):
            if finding.place.startswith(options.under):
                print(f"{finding.place}: {finding.text}")
    number = sum(len(found) for found in findings.values())
    print(f"docstrings: {number} findings in {total.total()} public functions with parameters")
    return int(number > 0)


if __name__ == "__main__":
    sys.exit(main())
