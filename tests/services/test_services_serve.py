"""The page of `svfap serve` in a real browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from face_videos import backdrop, encode, straight_way, with_faces
from made_networks import emotions, finetuned, save_run
from PIL import Image
from serve_page import send_video

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        ways = straight_way(60)
        (path / "face.mp4").write_bytes(encode(with_faces(corner) for corner in ways))
        (path / "faceless.mp4").write_bytes(encode(backdrop() for _ in range(20)))
        (path / "text.mp4").write_text("This is no video.\n")
        (path / "big.mp4").touch()
        os.truncate(path / "big.mp4", 2 << 30)  # takes no space
        yield path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    run = save_run(folder / "run", finetuned(3), emotions())
    command = [sys.executable, "-m", "svfap_dist", "serve", run, "--port=0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "http://" in line)
        yield re.findall(r"http://\S+", line)[0]
    finally:
        server.terminate()
        server.wait(timeout=120)


def test_a_face_is_shown_with_all_pictures(url: str, folder: Path):
    said = send_video(url, folder / "face.mp4", folder / "page.png")
    assert re.match(r"Face in \d+ of 60 frames, 320 . 240 pixels", said)
    with Image.open(folder / "page.png") as picture:
        assert picture.height > 1000  # has grown by the results


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("big", ["Video is too large.", "give a file of at most 64 MiB."]),
        ("text", ["Found: unreadable", "What to do: give a complete video file"]),
        ("faceless", ["Found: no face", "What to do: use a video in which one face is large"]),
    ],
)
def test_bad_videos_get_a_plain_message(url: str, folder: Path, name: str, words: list[str]):
    said = send_video(url, folder / f"{name}.mp4")
    for word in words:
        assert word in said
