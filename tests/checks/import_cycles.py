"""Find circular imports among the modules of the two packages, imports inside functions included.

An import counts for the file that holds the imported name: `from pkg import sub` is an import of
`pkg/sub.py`, and of `pkg/__init__.py` only where `__init__` defines the name; `import pkg.sub` is
one of `pkg/__init__.py` only if the file uses one of its names. Imports under `if TYPE_CHECKING:`
never run: circles that need them are counted but do not fail the check. `import_module("a.b")` is
an import; the names in tables of rows ("module:function") are not: a table may name what uses it.
"""

from __future__ import annotations

import ast
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from project_files import PACKAGES, SourceFile, arguments, python_files


@dataclass(frozen=True)
class Import:
    """One import statement that `importer` has of `imported`, both dotted module names."""

    importer: str
    imported: str
    place: str
    kind: str  # "top", "lazy" or "typing"


class Resolver:
    """Finds the module whose file holds what a name in a module means."""

    def __init__(self, files: list[SourceFile]) -> None:
        self.modules = {file.module: file for file in files}
        self._defined = {f.module: set(_defined(f)) for f in files if f.is_package}

    def descend(self, module: str, names: str) -> str | None:
        """Return where the attributes `names` ("a.b") of `module` lead; None: outside."""
        if module not in self.modules:
            return None
        for name in filter(None, names.split(".")):
            below = f"{module}.{name}"
            if below not in self.modules or name in self._defined.get(module, ()):
                return module
            module = below
        return module

    def reached(self, module: str | None, uses: set[str] | None) -> set[str | None]:
        """Return what a name bound to `module` reaches; for a package, by the names in use."""
        if module is None or not self.modules[module].is_package or not uses:
            return {module}
        return {self.descend(module, names) for names in uses}


def _defined(file: SourceFile) -> Iterator[str]:
    """Names that an `__init__` binds to something other than its own submodule of that name."""
    for node in file.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.ImportFrom) and _base(node, file) != file.module:
            yield from (alias.asname or alias.name for alias in node.names)


def _base(node: ast.ImportFrom, file: SourceFile) -> str:
    """The absolute name of the module after `from`."""
    if not node.level:
        return node.module or ""
    parts = file.module.split(".")
    parts = parts[: len(parts) - node.level + (1 if file.is_package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _statements(node: ast.AST, kind: str = "top") -> Iterator[tuple[ast.stmt, str]]:
    for child in ast.iter_child_nodes(node):
        below = kind
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, kind
        elif isinstance(child, ast.Call) and (name := _imported_by_call(child)):
            yield ast.Import([ast.alias(name, "_")], lineno=child.lineno), kind
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.body:
                yield from _statements(ast.Module([statement], []), "typing")
            for statement in child.orelse:
                yield from _statements(ast.Module([statement], []), kind)
            continue
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            below = "lazy" if kind == "top" else kind
        yield from _statements(child, below)


def _imported_by_call(call: ast.Call) -> str:
    """The module that `importlib.import_module("a.b")` or `__import__("a.b")` names, or ""."""
    function = ast.unparse(call.func).split(".")[-1]
    if function in ("import_module", "__import__") and call.args:
        name = call.args[0]
        return str(name.value) if isinstance(name, ast.Constant) else ""
    return ""


def _uses(tree: ast.Module) -> dict[str, set[str]]:
    """The dotted paths of attributes that a file reads, by the name that they start with."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        names: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            names.append(at.attr)
            at = at.value
        if isinstance(at, ast.Name) and names:
            found.setdefault(at.id, set()).add(".".join(reversed(names)))
    return found


def imports(files: list[SourceFile]) -> list[Import]:
    """Return the imports of project modules by project modules, each pair at its first place."""
    resolver = Resolver(files)
    found: dict[tuple[str, str, str], Import] = {}
    for file in files:
        uses = _uses(file.tree)
        for node, kind in _statements(file.tree):
            for target in _targets(node, file, resolver, uses) - {None, file.module}:
                assert target is not None
                edge = Import(file.module, target, f"{file.path}:{node.lineno}", kind)
                found.setdefault((file.module, target, kind), edge)
    return list(found.values())


def _targets(
    node: ast.stmt, file: SourceFile, resolver: Resolver, uses: dict[str, set[str]]
) -> set[str | None]:
    """The modules that one import statement imports."""
    found: set[str | None] = set()
    if isinstance(node, ast.ImportFrom):
        base = _base(node, file)
        for alias in node.names:
            target = resolver.descend(base, "" if alias.name == "*" else alias.name)
            is_module = target == f"{base}.{alias.name}"
            bound = uses.get(alias.asname or alias.name) if is_module else None
            found |= resolver.reached(target, bound)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            root = alias.name.split(".")[0]
            if alias.name not in resolver.modules:
                continue
            if alias.asname:
                found |= resolver.reached(alias.name, uses.get(alias.asname))
                continue
            # `import a.b` binds `a`: of what the file reads from `a`, `a.b.name` is read from a.b.
            within = {f"{root}.{names}" for names in uses.get(root, ())}
            own = {
                n.removeprefix(f"{alias.name}.") for n in within if n.startswith(alias.name + ".")
            }
            found |= resolver.reached(alias.name, own)
    return found


def circles(edges: list[Import]) -> list[list[Import]]:
    """Return a shortest circle through each strongly connected group of modules."""
    after: dict[str, list[Import]] = {}
    for edge in edges:
        after.setdefault(edge.importer, []).append(edge)
    found: list[list[Import]] = []
    seen: set[str] = set()
    for start in sorted(after):
        if start in seen:
            continue
        way = _way_back(start, after)
        if way:
            found.append(way)
            seen |= _reachable(start, after) & _reachable(start, _reversed(edges))
    return found


def _way_back(start: str, after: dict[str, list[Import]]) -> list[Import]:
    """The shortest way from a module to itself; empty if there is none."""
    ways: dict[str, list[Import]] = {start: []}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        for edge in after.get(at, []):
            if edge.imported == start:
                return [*ways[at], edge]
            if edge.imported not in ways:
                ways[edge.imported] = [*ways[at], edge]
                queue.append(edge.imported)
    return []


def _reversed(edges: list[Import]) -> dict[str, list[Import]]:
    before: dict[str, list[Import]] = {}
    for edge in edges:
        turned = Import(edge.imported, edge.importer, edge.place, edge.kind)
        before.setdefault(edge.imported, []).append(turned)
    return before


def _reachable(start: str, after: dict[str, list[Import]]) -> set[str]:
    found, queue = {start}, [start]
    while queue:
        for edge in after.get(queue.pop(), []):
            if edge.imported not in found:
                found.add(edge.imported)
                queue.append(edge.imported)
    return found


def main(argv: list[str] | None = None) -> int:
    """Print what was found and return the exit code."""
    options = arguments(__doc__).parse_args(argv)
    files = list(python_files(options.root, *PACKAGES))
    edges = imports(files)
    running = [edge for edge in edges if edge.kind != "typing"]
    found = circles(running)
    for number, way in enumerate(found, 1):
        print(f"circle {number}:")
        for edge in way:
            print(f"  {edge.place}: {edge.importer} -> {edge.imported} ({edge.kind})")
    lazy = sum(edge.kind == "lazy" for edge in edges)
    print(
        f"import_cycles: {len(files)} modules, {len(running)} imports ({lazy} inside functions), "
        f"{len(found)} circles; {len(circles(edges))} with TYPE_CHECKING counted too"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
