"""A server of the Hugging Face Hub's interface, as far as huggingface_hub needs it here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator

COMMIT = "c" * 40  # of every repository's branch main
TOKEN = "hf_secret"  # repositories are private
_NOT_FOUND = "RepoNotFound", "Repository not found"


class Hub:
    """Repositories by name: files by path, of branch main.

    `branches` has other revisions, by name and revision. `gated` are repositories whose conditions
    this user has not accepted. `made` keeps what was asked of `create_repo`. With a `status`, every
    request is answered with it.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.status = 0
        self.made: list[dict[str, object]] = []
        self.url = ""

    def commits_of(self, name: str) -> dict[str, dict[str, bytes]]:
        """Return the files of each revision of a repository, also by its commit."""
        found = {"main": self.repositories[name], COMMIT: self.repositories[name]}
        for (owner, revision), files in self.branches.items():
            if owner == name:
                found |= {revision: files, commit_of(revision): files}
        return found


def commit_of(revision: str) -> str:
    """Return the commit that a revision means."""
    return COMMIT if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()


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

    def _refuse(self, code: int, name: str, message: str) -> None:
        self._send(code, b"{}", X_Error_Code=name, X_Error_Message=message)

    def _path(self) -> list[str]:
        path = self.path.partition("?")[0].strip("/").split("/")
        return [urllib.parse.unquote(part) for part in path]

    def _is_refused(self, name: str = "") -> bool:
        """Answer for a Hub that is down, or for a user who may not use a repository."""
        token = self.headers.get("Authorization")
        if self.hub.status:
            self._send(self.hub.status, b"{}")
        elif token not in (None, f"Bearer {TOKEN}"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif name in self.hub.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif token is None or (name and name not in self.hub.repositories):
            self._refuse(404, *_NOT_FOUND)
        else:
            return False
        return True

    def do_GET(self) -> None:
        path = self._path()
        is_api = path[:2] == ["api", "models"]
        name = "/".join(path[2:4] if is_api else path[:2])
        if self._is_refused(name):
            return None
        # /api/models/OWNER/NAME[/revision|/tree/REVISION], or /OWNER/NAME/resolve/REVISION/FILE
        of_revision = path[4:] if is_api else path[2:]
        revision = of_revision[1] if of_revision else "main"
        files = self.hub.commits_of(name).get(revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not is_api:
            data = files[path[4]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._send(200, data, ETag=etag, X_Repo_Commit=revision)
        if of_revision[:1] == ["tree"]:
            rows = [
                {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                for file, data in files.items()
            ]
            return self._json(rows)
        return self._json({"id": name, "sha": commit_of(revision), "siblings": []})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        is_new = path == ["api", "repos", "create"]
        if path[-1] == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self._is_refused("" if is_new else "/".join(path[2:4])):
            return None
        if is_new:
            made = json.loads(body)
            self.hub.made.append(made)
            name = "/".join(filter(None, (made.get("organization"), made["name"])))
            self.hub.repositories.setdefault(name, {})
            return self._json({"url": f"{self.hub.url}/{name}", "name": name})
        name = "/".join(path[2:4])
        files = self.hub.repositories[name]
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
