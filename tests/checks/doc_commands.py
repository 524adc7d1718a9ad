"""List every fenced command and example of the documents, and whether a test runs it, or why not.

Each fence of README.md, CONTRIBUTING.md, launch/README.md and docs/ is of one of these kinds:

    no language, or sh   commands. Each is checked against what it calls: the command line's own
                         parser, the recipe loader, the Makefile, the extras of pyproject.toml
    python, toml         an example: a test runs it; a recipe is loaded
    text, bibtex         output, or a file's content

A command is also run (`doc_runs.py`), unless a comment above its fence names what it needs:

    <!-- needs: a cluster -->                              all commands of the fence
    <!-- needs: a browser | svfap serve -->                those that begin with that
    <!-- needs: a GPU | svfap pretrain | svfap doctor -->  the same with several beginnings

or the command is abbreviated: it has an ellipsis or options in brackets.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from project_files import ROOT, arguments

RUN = "run"
ABBREVIATED = "a call in full: it is abbreviated"
# Pages whose examples a test of their own runs.
OTHER_TESTS = {"docs/extending.md": "tests/test_extending.py"}
_COMMANDS, _EXAMPLES, _CONTENT = ("", "sh"), ("python", "toml"), ("text", "bibtex")
_FENCE = re.compile(
    r"(?P<comments>(?:^ *<!--[^\n]*-->\n)*)^(?P<indent> *)```(?P<language>[^\n]*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NEEDS = re.compile(r"<!-- needs: ([^|]+?)((?: \| [^|]+?)*) -->")
_ELLIPSIS = ("...", "…")
# What words in capitals are replaced with before a command is parsed.
_PLACEHOLDERS = {"RECIPE": "tiny_cpu", "FRAMES": "16", "N": "2"}


@dataclasses.dataclass(frozen=True)
class Fence:
    """A fence of a document: its first line, language, text, and the comments above it."""

    path: str
    line: int
    language: str
    text: str
    comments: str
    folder: str = ""  # into which an earlier fence of the document changed

    def needs(self, command: str = "") -> str:
        """Return what the command, or the whole fence, needs; empty if nothing."""
        for reason, beginnings in NEEDS.findall(self.comments):
            prefixes = beginnings.split(" | ")[1:]
            if not prefixes or command.startswith(tuple(prefixes)):
                return reason
        return ""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a fence, its words as a shell splits them, in a folder of the repository."""

    path: str
    line: int
    words: tuple[str, ...]
    needs: str
    folder: str = ""

    @property
    def text(self) -> str:
        """The command as it can be typed."""
        return shlex.join(self.words)


def documents(root: Path = ROOT) -> list[Path]:
    """Return the documents whose fences are accounted for."""
    named = [root / name for name in ("README.md", "launch/README.md", "CONTRIBUTING.md")]
    return [*named, *sorted((root / "docs").rglob("*.md"))]


def fences(root: Path = ROOT) -> Iterator[Fence]:
    """Yield the fences of all documents."""
    for path in documents(root):
        text = path.read_text("utf-8")
        name, folder = path.relative_to(root).as_posix(), ""
        for found in _FENCE.finditer(text):
            line = text.count("\n", 0, found.start("language")) + 1
            body = found["text"].replace("\n" + found["indent"], "\n").removeprefix(found["indent"])
            language = found["language"].strip()
            yield Fence(name, line, language, body, found["comments"], folder)
            folder = [folder, *re.findall(r"^cd (\S+)", body, re.MULTILINE)][-1]


def commands(fence: Fence) -> Iterator[Command]:
    """Yield the commands of a fence in order; a loop's body once, with its first value."""
    folder = fence.folder
    variables: dict[str, str] = {}
    pending = ""
    for line, row in enumerate(fence.text.splitlines(), fence.line + 1):
        pending += row
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        for words in _simple_commands(pending, variables):
            if words[0] == "cd":
                folder = words[1]
                continue
            command = Command(fence.path, line, tuple(words), "", folder)
            needs = fence.needs(command.text) or (ABBREVIATED if _is_abbreviated(words) else "")
            yield dataclasses.replace(command, needs=needs)
        pending = ""


def _simple_commands(row: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """Yield the words of each command of a line; add a loop's variable to `variables`."""
    is_synopsis = " [-" in row  # there | separates choices, and is no pipe
    lexer = shlex.shlex(row, posix=True, punctuation_chars="" if is_synopsis else "();<>|&")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set(";&|"):
            for name, value in variables.items():
                word = word.replace(f"${name}", value)  # noqa: PLW2901
            words.append(word)
            continue
        if words[:1] == ["do"]:
            del words[0]
        if words[:1] == ["for"]:
            variables[words[1]] = words[3]
        elif words and words[0] not in ("done", "wait"):
            yield words
        words = []


def _is_abbreviated(words: Iterable[str]) -> bool:
    return any(word.startswith("[-") or word.endswith(_ELLIPSIS) for word in words)


def _spelled_out(words: Iterable[str]) -> list[str]:
    """Return words that the parser takes: without brackets, ellipses, choices and variables."""
    found: list[str] = []
    in_brackets = False
    for word in words:
        in_brackets |= word.startswith("[-")
        bare = word.strip("[]").partition("|")[0] if in_brackets else word
        in_brackets &= not word.endswith("]")
        if bare.isupper():
            bare = bare.removesuffix("...")
        if bare not in _ELLIPSIS:
            found.append(_PLACEHOLDERS.get(bare, bare))
        elif found[-1].startswith("--"):
            found.append("x")  # the option's value
    while re.fullmatch(r"[A-Z_]+=.*", found[0]):
        del found[0]
    return found


def problem(command: Command, root: Path = ROOT) -> str:
    """Return why a command cannot be right, empty if nothing is found; it is not run."""
    words = _spelled_out(command.words)
    try:
        match words:
            case ["svfap", *rest]:
                check_call(rest, root / command.folder)
            case ["torchrun", *rest]:
                check_call(torchrun_call(rest), root / command.folder)
            case ["make", target, *variables]:
                _check_make(target, variables, root)
            case ["pip", "install", what]:
                _check_install(what, root)
            case ["python", script, *rest]:
                _check_script(root / command.folder / script, rest)
            case [".venv/bin/pre-commit", "install"]:
                assert (root / ".pre-commit-config.yaml").exists(), "no .pre-commit-config.yaml"
            case ["export" | "cp" | "mkdir" | "curl" | "jq", *_]:
                pass
            case _:
                return f"not a command that the check knows: {words[0]}"
    except SystemExit as error:
        return f"refused with code {error.code}"
    except Exception as error:
        return str(error) or repr(error)
    return ""


def torchrun_call(words: list[str]) -> list[str]:
    """Return the arguments of `svfap` in those of torchrun, which its own parser reads."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.module, "-m is missing"
    assert options.training_script == "svfap_dist", f"runs {options.training_script}"
    return options.training_script_args


def check_call(words: list[str], folder: Path) -> None:
    """Parse arguments of `svfap` and load the recipe among them, as the verb would.

    Args:
        words: The arguments.
        folder: Where relative paths of recipes begin.

    Raises:
        Exception: Of the parser or of the recipe loader.
    """
    verb, parameters = parse_call(words)
    if parameters.get("source") is not None and verb == "svfap shard":
        from data_sharding.sources import find_source

        find_source(parameters["source"])
    if "gpu" in parameters:
        from svfap_dist.plan import devices

        assert parameters["gpu"] in devices.NAMES, f"--gpu {parameters['gpu']}: unknown"
    if "on" in parameters:
        known = ("srun", "ray") if verb == "svfap launch slurm" else ("local", "ray")
        assert parameters["on"] in known, f"--on {parameters['on']}: unknown"
    if "overrides" not in parameters:
        return
    name = parameters.get("name", "tiny_cpu")
    if not name:  # svfap doctor alone
        return
    if name.endswith(".toml"):
        name = str(folder / name)
    overrides = list(parameters["overrides"] or ())
    settings = parameters.get("settings") or () if verb == "svfap bench transfer" else ()
    for axis in parameters.get("axis") or ():
        overrides.append(f"{axis.partition('=')[0]}={axis.partition('=')[2].split(',')[0]}")
    from svfap_dist.config import recipe

    recipe.load(name, [*overrides, *(setting.partition(":")[2] for setting in settings)])


def parse_call(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the verb's full name and its parameters, as the command line parses them.

    Args:
        words: Arguments of `svfap`.

    Raises:
        Exception: Of the parser, for a verb or an option that does not exist.
    """
    command, name, words = _application(), "svfap", list(words)
    while hasattr(command, "list_commands"):
        assert words, f"{name}: a verb is missing"
        word = words.pop(0)
        found = command.get_command(None, word)
        assert found is not None, f"no verb {name} {word}"
        command, name = found, f"{name} {word}"
    return name, command.make_context(name, words).params


@functools.cache
def _application() -> Any:
    import typer

    from svfap_dist import cli

    return typer.main.get_command(cli.app)


def all_verbs() -> Iterator[tuple[str, Any]]:
    """Yield the full name and the command of each verb."""

    def below(group: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name in group.list_commands(None):
            command = group.get_command(None, name)
            if hasattr(command, "list_commands"):
                yield from below(command, f"{path} {name}")
            else:
                yield f"{path} {name}", command

    yield from below(_application(), "svfap")


def help_examples(command: Any) -> list[str]:
    """Return the examples in a verb's help, each on one line."""
    paragraphs = re.split(r"\n\s*\n", command.help or "")
    found = [p for p in paragraphs if p.lstrip().startswith("Example: ")]
    return [" ".join(p.split()).removeprefix("Example: ") for p in found]


def mentions(text: str) -> Iterator[str]:
    """Yield the calls of `svfap` that a text names between backticks."""
    for found in re.findall(r"(?<!`)`(svfap [^`]+)`(?!`)", text):
        yield " ".join(found.split())


def mention_problem(mention: str) -> str:
    """Return why a call named in a text is wrong: a verb or an option does not exist.

    Args:
        mention: `svfap`, a verb, and some of its arguments; several verbs as in `a|b`.
    """
    words = mention.split()[1:]
    options = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", mention))
    command, name = _application(), "svfap"
    while hasattr(command, "list_commands"):
        options -= {"--verbose", "--quiet", "--help"}
        while words and words[0].startswith("-"):
            del words[0]
        if not words or not re.fullmatch(r"[a-z]+", words[0]):
            return ""  # a group alone, or a placeholder
        if (found := command.get_command(None, words[0])) is None:
            return f"no verb {name} {words[0]}"
        command, name = found, f"{name} {words.pop(0)}"
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    unknown = sorted(options - known)
    return f"{name} has no option {', '.join(unknown)}" if unknown else ""


def _check_make(target: str, variables: list[str], root: Path) -> None:
    text = (root / "Makefile").read_text()
    assert re.search(rf"^{re.escape(target)}:", text, re.MULTILINE), f"no target {target}"
    for variable in variables:
        name, _, value = variable.partition("=")
        assert f"$({name})" in text, f"the Makefile does not use {name}"
        if name == "CHAOS":
            _check_script(root / "tests/chaos/chaos.py", value.split())


def _check_script(path: Path, words: list[str]) -> None:
    """Check that a script of the repository exists and defines the options it is called with."""
    text = path.read_text("utf-8")
    missing = [word for word in words if word.startswith("--") and f'"{word}"' not in text]
    assert not missing, f"{path.name} has no option {', '.join(missing)}"


def _check_install(what: str, root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    found = re.fullmatch(rf"(?:\.|{project['name']})(?:\[([\w,]+)\])?", what)
    assert found, f"not this package: {what}"
    extras = (found[1] or "").split(",") if found[1] else []
    unknown = set(extras) - set(project["optional-dependencies"])
    assert not unknown, f"no extra {', '.join(sorted(unknown))}"


@dataclasses.dataclass(frozen=True)
class Account:
    """What becomes of a command or an example: run, run by another test, or what it needs."""

    path: str
    line: int
    kind: str
    text: str
    state: str


def account(root: Path = ROOT) -> list[Account]:
    """Return what becomes of every command and example, in the order of the documents.

    Raises:
        ValueError: If a fence has a language that the check does not know.
    """
    found: list[Account] = []
    for fence in fences(root):
        at = (fence.path, fence.line)
        if fence.language in _COMMANDS:
            for command in commands(fence):
                state = f"needs {command.needs}" if command.needs else RUN
                found.append(Account(fence.path, command.line, "command", command.text, state))
        elif fence.language in _EXAMPLES:
            first = next(filter(None, fence.text.splitlines()), "")
            state = RUN
            if fence.path in OTHER_TESTS:
                state = f"run by {OTHER_TESTS[fence.path]}"
            elif fence.needs():
                state = f"needs {fence.needs()}"
            found.append(Account(*at, fence.language, first, state))
        elif fence.language not in _CONTENT:
            raise ValueError(f"{fence.path}:{fence.line}: unknown language {fence.language!r}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the accounts and their counts, and return the exit code."""
    options = arguments(__doc__).parse_args(argv)
    accounts = account(options.root)
    for each in accounts:
        print(f"{each.path}:{each.line}: [{each.state}] {each.text}")
    problems = [
        f"{command.path}:{command.line}: {found}: {command.text}"
        for fence in fences(options.root)
        if fence.language in _COMMANDS
        for command in commands(fence)
        if (found := problem(command, options.root))
    ]
    print("\n".join(problems))
    print(f"doc_commands: {len(accounts)} commands and examples, {len(problems)} wrong")
    for state, count in Counter(each.state for each in accounts).most_common():
        print(f"doc_commands: {count:4} {state}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
