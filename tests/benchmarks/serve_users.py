"""Several users of `svfap serve` at once: answers, their order, and the memory of the server.

    python tests/benchmarks/serve_users.py --users 10 --videos 2 --size tiny

A server of an untrained network of the given size gets videos of a rendered face, 60 to 120 frames,
from all users at once; each sends the next one when the last was answered, and sends a refused one
again when the server says so (`Retry-After`). Memory is resident, of the server alone and with its
child processes, and sampled every 50 ms: its maxima by tenth of the time show whether it grows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from extract_kills import make_network

sys.path.insert(0, str(Path(__file__).parents[1]))
from face_videos import encode, straight_way, with_faces

_SAMPLE_SECONDS = 0.05
_BETWEEN_USERS_SECONDS = 0.05  # makes the order of arrival plain
_ANSWER_SECONDS = 3600
_PARTS = 10  # of the time
_REFUSED = (429, 503)
_MIB = 1 << 20


class Memory(threading.Thread):
    """Samples the resident memory of a process and of it with its children."""

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self._process, self._ended = psutil.Process(number), threading.Event()
        self.samples: list[tuple[float, int, int]] = []  # time, alone, with children

    def run(self) -> None:
        """Sample until `end`."""
        while not self._ended.wait(_SAMPLE_SECONDS):
            alone = self._process.memory_info().rss
            children = 0
            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    children += child.memory_info().rss
            self.samples.append((time.monotonic(), alone, alone + children))

    def end(self) -> None:
        """End the thread."""
        self._ended.set()
        self.join()

    def most(self, begin: float, end: float) -> dict[str, int]:
        """Return the maxima of a time in MiB."""
        part = [sample for sample in self.samples if begin <= sample[0] <= end] or self.samples[-1:]
        alone, together = max(s[1] for s in part), max(s[2] for s in part)
        return {"server": alone // _MIB, "with children": together // _MIB}


@contextlib.contextmanager
def served(checkpoint: Path, log: Path) -> Iterator[tuple[str, int]]:
    """A server: its URL and the number of its process."""
    command = [sys.executable, "-m", "svfap_dist", "serve", str(checkpoint), "--port=0"]
    with open(log, "wb") as stream:
        server = subprocess.Popen(command, stderr=stream, stdout=stream)
    try:
        while not (found := re.search(r"http://[\d.:]+", log.read_text())):
            if server.poll() is not None:
                sys.exit(f"the server ended:\n{log.read_text()}")
            time.sleep(0.1)
        yield found[0], server.pid
    finally:
        server.terminate()
        server.wait(timeout=120)


class Users:
    """What was answered, by all users together."""

    def __init__(self, url: str, count: int, videos: list[bytes]) -> None:
        self._url, self._count, self._videos = url, count, videos
        self.statuses: Counter[int] = Counter()
        self.answered: list[float] = []  # times at which videos were sent, in the order of answers

    def run(self) -> None:
        """Let all users send all videos."""
        with ThreadPoolExecutor(self._count) as users:
            list(users.map(self._use, range(self._count)))

    def _use(self, number: int) -> None:
        time.sleep(number * _BETWEEN_USERS_SECONDS)
        first = number % len(self._videos)  # all lengths at all times: memory grows with length
        for video in self._videos[first:] + self._videos[:first]:
            while (wait := self._send(number, video)) is not None:
                time.sleep(wait)

    def _send(self, number: int, video: bytes) -> float | None:
        """Send a video; the seconds after which to send it again, None: answered."""
        headers = {"X-Client": f"user-{number}"}
        request = urllib.request.Request(
            f"{self._url}/api/analyze?pictures=no", data=video, headers=headers
        )
        sent = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                answer.read()
                self.statuses[answer.status] += 1
                self.answered.append(sent)
        except urllib.error.HTTPError as error:
            self.statuses[error.code] += 1
            return float(error.headers["Retry-After"]) if error.code in _REFUSED else None
        return None


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Serve all users; the results."""
    make_network(folder / "network", args.size)
    lengths = [60 + 60 * number // max(args.videos - 1, 1) for number in range(args.videos)]
    videos = [encode(with_faces(corner) for corner in straight_way(n)) for n in lengths]
    with served(folder / "network", folder / "log") as (url, process):
        memory = Memory(process)
        memory.start()
        time.sleep(10 * _SAMPLE_SECONDS)
        users, begin = Users(url, args.users, videos), time.monotonic()
        before = memory.most(0, begin)
        users.run()
        end = time.monotonic()
        memory.end()
    part = (end - begin) / _PARTS
    parts = [memory.most(begin + part * i, begin + part * (i + 1)) for i in range(_PARTS)]
    overtaken = sum(a > b for a, b in zip(users.answered, users.answered[1:], strict=False))
    return {
        "answers by status": dict(users.statuses),
        "answers after one that was sent later": overtaken,
        "seconds": round(end - begin, 1),
        "MiB before": before,
        "MiB by tenth of the time": parts,
    }


def main() -> None:
    """Print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=10, help="at once")
    parser.add_argument("--videos", type=int, default=2, help="of each user")
    parser.add_argument("--size", default="nano", help="of the network")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
