"""List every error that users can meet, in its four parts, and check how it is worded.

Errors are found in the syntax trees of the packages: each call of `SvfapError` or of a class below
it. Names are followed to the texts they were given in the same function or module; what only a run
can know is shown in braces. Rules:

    what    a short sentence that begins in upper case and has no full stop
    where, found, do    given; errors of one video (`DecodeError`) go to a list of rejected videos,
                        with the video's name: they need no `where`, and `found` or `do`
    do      begins with something to do, a name to use, or what only a run can know
    all     no phrase that prose.py counts, no class or exception of ours, no Python values
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from project_files import PACKAGES, SourceFile, arguments, python_files
from prose import PHRASE

PARTS = ("what", "where", "found", "do")
_BASE, _OF_A_VIDEO = "SvfapError", "DecodeError"
_LONGEST_TITLE = 80
_PLACEHOLDER = re.compile(r"\{[^{}]*\}|`[^`]*`")  # what a run knows, and code
_INTERNAL = re.compile(
    r"\b(?:[A-Z]\w*(?:Error|Exception)|None(?:Type)?|Traceback|traceback|self\.\w+|kwargs?|"
    r"isinstance|__\w+__)\b"
)
_CLASS_NAME = re.compile(r"(?:[A-Z][a-z0-9]+){2,}")  # a word that is no word of prose


@dataclasses.dataclass(frozen=True)
class UserError:
    """An error as it is written in the code; texts of a run are in braces."""

    path: str
    line: int
    kind: str
    parts: Mapping[str, str]

    def __str__(self) -> str:
        rows = [f"  {name:6} {text}" for name, text in self.parts.items() if text]
        return "\n".join([f"{self.path}:{self.line}: {self.kind}", *rows])


class Project:
    """The syntax trees of the packages, and what names in them mean."""

    def __init__(self, root: Path) -> None:
        self.files = list(python_files(root, *PACKAGES))
        self._constants = {file.module: _assigned(file.tree) for file in self.files}
        self._imported = {file.module: dict(_imports(file.tree)) for file in self.files}
        self.classes = {
            node.name: [_last_name(base) for base in node.bases]
            for file in self.files
            for node in ast.walk(file.tree)
            if isinstance(node, ast.ClassDef)
        }

        # Classes whose constructors take other parameters and give the parts themselves.
        self._own_parameters = {
            node.name
            for file in self.files
            for node in ast.walk(file.tree)
            if isinstance(node, ast.ClassDef) and node.name != _BASE
            if any(
                isinstance(each, ast.FunctionDef) and each.name == "__init__" for each in node.body
            )
        }

    def is_below(self, name: str, base: str) -> bool:
        """Return whether a class is `base` or inherits from it."""
        above = [up for up in self.classes.get(name, ()) if up != name]
        return name == base or any(self.is_below(up, base) for up in above)

    def text(self, node: ast.expr | None, scope: Mapping[str, ast.expr], module: str) -> str:
        """Return the text of an expression, with what only a run knows in braces."""
        parts: list[ast.expr] = []
        between = ""
        match node:
            case None:
                return ""
            case ast.Constant(value=str(value)):
                return value
            case ast.FormattedValue(value=value):
                return self._of_a_run(value, scope, module)
            case ast.JoinedStr(values=parts):
                pass
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                parts = [left, right]
            case ast.IfExp(body=body, orelse=other):
                parts, between = [body, other], " / "
            case ast.BoolOp(values=parts):
                between = " / "
            case _:
                return self._of_a_run(node, scope, module)
        return between.join(self.text(part, scope, module) for part in parts)

    def _of_a_run(self, node: ast.expr, scope: Mapping[str, ast.expr], module: str) -> str:
        if isinstance(node, ast.Name):
            if (value := scope.get(node.id)) is not None:
                outer = {name: each for name, each in scope.items() if name != node.id}
                return self.text(value, outer, module)
            if (value := self._constants[module].get(node.id)) is not None:
                return self.text(value, {}, module)
            origin, name = self._imported[module].get(node.id, ("", ""))
            if (value := self._constants.get(origin, {}).get(name)) is not None:
                return self.text(value, {}, origin)
        return f"{{{ast.unparse(node).replace('{', '(').replace('}', ')')}}}"

    def errors(self) -> Iterator[UserError]:
        """Yield all errors in the order of files and lines."""
        for file in self.files:
            found = list(self._errors_of(file, file.tree, {}))
            yield from sorted(found, key=lambda error: error.line)

    def _errors_of(
        self, file: SourceFile, node: ast.AST, scope: dict[str, ast.expr], owner: str = ""
    ) -> Iterator[UserError]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = child.name if isinstance(child, ast.ClassDef) else owner
                yield from self._errors_of(file, child, {}, inner)
                continue
            if isinstance(child, ast.For):
                _bind_loop(child, scope)
            # In the order of the text: a call sees the assignments above it.
            yield from self._errors_of(file, child, scope, owner)
            scope.update(_targets(child))
            if isinstance(child, ast.AugAssign) and isinstance(child.target, ast.Name):
                before = scope.get(child.target.id, child.target)
                scope[child.target.id] = ast.BinOp(before, ast.Add(), child.value)
            if isinstance(child, ast.Call):
                kind = _last_name(child.func)
                if kind == "__init__" and owner != _BASE:
                    kind = owner
                elif kind in self._own_parameters:
                    continue
                if kind == "ValueError" and file.module.startswith("svfap_dist.config"):
                    # Becomes the advice of "Wrong value".
                    advice = self.text(child.args[0], scope, file.module)
                    parts = {"what": "Wrong value", "where": "{key}", "found": "{value}"}
                    yield UserError(file.path, child.lineno, kind, {**parts, "do": advice})
                is_ours = self.is_below(kind, _BASE) and kind in self.classes
                if is_ours and not any(isinstance(each, ast.Starred) for each in child.args):
                    given = dict(zip(PARTS, child.args, strict=False))
                    given |= {word.arg: word.value for word in child.keywords if word.arg}
                    parts = {p: self.text(given.get(p), scope, file.module) for p in PARTS}
                    yield UserError(file.path, child.lineno, kind, parts)

    def problems(self, error: UserError) -> list[str]:
        """Return the rules that an error breaks, each with the text that breaks it."""
        found = []
        what, do = error.parts["what"], error.parts["do"]
        if not re.match(r"[A-Z{`0-9]", what) or what.endswith((".", "!")):
            found.append(f"what: not a short sentence without a full stop: {what}")
        if len(_PLACEHOLDER.sub("", what)) > _LONGEST_TITLE:
            found.append(f"what: too long: {what}")
        if self.is_below(error.kind, _OF_A_VIDEO):
            missing = [] if error.parts["found"] or do else ["found"]
        else:
            missing = [part for part in PARTS[1:] if not error.parts[part].strip()]
        found += [f"{part}: missing" for part in missing]
        if do and not re.match(r"[a-z`{]", do):
            found.append(f"do: not advice: {do}")
        for part, text in error.parts.items():
            plain = _PLACEHOLDER.sub(" ", text)
            words = [match.group() for match in PHRASE.finditer(plain)]
            words += [match.group() for match in _INTERNAL.finditer(plain)]
            words += [word for word in _CLASS_NAME.findall(plain) if word in self.classes]
            found += [f"{part}: {word!r} in: {text}" for word in words]
        return found


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _targets(node: ast.AST) -> dict[str, ast.expr]:
    """Return names and values of an assignment; a tuple's one by one."""
    if isinstance(node, ast.AnnAssign | ast.NamedExpr):
        targets, value = [node.target], node.value
    elif isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    else:
        return {}
    found: dict[str, ast.expr] = {}
    for target in targets:
        if isinstance(target, ast.Name) and value is not None:
            found[target.id] = value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = zip(target.elts, value.elts, strict=False)
            found |= {name.id: each for name, each in pairs if isinstance(name, ast.Name)}
    return found


def _bind_loop(loop: ast.For, scope: dict[str, ast.expr]) -> None:
    """Give the names of a loop their values if these are written down, all of them."""
    names = loop.target.elts if isinstance(loop.target, ast.Tuple) else [loop.target]
    rows = loop.iter.elts if isinstance(loop.iter, ast.Tuple | ast.List) else []
    for place, name in enumerate(names):
        if isinstance(name, ast.Name):
            scope.pop(name.id, None)
            values = [row.elts[place] for row in rows if isinstance(row, ast.Tuple)]
            if values:
                scope[name.id] = ast.BoolOp(ast.Or(), values)


def _assigned(tree: ast.Module) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        found |= _targets(node)
    return found


def _imports(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)


def main(argv: list[str] | None = None) -> int:
    """Print all errors, then those that break a rule, and return the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("-q", "--quiet", action="store_true", help="print broken rules only")
    options = parser.parse_args(argv)
    project = Project(options.root)
    errors = list(project.errors())
    if not options.quiet:
        print("\n".join(map(str, errors)))
    problems = [(error, text) for error in errors for text in project.problems(error)]
    for error, text in problems:
        print(f"{error.path}:{error.line}: {text}")
    print(f"user_errors: {len(errors)} errors, {len(problems)} broken rules")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
