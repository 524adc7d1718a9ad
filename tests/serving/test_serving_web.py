"""`svfap serve` as browsers and programs meet it: a real server on a free port."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from face_videos import backdrop, encode, straight_way, with_faces
from made_networks import CLASSES, emotions, finetuned, pretrained, recipe, save_run
from PIL import Image

import svfap_dist
from svfap_dist.errors import ConfigError
from svfap_dist.inference.predict import predict
from svfap_dist.inference.videos import Video, read_video
from svfap_dist.serving import web
from svfap_dist.serving.analyze import Analysis, Analyzer
from svfap_dist.video.probe import Limits

LIMITS = Limits(pixels=640 * 480, duration=5, file_bytes=1 << 20, seconds=300)
TOKEN = "a-token-of-some-length"
QUEUE = 2


class Stand:
    """A fake network: each video waits until the test releases it."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.seen: list[bytes] = []
        self.at_once, self.most_at_once = 0, 0

    def __call__(self, data: bytes) -> Analysis:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.seen.append(data)
        self.begun.release()
        assert self.gate.acquire(timeout=60)
        self.at_once -= 1
        return Analysis({"num_frames": 1}, None, None, {}, {"face": "AA=="}, "", [], 0.0)


@contextlib.contextmanager
def serving(analyze: Any, token: str = "", queue: int = QUEUE) -> Iterator[int]:
    """A server's port."""
    network = finetuned(3)
    info = svfap_dist.model.weights.ModelInfo.of_build({"num_outputs": 3}, network.size)
    service = web.Service(analyze, info, "a network", LIMITS, queue, token)
    with web.listen("127.0.0.1", 0, has_token=False) as listener:
        server = web.build_server(web.build_app(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def stand() -> Stand:
    return Stand()


@pytest.fixture(scope="module")
def port(stand) -> Iterator[int]:
    with serving(stand) as port:
        yield port


def send(port: int, body: Any = b"", path: str = "/api/analyze", method: str = "POST", **headers):
    """Status, headers and body of an answer; headers have _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        answer = connection.getresponse()
        raw = answer.read()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, answer.headers, json.loads(raw) if is_json else raw.decode()
    finally:
        connection.close()


def error_of(answer) -> tuple[int, str]:
    """Status and message of a refusal, which has all four parts."""
    status, _, found = answer
    error = found["error"]
    assert error["what"]
    assert error["where"]
    assert error["found"]
    assert error["do"]
    return status, error["message"]


def test_a_video_above_the_limit_is_refused_before_it_is_sent(port):
    """Its size is declared, and no byte of it is needed for the answer."""
    head = (
        f"POST /api/analyze HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: {2**31}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=100) as connection:
        connection.sendall(head.encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 413
        error = json.loads(answer.read())["error"]
    assert error["what"] == "Video is too large"
    assert str(2**31) in error["found"]
    assert error["do"] == "give a file of at most 1 MiB"


def test_a_video_of_unknown_size_is_refused_once_it_is_above_the_limit(port, stand):
    chunks = (bytes(1 << 16) for _ in range(64))
    status, message = error_of(send(port, chunks))  # sends all of it before it reads the answer
    assert (status, stand.seen) == (413, [])
    assert "Do: give a file of at most 1 MiB" in message


def test_a_full_queue_refuses_and_says_when_to_return(stand):
    with serving(stand, queue=0) as port, ThreadPoolExecutor(1) as users:
        answer = users.submit(send, port, b"first", X_Client="0")
        assert stand.begun.acquire(timeout=60)
        again, other = (send(port, b"more", X_Client=client) for client in "01")
        stand.gate.release()
        assert answer.result()[0] == 200
    assert (error_of(again)[0], error_of(other)[0]) == (429, 503)
    assert again[2]["error"]["do"] == "send one video at a time"
    assert other[2]["error"]["what"] == "Queue is full"
    for _, headers, _ in (again, other):
        assert int(headers["retry-after"]) >= 1
    assert stand.seen[-1] == b"first"


def test_turns_are_in_the_order_of_arrival():
    served: list[int] = []

    async def wait_for(queue: web.Queue, number: int) -> None:
        with queue.place(str(number)):
            async with queue.turn():
                await asyncio.sleep(0)  # the others arrive
                served.append(number)

    async def main() -> None:
        queue = web.Queue(4)
        await asyncio.gather(*(wait_for(queue, number) for number in range(5)))

    asyncio.run(main())
    assert served == list(range(5))


def test_ten_users_at_once_are_all_served_in_the_end(port, stand):
    served = len(stand.seen)

    def user(number: int) -> int:
        """Refusals until a video was computed."""
        for refusals in range(10_000):
            status = send(port, b"video", "/api/analyze?pictures=no", X_Client=f"u{number}")[0]
            if status == 200:
                return refusals
            assert status == 503
            time.sleep(0.01)
        raise AssertionError("never served")

    for _ in range(10):
        stand.gate.release()
    with ThreadPoolExecutor(10) as users:
        list(users.map(user, range(10)))
    assert len(stand.seen) == served + 10
    assert stand.most_at_once == 1


def test_pages_of_other_sites_are_refused(port):
    _, message = error_of(send(port, b"", Host="evil.example"))
    assert "Host evil.example" in message
    status, message = error_of(send(port, b"", Origin="https://evil.example"))
    assert status == 403
    assert "Origin https://evil.example" in message
    assert send(port, path="/", method="GET", Host="evil.example")[0] == 403


def test_the_page_needs_nothing_from_elsewhere(port):
    status, headers, page = send(port, path="/", method="GET")
    assert status == 200
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "{nonce}" not in page
    assert "//" not in page.replace("http://www.w3.org/2000/svg", "").replace("</", "")
    about = send(port, path="/api/about", method="GET")[2]
    assert about["limits"] == {"bytes": 1 << 20, "pixels": 640 * 480, "seconds": 5, "queue": QUEUE}
    assert about["names"] == ["0", "1", "2"]


def test_with_a_token_every_call_needs_it(stand):
    with serving(stand, TOKEN) as port:
        page = {"path": "/", "method": "GET", "Host": "gpu-box"}
        assert send(port, **page)[0] == 200
        about = {"path": "/api/about", "method": "GET", "Host": "gpu-box"}
        for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer é"}):
            status, message = error_of(send(port, **about, **wrong))
            assert status == 401
            assert "Authorization: Bearer TOKEN" in message
        assert error_of(send(port, b"video"))[0] == 401
        assert error_of(send(port, b"video", f"/api/analyze?token={TOKEN}"))[0] == 401
        assert send(port, **about, Authorization=f"Bearer {TOKEN}")[0] == 200


def test_an_unexpected_error_is_a_plain_message():
    def fail(data: bytes) -> Analysis:
        raise RuntimeError("secret detail")

    with serving(fail) as port:
        status, message = error_of(send(port, b"video"))
    assert status == 500
    assert "RuntimeError" in message
    assert "secret detail" not in message


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch):
    monkeypatch.delenv(web.TOKEN_VARIABLE, raising=False)
    assert web.read_token("") == ""
    monkeypatch.setenv(web.TOKEN_VARIABLE, TOKEN)
    assert web.read_token("") == TOKEN
    assert web.TOKEN_VARIABLE not in web.os.environ
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert web.read_token(str(path)) == TOKEN
    path.write_text("short")
    with pytest.raises(ConfigError, match=r"5 characters.*secrets.token_urlsafe"):
        web.read_token(str(path))
    path.write_text(f"{TOKEN} {TOKEN}")
    with pytest.raises(ConfigError, match="blanks"):
        web.read_token(str(path))


def test_other_machines_can_call_only_with_a_token():
    for host in ("0.0.0.0", "", "::"):
        with pytest.raises(ConfigError, match="SVFAP_SERVE_TOKEN"):
            web.listen(host, 0, has_token=False)
    web.listen("0.0.0.0", 0, has_token=True).close()
    with web.listen("localhost", 0, has_token=False) as listener:
        host, port = listener.getsockname()[:2]
        with pytest.raises(ConfigError, match="free port"):
            web.listen(host, port, has_token=False)


@pytest.fixture(scope="module")
def videos() -> dict[str, bytes]:
    ways = straight_way(40)
    return {
        "face": encode(with_faces(corner) for corner in ways),
        "faceless": encode(backdrop() for _ in range(20)),
        "large": encode(backdrop(width=800, height=600) for _ in range(2)),
        "long": encode((backdrop(width=64, height=64) for _ in range(8)), fps=1),
        "text": b"This is no video.\n" * 10,
    }


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory) -> Iterator[Analyzer]:
    run = save_run(tmp_path_factory.mktemp("runs") / "fine", finetuned(3), emotions())
    with contextlib.closing(Analyzer(run, {}, "cpu", "haar", LIMITS)) as analyzer:
        yield analyzer


def picture(found: dict[str, Any], name: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(found["pictures"][name])))


def test_a_face_is_found_and_predicted_as_svfap_predict_does(analyzer, videos):
    with serving(analyzer) as port:
        status, _, found = send(port, videos["face"])
        assert status == 200, found
        for name, words in {
            "text": ["unreadable", "give a complete video file: MP4"],
            "faceless": ["no face", "one face is large"],
            "large": ["too large", "at most 307200 pixels"],
            "long": ["too long", "cut it to at most 5 s"],
        }.items():
            status, message = error_of(send(port, videos[name]))
            assert status == 422
            for word in words:
                assert word in message
    assert found["video"] == {"num_frames": 40, "fps": 25.0, "width": 320, "height": 240}
    face = found["face"]
    assert face["num_frames"] == len(face["squares"]) > 30
    assert 0.5 < face["seen"] <= 1
    crop = base64.b64decode(found["crop"])
    network = svfap_dist.load(analyzer.info.provenance["run_url"])
    (expected,) = predict(network, [Video("crop", lambda: read_video(crop))]).predictions
    assert found["prediction"]["label"] == expected.label
    assert found["prediction"]["scores"] == pytest.approx(expected.scores, abs=1e-5)
    timeline = found["timeline"]
    assert list(timeline["scores"]) == list(CLASSES)
    times = timeline["seconds"]
    assert times == sorted(times)
    assert len(times) == len(timeline["scores"]["happy"]) > 1
    assert np.allclose(np.sum(list(timeline["scores"].values()), axis=0), 1, atol=1e-5)
    assert found["pictures"].keys() == {"face", "tokens"}
    assert picture(found, "face").width > 600
    assert found["notes"] == ["No reconstruction: a fine-tuned network has no pixel decoder."]


def test_a_pretrained_network_shows_its_reconstruction(tmp_path: Path, videos):
    run = save_run(tmp_path / "run", pretrained(), recipe())
    # Crops of faces already: no detector.
    with contextlib.closing(Analyzer(run, {}, "cpu", "none", LIMITS)) as analyzer:
        found = vars(analyzer(videos["face"]))
    assert found["face"] is None
    assert found["prediction"] is None
    assert found["crop"] == ""
    network = svfap_dist.load(run)
    assert len(found["timeline"]["features"][0]) == network.num_features
    assert found["pictures"].keys() == {"reconstruction", "tokens"}
    assert picture(found, "reconstruction").height >= 3 * 64
    assert "pre-trained" in found["notes"][0]
