"""Lists of labeled videos: how they may be written, and what is said about those that are wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from layouts import picture, put, video

from data_sharding import pipeline as sharding
from data_sharding.sources import Columns, SourceVideo, find_source
from svfap_dist.errors import ConfigError, ShardError, SvfapError
from svfap_dist.shards import format as shard_format

LIST = "path,label\na.mp4,happy\nb/c.mp4,sad\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b/c.mp4", "d.mp4"):
        put(tmp_path / name, video())
    return tmp_path


def read(root: Path, text: str | bytes, columns: Columns | None = None) -> dict[str, SourceVideo]:
    content = text if isinstance(text, bytes) else text.encode()
    (root / "labels.csv").write_bytes(content)
    found = find_source("csv").samples(str(root / "labels.csv"), columns)
    return {sample.key: sample for sample in found}


def labels(root: Path, text: str | bytes, columns: Columns | None = None) -> dict[str, Any]:
    found = read(root, text, columns)
    assert not any(sample.misfit for sample in found.values())
    return {key: sample.labels.get("class_name") for key, sample in found.items()}


@pytest.mark.parametrize(
    "text",
    [
        LIST,
        LIST.replace("\n", "\r\n"),
        LIST.replace("\n", "\r"),
        LIST.encode("utf-8-sig"),
        LIST.replace(",", ";"),
        LIST.replace(",", "\t"),
        LIST.replace(",", ", "),
        LIST.removesuffix("\n"),
        "\n" + LIST.replace("\n", "\n\n"),
        'Path,"Label"\n"a.mp4","happy"\n"b/c.mp4",sad\n',
        'note,path,label\n"a, ""b""\nc",a.mp4,happy\n,b/c.mp4,sad\n',
        'path;label;"a, b, c, d"\na.mp4;happy;1\nb/c.mp4;sad;2\n',
        LIST.replace("b/c", "./b//c"),
        LIST.replace("b/c", "b\\c"),
        LIST + "a.mp4,happy\n",
    ],
)
def test_ways_to_write_a_list(root: Path, text: str | bytes) -> None:
    assert labels(root, text) == {"a": "happy", "b/c": "sad"}


def test_all_columns(root: Path) -> None:
    text = "file;V;A;who;part\na.mp4;1;-0.5;p1;2\nb/c.mp4;2e-1;0;p2;1\n"
    columns = Columns(path="file", values=("v", "a"), subject="who", fold="PART")
    found = {key: sample.labels for key, sample in read(root, text, columns).items()}
    assert found == {
        "a": {"set": "csv", "values": {"v": 1.0, "a": -0.5}, "subject": "p1", "fold": 2},
        "b/c": {"set": "csv", "values": {"v": 0.2, "a": 0.0}, "subject": "p2", "fold": 1},
    }
    text = "path,label,subject,split,fold\na.mp4,x,p1,train,1\n"
    found = read(root, text, Columns(subject="", fold=""))["a"].labels
    assert found == {"set": "csv", "class_name": "x", "split": "train"}


def test_videos_elsewhere(root: Path) -> None:
    """As absolute paths, below another folder, as crops of faces, or as folders of frames."""
    assert labels(root, f"path,label\n{root}/a.mp4,happy\n") == {"a": "happy"}
    other = root / "other"
    for name in ("x.mp4", "y_z.mp4"):  # the crops of x.avi and y.z.avi
        put(other / name, video())
    for number in range(3):
        put(other / f"frames/{number}.jpg", picture(number))
    text = "path,label\nx.avi,p\ny.z.avi,q\nframes,r\n"
    found = labels(root, text, Columns(videos=str(other)))
    assert found == {"x": "p", "y_z": "q", "frames": "r"}


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("", None, ["no rows", "empty file", "path,label"]),
        ("path,label\n", None, ["no rows", "a header and no rows"]),
        (LIST.encode("utf-16"), None, ["not UTF-8", "UTF-16", "save the file as UTF-8"]),
        ("path,label\na.mp4,fröhlich\n".encode("latin-1"), None, ["line 2", "'ö' in Latin-1"]),
        ("file,label\na.mp4,x\n", None, ["header", "no column 'path'", "--path-column"]),
        ("path,emotion\na.mp4,x\n", None, ["no labels", "emotion", "--label-column"]),
        (LIST, Columns(label="labels"), ["no column 'labels'", "did you mean label?"]),
        (LIST, Columns(values=("v",)), ["no column 'v'", "--value-columns"]),
        (LIST, Columns(subject="person"), ["no column 'person'", "--subject-column"]),
        ("path,label,Label\na.mp4,x,y\n", None, ["two columns of one name", "label"]),
        ("path,label,fold,split\na.mp4,x,1,train\n", None, ["both folds and splits", "--fold-col"]),
        ("path,label\na.mp4,x,y\n", None, ["line 2", "3 fields, the header has 2", "quote"]),
        ("path,label\na.mp4\nd.mp4\n", None, ["lines 2, 3", "1 fields, the header has 2"]),
        ('path,label\na.mp4,"x\nd.mp4,y\n', None, ["line 2", "cannot be read", "close quotes"]),
        ('path,label\na.mp4,"x"y\n', None, ["line 2", "cannot be read", "end of their field"]),
        ("path,label\n,x\n", None, ["line 2", "no path", "remove the row"]),
        ("path,label\n../a.mp4,x\n", None, ["line 2", "out of the folder", "../a.mp4", "--videos"]),
        ("path,label\nb/../../a.mp4,x\n", None, ["line 2", "out of the folder"]),
        ("path,label\n..\\a.mp4,x\n", None, ["line 2", "out of the folder"]),
        ("path,label\n/etc/a.mp4,x\n", None, ["line 2", "out of the folder", "/etc/a.mp4"]),
        ("path,label\nC:\\a.mp4,x\n", None, ["line 2", "out of the folder"]),
        ("path,label\ns3://b/a.mp4,x\n", None, ["line 2", "out of the folder", "s3://b/a.mp4"]),
        ("path,label\na\x07.mp4,x\n", None, ["line 2", "cannot be printed", r"'a\x07.mp4'"]),
        (LIST + "./a.mp4,sad\n", None, ["line 4", "two labels", "line 2 labels diff", "keep one"]),
        ("path,label,subject\na.mp4,x,\n", None, ["line 2", "no subject", "--subject-column"]),
        (
            "path,label,fold\na.mp4,x,0\n",
            None,
            ["line 2", "Fold is not a number from 1", "fold = 0"],
        ),
        (
            "path,label,fold\na.mp4,x,one\n",
            None,
            ["line 2", "Found: fold = one", "count the folds"],
        ),
        ("path,label,split\na.mp4,x,\n", None, ["line 2", "no split", "train, val or test"]),
        ("path,v\na.mp4,high\n", Columns(values=("v",)), ["line 2", "v = high", "decimal point"]),
        ("path;v\na.mp4;0,5\n", Columns(values=("v",)), ["line 2", "v = 0,5", "decimal point"]),
        ("path,v\na.mp4,nan\n", Columns(values=("v",)), ["line 2", "v = nan", "finite"]),
        ("path,label\nx.mp4,x\n", None, ["No listed video exists", "x.mp4", "--videos"]),
        ("path,label\na.mp4,x\na.avi,y\n", None, ["line 3", "same file", "a.mp4 for a.avi"]),
        ("path,label\na.mp4,\nd.mp4, \n", None, ["no labels", "no label in any of 2 rows"]),
    ],
)
def test_each_mistake_has_its_message(
    root: Path, text: str | bytes, columns: Columns | None, words: list[str]
) -> None:
    with pytest.raises(ShardError) as error:
        read(root, text, columns)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "labels.csv" in error.value.where
    assert error.value.found
    assert error.value.do


@pytest.mark.parametrize(
    ("source", "path", "columns", "words"),
    [
        ("csv", "labels.csv", None, ["No such list", "labels.csv"]),
        ("csv", "", None, ["INPUT is not a list", "labels.csv in this folder"]),
        ("csv", "given.csv", Columns(label="x", videos="/nowhere"), ["No such folder", "/nowhere"]),
        ("csv", "given.csv", Columns(label="x", values=("y",)), ["Both a label and values"]),
        ("folder", "", Columns(videos="x"), ["Source has no columns", "folder", "csv"]),
    ],
)
def test_mistakes_of_the_command(
    root: Path, source: str, path: str, columns: Columns | None, words: list[str]
) -> None:
    (root / "given.csv").write_text("path,x,y\na.mp4,happy,1\n")
    with pytest.raises(ConfigError) as error:
        list(find_source(source).samples(str(root / path), columns))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_rows_that_are_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "path,label,age\na.mp4,happy,1\nd.mp4,,2\nx.mp4,sad,3\na.mp4,happy,1\nb/c.txt,sad,4\n"
    with caplog.at_level(logging.WARNING):
        found = read(root, text)
    assert {key: sample.misfit for key, sample in found.items()} == {
        "a": "",
        "b/c": "line 6: no video, by its suffix, or frames",
        "d": "line 3: no label",
        "x": "line 4: no such file",
    }
    said = [record.getMessage() for record in caplog.records]
    for words in (
        "not used: age.",
        "count once: line 5.",
        "left out: line 3.",
        "no videos, are left out: lines 4, 6.",
    ):
        assert sum(words in line for line in said) == 1, said


def test_shards_of_a_list(root: Path) -> None:
    """Short videos are kept, a new row is added to them, and the whole frame is stored."""
    (root / "labels.csv").write_text(LIST)
    out = str(root / "out")

    def shard() -> sharding.ShardSummary:
        return sharding.shard("csv", str(root / "labels.csv"), out, profile="train", workers=0)

    assert shard().num_samples == 2
    assert shard().already_complete
    (root / "labels.csv").write_text(LIST + "d.mp4,angry\n")
    assert shard().new_samples == 1
    manifest = shard_format.load_manifest(out)
    assert manifest.options["train"]["region"] == "full"
    (root / "labels.csv").write_text(LIST.replace("sad", "glad") + "d.mp4,angry\n")
    with pytest.raises(SvfapError, match="--overwrite"):
        shard()
