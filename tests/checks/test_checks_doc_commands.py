"""The commands of the documents and of each verb's help: accounted for, and right."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import doc_commands
import pytest
from doc_commands import Fence
from project_files import PACKAGES, ROOT, python_files

from svfap_dist.config import recipe

_FENCES = list(doc_commands.fences())
_COMMANDS = [
    command
    for fence in _FENCES
    if fence.language in ("", "sh")
    for command in doc_commands.commands(fence)
]


def _at(path: str, line: int, text: str) -> str:
    return f"{path}:{line} {text[:60]}"


def test_every_fence_is_accounted_for():
    """Also: no fence that the pattern overlooks, no comment that it does not understand."""
    for path in doc_commands.documents():
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        marks = len(re.findall(r"^ *```", text, re.MULTILINE))
        assert marks == 2 * sum(fence.path == name for fence in _FENCES), name
        comments = len(re.findall(r"^ *<!-- *needs", text, re.MULTILINE))
        understood = sum(
            len(doc_commands.NEEDS.findall(fence.comments))
            for fence in _FENCES
            if fence.path == name
        )
        assert comments == understood, name
    accounts = doc_commands.account()
    assert {each.state for each in accounts if each.state.startswith("run by")} == {
        "run by tests/test_extending.py"
    }
    assert sum(each.state == doc_commands.RUN for each in accounts) >= 20
    for page, test in doc_commands.OTHER_TESTS.items():
        assert page in (ROOT / test).read_text()


def test_a_mark_names_a_command_that_is_there():
    for fence in (fence for fence in _FENCES if fence.language in ("", "sh")):
        texts = [command.text for command in doc_commands.commands(fence)]
        for _, beginnings in doc_commands.NEEDS.findall(fence.comments):
            for prefix in beginnings.split(" | ")[1:]:
                assert any(text.startswith(prefix) for text in texts), f"{fence.path}: {prefix}"


@pytest.mark.parametrize("command", _COMMANDS, ids=lambda c: _at(c.path, c.line, c.text))
def test_a_documents_command_is_one_that_exists(command: doc_commands.Command):
    assert doc_commands.problem(command) == ""


@pytest.mark.parametrize(
    "fence",
    [fence for fence in _FENCES if fence.language == "toml"],
    ids=lambda fence: _at(fence.path, fence.line, fence.text),
)
def test_a_documents_recipe_loads(fence: Fence, tmp_path: Path):
    (tmp_path / "own.toml").write_text(fence.text)
    recipe.load(str(tmp_path / "own.toml"))


_VERBS = dict(doc_commands.all_verbs())


@pytest.mark.parametrize("verb", _VERBS)
def test_the_example_of_a_verbs_help_parses(verb: str):
    examples = doc_commands.help_examples(_VERBS[verb])
    assert examples
    for example in examples:
        assert example.startswith(f"{verb}")
        fence = Fence(verb, 0, "sh", example, "")
        for command in doc_commands.commands(fence):
            assert doc_commands.problem(command) == ""


def test_calls_named_in_texts_exist():
    """In documents, in help and in the advice of errors: their verbs and options."""
    texts = {path.name: path.read_text() for path in doc_commands.documents()}
    texts = {
        name: re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
        for name, text in texts.items()
    }
    for file in python_files(ROOT, *PACKAGES):
        strings = (node for node in ast.walk(file.tree) if isinstance(node, ast.Constant))
        texts[file.path] = "\n\n".join(s.value for s in strings if isinstance(s.value, str))
    problems = [
        f"{name}: `{mention}`: {problem}"
        for name, text in texts.items()
        for mention in doc_commands.mentions(text)
        if (problem := doc_commands.mention_problem(mention))
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("svfap pretrain tiny_cp data.url=a", "did you mean tiny_cpu"),
        ("svfap pretrain tiny_cpu data.ur=a", "did you mean url"),
        ("svfap pretrain tiny_cpu train.max_steps=few", "train.max_steps"),
        ("svfap report runs/a --outptu r.html", "--outptu"),
        ("svfap report", "Missing parameter: run_url"),
        ("svfap launch mars tiny_cpu", "no verb svfap launch mars"),
        ("svfap plan tiny_cpu --gpu h1000", "--gpu h1000"),
        ("svfap shard betamax in out", "betamax"),
        ("svfap finetune finetune_dfew \\\n  --on mars", "--on mars"),
        ("svfap sweep tiny_cpu --axis mask.ration=0.5,0.9", "did you mean ratio"),
        ("torchrun --nproc-per-node 2 -m svfap_dist pretrain tiny_cpu data.ur=a", "url"),
        ("torchrun --nproc-per-node 2 -m svfap pretrain tiny_cpu", "runs svfap"),
        ("svfap extract RUN VIDEO... -o x.npz [--step FRAMES] [--regin center|full]", "--regin"),
        ("make everything", "no target everything"),
        ("make chaos CHAOS='--kils 20'", "--kils"),
        ("pip install '.[trian]'", "no extra trian"),
        ("python tests/gone.py", "gone.py"),
        ("docker run x", "docker"),
    ],
)
def test_a_wrong_command_is_found(text: str, words: str):
    (command,) = doc_commands.commands(Fence("x.md", 1, "", text, ""))
    assert words in doc_commands.problem(command)


def test_lines_comments_loops_and_marks_are_read():
    text = (
        "# a comment, it's long\n"
        "cd docs   # the folder\n"
        "svfap faces a b && svfap shards show b\n"
        "for fold in 1 2; do\n"
        "  svfap report runs/$fold \\\n"
        "    -o 'a b.html'\n"
        "done\n"
        "svfap plan RECIPE data.url=...\n"
    )
    fence = Fence("x.md", 10, "", text, "<!-- needs: eyes; two | svfap shards -->\n")
    found = list(doc_commands.commands(fence))
    assert [(c.line, c.text) for c in found] == [
        (13, "svfap faces a b"),
        (13, "svfap shards show b"),
        (16, "svfap report runs/1 -o 'a b.html'"),
        (18, "svfap plan RECIPE data.url=..."),
    ]
    assert [c.needs for c in found] == ["", "eyes; two", "", doc_commands.ABBREVIATED]
    assert {c.folder for c in found} == {"docs"}


@pytest.mark.parametrize(
    ("mention", "problem"),
    [
        ("svfap demo", ""),
        ("svfap shards", ""),
        ("svfap VERB --x", ""),
        ("svfap --quiet demo", ""),
        ("svfap shards verify --fast", "svfap shards verify has no option --fast"),
        ("svfap bench model --compile", ""),
        ("svfap trian", "no verb svfap trian"),
    ],
)
def test_a_call_in_a_text_is_read(mention: str, problem: str):
    assert doc_commands.mention_problem(mention) == problem


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_documents_commands_run(tmp_path: Path):
    """Those without a mark; `doc_runs` says with which inputs."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/checks/doc_runs.py", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    runs = [each for each in doc_commands.account() if each.state == doc_commands.RUN]
    recipes = sum(each.kind == "toml" for each in runs)
    assert f"doc_runs: {len(runs) - recipes} run, 0 failed" in done.stdout
