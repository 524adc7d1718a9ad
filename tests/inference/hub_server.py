"""A server of the Hugging Face Hub's interface, as far as huggingface_hub needs it here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator

COMMIT = "c" * 40  # every repository has one commit
TOKEN = "hf_secret"  # repositories are private


class Hub:
    """Repositories by name: files by path. `made` keeps what was asked of `create_repo`."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.made: list[dict[str, object]] = []
        self.url = ""


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self) -> None:
        self._send(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def _repository(self, name: str) -> dict[str, bytes] | None:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return self.hub.repositories.get(name) if allowed else None

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        is_api = path[:2] == ["api", "models"]
        name = "/".join(path[2:4] if is_api else path[:2])
        files = self._repository(name)
        if files is None:
            return self._missing()
        if not is_api:  # owner, name, resolve, revision, file
            data = files[path[4]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._send(200, data, ETag=etag, X_Repo_Commit=COMMIT)
        if path[4] == "tree":
            rows = [
                {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                for file, data in files.items()
            ]
            return self._json(rows)
        return self._json({"id": name, "sha": COMMIT, "siblings": []})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[-1] == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == ["api", "repos", "create"]:
            made = json.loads(body)
            self.hub.made.append(made)
            name = "/".join(filter(None, (made.get("organization"), made["name"])))
            self.hub.repositories.setdefault(name, {})
            return self._json({"url": f"{self.hub.url}/{name}", "name": name})
        name = "/".join(path[2:4])
        files = self._repository(name)
        if files is None:
            return self._missing()
        if path[4] == "preupload":
            rows = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": rows})
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
        url = f"{self.hub.url}/{name}/commit/{COMMIT}"
        return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """Serve an empty Hub on a free port of 127.0.0.1."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})
    )
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
