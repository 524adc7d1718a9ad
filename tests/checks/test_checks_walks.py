"""The count of files on a walk, on a small package with a thread, a process and detours."""

from __future__ import annotations

from pathlib import Path

import pytest
import walks

_FILES = {
    "__init__": "",
    "config": "def value(): pass",
    "never": "def unused(): pass",
    "before": "def prepare(): pass",
    "after": "def finish(): pass",
    "aside": """
def made_at_import(): pass
made_at_import()
def clean(): pass
""",
    "loop": """
from svfap_dist import before, step
class _Cleaner:
    def __enter__(self): pass
    def __exit__(self, *_):
        from svfap_dist import aside
        aside.clean()
def run():
    before.prepare()
    with _Cleaner():
        step.batches()
    step.loss()
    from svfap_dist import after
    after.finish()
""",
    "step": """
import multiprocessing, threading
from svfap_dist import child, config, item, thread
def batches():
    config.value()
    item.Item(1)
    started = [threading.Thread(target=thread.work)]
    started += [multiprocessing.get_context("spawn").Process(target=child.work)]
    for one in started: one.start()
    for one in started: one.join()
def loss(): pass
""",
    "thread": "def work(): pass",
    "child": "from svfap_dist.storage import a, b\ndef work(): a.read(), b.read()",
    "storage/__init__": "",
    "storage/a": "def read(): pass",
    "storage/b": "def read(): pass",
    "item": "import dataclasses\n@dataclasses.dataclass\nclass Item:\n    number: int\n",
    "__main__": "if __name__ == '__main__':\n    from svfap_dist import loop\n    loop.run()\n",
}


def _walk(**changes: object) -> walks.Walk:
    usual = {
        "name": "toy",
        "verb": (),
        "opens": r"svfap_dist\..*:batches",
        "closes": r"svfap_dist\..*:loss",
        "left_out": ("config",),
        "once": (),
        "limit": 1,
    }
    return walks.Walk(**{**usual, **changes})  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in _FILES.items():
        path = tmp_path / "svfap_dist" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_files_between_the_two_points_are_counted(root: Path):
    found = walks.follow(_walk(), root, ["-m", "svfap_dist"])
    assert found["svfap_dist.loop"] == {"run"}  # was on the stack when the walk began
    files = walks.count(_walk(), set(found))
    assert files == ["child", "item", "loop", "step", "storage/a", "storage/b", "thread"]
    once = walks.count(_walk(once=("storage",)), set(found))
    assert once == ["(storage)", "child", "item", "loop", "step", "thread"]


def test_an_open_end_is_the_end_of_the_command(root: Path):
    found = walks.follow(_walk(closes=""), root, ["-m", "svfap_dist"])
    assert "svfap_dist.after" in found
    assert "svfap_dist.aside" not in found  # only run by an import and by __exit__
    assert "svfap_dist.before" not in found


def test_a_walk_that_never_begins_is_an_error(root: Path):
    with pytest.raises(SystemExit, match="was it renamed"):
        walks.follow(_walk(opens="svfap_dist:gone"), root, ["-m", "svfap_dist"])


def test_rooms_match_whole_names():
    modules = {"svfap_dist.config.sections", "svfap_dist.configure", "svfap_dist.data.loader"}
    assert walks.count(_walk(), modules) == ["configure", "data/loader"]


@pytest.mark.parametrize(("limit", "code"), [(2, 0), (1, 1)])
def test_more_files_than_allowed_fail(
    limit: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(walks, "WALKS", (_walk(limit=limit),))
    monkeypatch.setattr(walks, "_run", lambda command, root, variables: None)
    modules = {"svfap_dist.loop": {"run"}, "svfap_dist.step": {"batches"}}
    monkeypatch.setattr(walks, "follow", lambda walk, root, command: modules)
    assert walks.main([]) == code
    assert f"toy: 2 files (at most {limit}): loop step" in capsys.readouterr().out
