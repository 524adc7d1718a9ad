"""The page of `svfap serve` in a real browser."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from face_videos import HEIGHT, WIDTH, backdrop, encode, straight_way, with_faces
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
        (path / "camera.y4m").write_bytes(uncompressed(with_faces((100, 60)) for _ in range(10)))
        yield path


def uncompressed(frames: Iterable[np.ndarray]) -> bytes:
    """A video as Chromium plays it for a camera, again and again."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="yuv4mpegpipe") as output:
        stream = output.add_stream("rawvideo", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for rgb in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


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


def test_a_dropped_file_is_sent(url: str, folder: Path):
    said = send_video(url, folder / "face.mp4", by="drop")
    assert re.match(r"Face in \d+ of 60 frames, 320 . 240 pixels", said)


def test_a_recording_of_the_camera_is_sent(url: str, folder: Path):
    said = send_video(url, folder / "camera.y4m", by="record")
    found = re.match(r"Face in (\d+) of (\d+) frames, \d+ . \d+ pixels", said)
    assert found, said
    assert int(found[1]) >= 10


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
